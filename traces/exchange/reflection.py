"""Runs as visual-reflection trajectories, the shape that verl-omni trains on (`visual_reflection_v1`).

A run becomes a prompt, the best image of each round up to the winning one, and after each image a step: what
the critic saw, whether to go on, and what to change. The prompt says the wanted emotion too, since without it no
reflection makes sense. A run that does not fit (a round without a critique, a rewrite without a word on what it
changed) is left out whole, never patched: their reader refuses half-formed records.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from ...domain import Critique, EmotionTarget, Round, RunResult, UserError
from ...files import replacing, write_atomic
from ..rows import RunFilter
from ..store import TraceStore

SCHEMA = "visual_reflection_v1"

#: Lines that would read as headers of their protocol.
_HEADER = re.compile(r"^(Reflection|Action|Edit):", re.MULTILINE)


def export_reflection(store: TraceStore, where: RunFilter | None, path: Path) -> int:
    """Write `trajectories.jsonl` and the images that it names.

    Args:
        store: The log.
        where: Which runs.
        path: A folder; made. Image URIs are relative to it.

    Returns:
        The number of trajectories.

    Raises:
        UserError: No chosen run makes a trajectory.
        OSError: An image is not there, or the disk refused.
    """
    count = 0
    with replacing(path / "trajectories.jsonl") as beside:
        with beside.open("w", encoding="utf-8") as file:
            for row in reversed(store.runs(where)):
                trajectory = _trajectory(store.run(row.run_id))
                if trajectory is None:
                    continue
                for image in trajectory["images"]:
                    place = path / image["uri"]
                    if not place.exists():
                        write_atomic(place, store.blobs.get_bytes(image["sha256"]))
                file.write(json.dumps(trajectory, ensure_ascii=False) + "\n")
                count += 1
        if not count:
            raise UserError("no trajectories: none of these runs has a critique in every round")
    return count


def _trajectory(run: RunResult) -> dict[str, Any] | None:
    if run.best is None:
        return None
    images, steps = [], []
    for number, round_ in enumerate(run.rounds[: run.best.round + 1]):
        scored = [it for it in round_.candidates if it.reward is not None]
        best = max(scored, key=lambda it: it.reward or 0.0, default=None)
        if best is None or not isinstance(best.critique, Critique):
            return None
        last = number == run.best.round
        reflection = best.critique.analysis.strip()
        edit = "" if last else (_changes(run.rounds[number + 1]) or best.critique.suggestion).strip()
        if not reflection or (not last and not edit) or _HEADER.search(f"{reflection}\n{edit}"):
            return None
        images.append({"uri": f"images/{best.sha256}.png", "sha256": best.sha256})
        steps.append({"reflection": reflection, "action": "stop" if last else "continue", "edit": edit})
    content = {
        "manifest_id": f"emoloop:{SCHEMA}",
        "source_dataset": "emoloop",
        "source_record_id": run.run_id,
        "pipeline_variant": "direct_parse",
        "prompt": f"{run.prompt}; wanted feeling: {_say(run.target)}",
        "images": images,
        "steps": steps,
    }
    # Their identifier is a digest of the content, which their reader checks.
    canonical = json.dumps(content, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
    digest = hashlib.sha256(f"{SCHEMA}\0{canonical}".encode()).hexdigest()
    return {"trajectory_id": f"traj_{digest}", **content}


def _changes(round: Round) -> str:
    """What was changed to get to the prompt of a round's best image, or to its first one."""
    scored = [it for it in round.candidates if it.reward is not None]
    best = max(scored, key=lambda it: it.reward or 0.0, default=None)
    return next((it.changes for it in round.proposals if best and it.prompt == best.prompt), round.changes)


def _say(target: EmotionTarget) -> str:
    named = zip(("valence", "arousal"), target.point, strict=True)
    parts = [f"{axis} {value:+.1f}" for axis, value in named if value is not None]
    return ", ".join([*parts, *([target.category.value] if target.category else [])])
