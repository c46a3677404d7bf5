"""The study's bookkeeping: seeds for each objective, and the mean over seeds as an arm."""

import json
from types import SimpleNamespace

import pytest
from emoloop.domain import UserError
from emoloop.evals.analysis import Column
from emoloop.evals.studies.distill_study import _check_settings, _counts, average, main
from emoloop.rl.config import load_config


def test_an_objective_may_take_its_own_number_of_seeds():
    assert _counts("opd, dpo:1,", 3) == {"opd": 3, "dpo": 1}


@pytest.mark.parametrize("spec", ["opd:0", "opd:three", ","])
def test_other_numbers_are_refused_before_anything_is_made(spec, tmp_path):
    with pytest.raises(UserError, match="objectives="):
        main(out=str(tmp_path / "study"), objectives=spec)
    assert not (tmp_path / "study").exists()


def test_an_objectives_arm_is_the_mean_of_its_seeds():
    def column(*values):
        return {"error": Column(list(values), ["a", "b", "c"], ["p", "p", "q"])}

    table = SimpleNamespace(
        arms=["opd_0", "opd_1"], columns={"opd_0": column(1.0, 3.0, None), "opd_1": column(2.0, 5.0, 1.0)}
    )
    spread = average(table, {"opd": ["opd_0", "opd_1"]})  # pyright: ignore[reportArgumentType]
    assert table.columns["opd"]["error"].values == [1.5, 4.0, None]
    assert table.arms == ["opd_0", "opd_1", "opd"]
    assert spread["opd_error_seed_std"] == pytest.approx((8 / 3 - 2) / 2**0.5)


def test_an_adapter_of_other_settings_is_not_judged_as_if_it_had_these(tmp_path):
    config = load_config("opd", "miniature", sets=["train.seed=1", "data.phrases=12"]).model_dump(mode="json")
    (tmp_path / "training.json").write_text(json.dumps({"config": config}))
    _check_settings(tmp_path, "opd", 1, "miniature", ["data.phrases=12"])
    with pytest.raises(UserError, match=r"other settings of data\.phrases: use another out="):
        _check_settings(tmp_path, "opd", 1, "miniature", [])


def test_a_setting_from_after_a_training_counts_as_its_default(tmp_path):
    config = load_config("opd", "miniature", sets=["train.seed=1"]).model_dump(mode="json")
    del config["data"]["phrases"]
    default = type(load_config("opd", "miniature").data)().phrases
    (tmp_path / "training.json").write_text(json.dumps({"config": config}))
    _check_settings(tmp_path, "opd", 1, "miniature", [f"data.phrases={default}"])
    with pytest.raises(UserError, match=r"other settings of data\.phrases: use another out="):
        _check_settings(tmp_path, "opd", 1, "miniature", [f"data.phrases={default + 1}"])
