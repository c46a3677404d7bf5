"""What `accelerate launch` starts in tests: trainings, one after the other, as JSON says.

    accelerate launch … tests/launched.py '[{"objective": "dpo", "out": "…", "home": "…", "sets": […], …}]'

`kill_at` is a step at which the first process dies by SIGKILL, `interrupt_at` one at which it gets SIGINT.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import online_helpers
from accelerate import DistributedType, PartialState
from emoloop.rl.config import load_config
from emoloop.rl.distill import distill
from emoloop.settings import load_settings


def train(objective: str, out: str, settings: dict[str, Any], sets: list[str], **how: Any) -> None:
    """One training."""

    def watch(step: int, steps: int, figures: dict[str, float]) -> None:
        for key, number in (("kill_at", signal.SIGKILL), ("interrupt_at", signal.SIGINT)):
            if step == how.get(key):
                os.kill(os.getpid(), number)

    resume, loaded = how.get("resume", False), load_settings(settings)
    if objective == "flow-grpo":
        online_helpers.run(loaded, Path(out), *sets, resume=resume, watch=watch)
    else:
        distill(loaded, load_config(objective, sets=sets), Path(out), resume=resume, watch=watch)


if __name__ == "__main__":
    if os.environ.get("ACCELERATE_USE_FSDP"):
        # accelerate shards on accelerators alone: two processes of a CPU pass for two GPUs.
        PartialState(cpu=True)
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    for task in json.loads(sys.argv[1]):
        train(**task)
