"""The benches of distillation, small: they measure what their documents say."""

import pytest
from emoloop.evals.bench import dataset, dpo_step


@pytest.mark.training
def test_both_sides_of_the_dpo_step_have_one_loss():
    document = dpo_step.main(steps=1, pairs=2, size=64)
    figures = document["figures"]
    assert figures["loss_difference"] < 0.01
    assert figures["ratio"] == pytest.approx(figures["baseline_seconds"] / figures["ours_seconds"])
    assert {"vae", "text"} <= set(document["parts"]["baseline"])
    assert not {"vae", "text"} & set(document["parts"]["ours"])


@pytest.mark.slow
def test_a_log_of_the_large_ones_kind_gives_batches_of_every_source(monkeypatch):
    monkeypatch.setattr(dataset, "_PROMPTS", 4)  # each met at several targets, as in the large one
    figures = dataset.main(runs=160)["figures"]
    assert figures["runs"] == 160
    assert figures["seconds"] > 0 and figures["peak_mb"] > 0
