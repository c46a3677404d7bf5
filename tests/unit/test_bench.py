"""`emoloop bench`: one frame for all benchmarks, and names of today that went elsewhere."""

import json
import sys
from pathlib import Path

import pytest
from emoloop.cli import app
from emoloop.domain import UserError
from emoloop.evals.bench import BENCHES, MOVED, run
from typer.testing import CliRunner


def measured(n: int = 2, seed: int = 0):
    return {"figures": {"half": n / 2}, "n": n}


async def measured_later(n: int = 2):
    return {"figures": {"half": n / 2}, "n": n, "device": "another"}


def test_a_document_says_what_made_its_figures():
    document = run("half", measured, {"seed": 5})
    assert document["bench"] == "half" and document["figures"] == {"half": 1.0}
    assert document["settings"] == {"n": 2, "seed": 5}
    assert document["seeds"] == [5] and document["n"] == 2 and document["device"]


def test_a_benchmark_may_be_async_and_know_more():
    document = run("half", measured_later, {"n": 4})
    assert (document["figures"], document["device"]) == ({"half": 2.0}, "another")


def test_a_function_of_the_user_is_a_benchmark(monkeypatch):
    monkeypatch.setitem(sys.modules, "mine", sys.modules[__name__])
    answer = CliRunner().invoke(app, ["bench", "mine:measured", "n=6", "--json"])
    assert json.loads(answer.stdout)["figures"] == {"half": 3.0}


@pytest.mark.parametrize("name", MOVED)
def test_a_former_benchmark_says_in_one_line_where_it_is(name):
    assert name not in BENCHES
    answer = CliRunner().invoke(app, ["bench", name, "kills=2"])
    assert answer.exit_code != 0
    assert isinstance(answer.exception, UserError)
    assert MOVED[name] in str(answer.exception) and "\n" not in str(answer.exception)
    assert (Path(__file__).parents[2] / MOVED[name]).is_file()
