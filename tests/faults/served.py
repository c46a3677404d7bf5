"""A server on a painter and a scripted chat model: `served.py HOME PORT`. It paints a round or so of eight runs, and
what is left once HOME/go is there, so that it can be killed in the middle on a machine of any speed.
"""

import asyncio
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import uvicorn
from emoloop.service import jobs
from emoloop.service.app import create_app
from painter import Painter
from service_parts import service_of, settings_of

#: Stands in place of a distillation: it says a line for each step and begins where it was killed, as `--resume` does.
JOB = """
import os, pathlib, sys, time
done, own = pathlib.Path("done"), pathlib.Path(f"done-{os.getpid()}")
for step in range(int(done.read_text()) if done.exists() else 0, 40):
    print("step", step, flush=True)
    own.write_text(str(step + 1))
    own.replace(done)  # whole or not at all, however it is ended
    time.sleep(.1)
"""

SUPERVISE = """
import sys
from emoloop.service.supervise import supervise
from emoloop.settings import load_settings
from emoloop.traces.store import open_store
with open_store(load_settings()) as store:
    supervise(store, sys.argv[-1], lambda words: [sys.executable, "-c", {job!r}])
"""


class Gated(Painter):
    """Waits with all but the first pictures."""

    async def generate(self, requests):
        while len(self.requests) >= 8 and not (home / "go").exists():  # noqa: ASYNC110
            await asyncio.sleep(0.05)
        return await super().generate(requests)


if __name__ == "__main__":
    home, port = Path(sys.argv[1]), int(sys.argv[2])
    jobs.PROGRAM = [sys.executable, "-c", SUPERVISE.format(job=JOB)]
    settings = settings_of(home, jobs=1)
    uvicorn.run(create_app(service_of(settings, Gated(delay=0.1), delay=0.1)), port=port, log_level="warning")
