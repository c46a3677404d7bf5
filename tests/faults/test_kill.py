"""kill -9 and resume, a few times; `kill.py` does it twenty times with the embedded models."""

import sys
from pathlib import Path

import pytest
from faults.kill import study

CHILD = Path(__file__).with_name("killable.py")


@pytest.mark.parametrize("rewriter", ["simple", "mc_agent"])
def test_nothing_is_lost_doubled_or_decided_differently(rewriter):
    figures = study(
        lambda home, resume: [sys.executable, str(CHILD), str(home), "resume" if resume else "run", rewriter],
        kills=3,
        seed=4,
    )
    assert figures["kills"] == 3
    assert figures["killed"] >= 1
    assert figures["events"] > 0
    assert {figures[key] for key in ("lost", "doubled", "different", "unfinished")} == {0}
