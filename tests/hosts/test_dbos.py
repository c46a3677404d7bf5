"""The named baseline of a durable step: DBOS, on the same server."""

from __future__ import annotations

import pytest
from emoloop.evals.bench import workers
from emoloop.evals.bench.postgres import missing
from hosts.environments import program


def test_a_durable_step_takes_no_more_cpu_than_that_of_dbos():
    python = program("dbos", "python")
    if python is None or missing():
        pytest.skip(missing() or "no dbos: python tests/hosts/environments.py")
    figures = workers.steps(str(python), runs=30, steps=20, concurrency=8)
    assert 0 < figures["dbos_cost_ratio"] <= 1, figures
