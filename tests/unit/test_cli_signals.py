"""What a second Ctrl-C does: the first saves and stops, and may have to wait for a batch; the second does not."""

import subprocess
import sys

CODE = """
import asyncio, os, signal, time
from emoloop.cli.run import run_async

async def work():
    try:
        os.kill(os.getpid(), signal.SIGINT)
        await asyncio.Event().wait()
    finally:
        print("saving", flush=True)
        batch = asyncio.get_running_loop().run_in_executor(None, time.sleep, 600)
        os.kill(os.getpid(), signal.SIGINT)
        await batch

print(run_async(work()))
"""


def test_a_second_ctrl_c_ends_at_once():
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (130, "saving\n", "")
