"""Child processes end with their parent, however it ends."""

import signal
import subprocess
import sys

import psutil
import pytest
from emoloop.tools.children import GuardedProcess

SLEEP = [sys.executable, "-c", "import time; print(1, flush=True); time.sleep(600)"]


def test_they_end_when_the_block_breaks_off():
    with pytest.raises(ZeroDivisionError), GuardedProcess(SLEEP, stdout=subprocess.PIPE) as child:
        assert child.process.stdout is not None
        child.process.stdout.readline()
        tree = psutil.Process(child.process.pid).children(recursive=True)
        _ = 1 / 0
    assert child.process.poll() in (130, 143)
    assert tree
    assert not any(process.is_running() for process in tree)
    child.process.stdout.close()


@pytest.mark.parametrize("end", ["terminate", "kill"])
def test_they_end_with_their_parent(end):
    code = f"""
import subprocess
from emoloop.tools.children import GuardedProcess
with GuardedProcess({SLEEP!r}, stdout=subprocess.PIPE) as child:
    print(child.process.pid, child.process.stdout.readline(), flush=True)
    child.process.wait()
"""
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    guard = psutil.Process(int(parent.stdout.readline().split()[0]))
    tree = [guard, *guard.children(recursive=True)]
    assert len(tree) == 2
    getattr(parent, end)()
    parent.wait(60)
    parent.stdout.close()
    _, alive = psutil.wait_procs(tree, timeout=60)
    assert not [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]


def test_they_may_save_what_they_have_though_we_were_started_in_the_background():
    """A script's shell ignores SIGINT for what it runs in the background."""
    code = """
import time
try:
    print(1, flush=True)
    time.sleep(600)
except KeyboardInterrupt: print('saved', flush=True)
"""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        child = GuardedProcess([sys.executable, "-c", code], stdout=subprocess.PIPE, grace=60)
    finally:
        signal.signal(signal.SIGINT, before)
    with child:
        assert child.process.stdout is not None
        child.process.stdout.readline()
        child.process.terminate()
        assert child.process.stdout.read().strip() == b"saved" and child.process.wait(60) == 0
        child.process.stdout.close()
