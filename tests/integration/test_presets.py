"""Presets of distillation: the one of the pipeline's family is found without being named, and it trains."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import rl_log
import tiny
from emoloop.cli import app
from emoloop.rl.config import load_config, preset_for
from emoloop.rl.distill import distill
from typer.testing import CliRunner

PRESETS = {"sd3": "sd35-medium", "flux": "flux-dev", "sdxl": "sdxl", "sd15": "sd15"}


@pytest.mark.parametrize("name", tiny.NAMES)
def test_the_pipelines_family_has_its_preset(name: str, tmp_path: Path) -> None:
    folder = tiny.save(name, tmp_path / "model")
    settings = rl_log.write_log(tmp_path / "home", 4, model=str(folder), revision=None)
    words = ["distill", "opd", "--dry-run", "--home", str(settings.home), "--set", "data.held_out=0"]
    shown = CliRunner().invoke(app, words)
    assert shown.exit_code == 0 and shown.stderr == f"preset {PRESETS[name]}, for images by {folder}\n"
    document = json.loads(CliRunner().invoke(app, [*words, "--json"]).stdout)
    assert document["preset"] == PRESETS[name] and document["config"]["policy"]["rank"] == 64
    # What it says fits the family; only what a CPU and a second do not allow is set.
    small = (
        "train.steps=2",
        "train.batch_size=2",
        "train.accumulation=1",
        "train.precision=fp32",
        "train.device=cpu",
    )
    small += ("train.tensorboard=false", "guard.every=0", "data.held_out=0", "objective.rollout_steps=2")
    config = load_config("opd", preset_for(str(folder)), sets=small)
    assert distill(settings, config, tmp_path / "out").outcome.reason == "finished"


@pytest.mark.parametrize(
    "model", ["sd15", "stabilityai/stable-diffusion-xl-base-1.0", "black-forest-labs/FLUX.1-dev"]
)
def test_a_name_is_enough_where_no_folder_is_here(model: str) -> None:
    assert preset_for(model) == {"s": "sdxl", "b": "flux-dev"}.get(model[0] if "/" in model else "", "sd15")
