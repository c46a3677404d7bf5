"""The bench of many runs on one pipeline runs to its end on a tiny one; full batches are a matter of time."""

import tiny
from emoloop.evals.bench import BENCHES, run
from emoloop.tools.registry import resolve


def test_its_figures_are_there(tmp_path):
    folder = str(tiny.save("sd3", tmp_path))
    function = resolve("coalesce", BENCHES, "benchmark")
    document = run("coalesce", function, {"model": folder, "runs": 4, "images": 2, "batch": 4, "repeats": 1})
    figures = document["figures"]
    assert 0.25 <= figures["filled"] <= 1 and figures["efficiency"] > 0 and figures["cpu_efficiency"] > 0
    assert document["generator"]["model"] == folder and document["seeds"] == [0]
