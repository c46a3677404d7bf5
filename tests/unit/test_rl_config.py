"""Distillation's configuration: where values come from, and that every knob is explained."""

from __future__ import annotations

import math
from pathlib import Path
from typing import get_args

import pytest
import yaml
from emoloop.cli import app
from emoloop.cli.options import read_where
from emoloop.domain import UserError
from emoloop.rl.config import PRESETS, DistillConfig, commented, flat, load_config
from emoloop.rl.objectives import OBJECTIVES, load_objective
from pydantic import BaseModel, ValidationError
from rl_log import write_log
from typer.testing import CliRunner


@pytest.mark.parametrize("preset", [path.stem for path in PRESETS.glob("*.yaml")])
@pytest.mark.parametrize("objective", sorted(OBJECTIVES))
def test_presets_resolve_and_print_as_a_file_that_gives_the_same(
    preset: str, objective: str, tmp_path: Path
) -> None:
    config = load_config(objective, preset)
    text = commented(config)
    file = tmp_path / "config.yaml"
    file.write_text(text)
    again = load_config(objective, None, file)
    assert {**flat(again), **again.objective} == {
        **flat(config),
        **yaml.safe_load(text)["objective"],
        **{f"objective.{key}": value for key, value in yaml.safe_load(text)["objective"].items()},
    }
    lines = text.splitlines()
    for number, line in enumerate(lines):
        if not line.lstrip().startswith("#") and not line.endswith(":"):
            assert lines[number - 1].lstrip().startswith("#"), f"{line} is not explained"


def test_file_over_preset_and_set_over_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("train: {steps: 7, lr: 0.5}\nobjectives: {dpo: {train: {lr: 0.25}}}\n")
    assert load_config("opd", "miniature", file).train.lr == 0.5
    config = load_config("dpo", "miniature", file, ["train.steps=9", "policy.targets=[to_q]"])
    assert (config.train.lr, config.train.steps, config.policy.targets) == (0.25, 9, ("to_q",))
    assert config.train.batch_size == load_config("dpo", "miniature").train.batch_size
    assert config.objective["name"] == "dpo" and config.objective["beta"] == 100.0


@pytest.mark.parametrize("model", ["sd35-medium", "stabilityai/stable-diffusion-3.5-medium"])
def test_the_preset_is_that_of_the_model_in_the_log(model: str, tmp_path: Path) -> None:
    write_log(tmp_path, 2, model=model)
    (tmp_path / "mine.yaml").write_text("train: {steps: 7}\n")
    words = ["distill", "opd", "--print-config", "--home", str(tmp_path)]
    answer = CliRunner().invoke(app, [*words, "--config", str(tmp_path / "mine.yaml")])
    shown = yaml.safe_load(answer.stdout)
    assert (shown["policy"]["rank"], shown["train"]["lr"], shown["train"]["steps"]) == (64, 1e-4, 7)
    assert answer.stderr.splitlines() == [f"preset sd35-medium, for images by {model}"]
    named = CliRunner().invoke(app, [*words, "--preset", "miniature"])
    assert yaml.safe_load(named.stdout)["train"]["steps"] == 120 and not named.stderr


def test_without_a_fitting_preset_one_is_asked_for(tmp_path: Path) -> None:
    write_log(tmp_path, 2, model="somebody/model")
    words = ["distill", "opd", "--dry-run", "--home", str(tmp_path)]
    failed = CliRunner().invoke(app, words)
    message = r"no preset fits somebody/model, .* --preset \(flux-dev, miniature, sd15, sd35-medium, sdxl\)"
    with pytest.raises(UserError, match=message):
        raise failed.exception or AssertionError
    (tmp_path / "mine.yaml").write_text("train: {steps: 7}\n")
    assert CliRunner().invoke(app, [*words, "--config", str(tmp_path / "mine.yaml")]).exit_code == 0
    # Without a log there are knobs to print all the same.
    words[2:] = ["--print-config", "--home", str(tmp_path / "none")]
    assert yaml.safe_load(CliRunner().invoke(app, words).stdout)["train"]["steps"] == 120


def test_wrong_values_are_one_line() -> None:
    for sets, message in (
        (["trian.steps=3"], r"unknown key 'trian', did you mean|unknown key 'trian'"),
        (["train.steps=three"], r"train\.steps: Input should be a valid integer"),
        (["train.steps=[1"], "the value is not YAML"),
        (["=3"], "KEY=VALUE is wanted"),
    ):
        with pytest.raises(UserError, match=message):
            load_config("opd", sets=sets)
    with pytest.raises(UserError, match="No such file"):
        load_config("opd", file=Path("nowhere.yaml"))


def test_filters_of_runs() -> None:
    where = read_where(["gain=0.2,model=a/b", "valence=-1..2", "run=r1+r2"])
    assert (where.min_gain, where.model, where.valence, where.run_ids) == (
        0.2,
        "a/b",
        (-1.0, 2.0),
        ("r1", "r2"),
    )
    assert read_where(["prompt=a dog, by the sea"]).prompt == "a dog, by the sea"
    assert read_where(["since=2d"]).since is not None
    for words in ("gain", "color=red", "since=soon", "limit=many"):
        with pytest.raises(UserError, match="--where"):
            read_where([words])


def test_every_number_has_a_range_and_none_may_be_infinite() -> None:
    models: list[BaseModel] = [it for it in DistillConfig().__dict__.values() if isinstance(it, BaseModel)]
    models += [load_objective(name) for name in OBJECTIVES]
    checked = 0
    for model in models:
        for name, field in type(model).model_fields.items():
            if not {int, float} & {field.annotation, *get_args(field.annotation)}:
                continue
            checked += 1
            bounded = any(hasattr(it, "ge") or hasattr(it, "gt") for it in field.metadata)
            # Only a gain may be of either sign.
            assert bounded or name == "min_gain", name
            for value in (math.nan, math.inf, -math.inf):
                with pytest.raises(ValidationError):
                    type(model).model_validate({name: value})
    assert checked > 50


@pytest.mark.parametrize(
    "knob", ["train.seed=-1", "train.betas=[0.9,1.5]", "train.lr=.nan", "data.min_gain=.inf"]
)
def test_knobs_out_of_range_are_named(knob: str) -> None:
    with pytest.raises(UserError, match=knob.split("=")[0].replace(".", r"\.")):
        load_config("sft", sets=[knob])


def test_a_file_in_another_encoding_is_one_line(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_bytes("# caf\u00e9\ntrain: {steps: 1}\n".encode("latin-1"))
    with pytest.raises(UserError, match=r"mine\.yaml is not UTF-8 \(byte 5\)"):
        load_config("sft", file=file)
