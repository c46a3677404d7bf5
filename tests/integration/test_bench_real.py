"""The bench of published sizes runs as a whole on tiny models, and its generator is what training names."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from emoloop.domain import UserError
from emoloop.evals.bench import real
from emoloop.settings import GeneratorSettings
from tokenizers import Tokenizer
from transformers import AutoConfig


@pytest.mark.parametrize("name", ["sd35-medium", "flux-dev", "sdxl", "qwen25-vl-7b"])
def test_the_rule_of_tiny_models_leaves_real_ones_alone(name: str) -> None:
    full, tiny = (real._entry(name, size) for size in ("full", "tiny"))
    if name == "qwen25-vl-7b":
        assert (full["config"]["hidden_size"], tiny["config"]["hidden_size"]) == (3584, 896)
        assert tiny["config"]["vision_config"]["fullatt_block_indexes"] == []
    else:
        assert full["defaults"]["steps"] > 2 == tiny["defaults"]["steps"]
        assert full["components"]["text_encoder"]["hidden_size"] == 768
    with pytest.raises(UserError, match="no model 'vae'"):
        real._entry("vae", "tiny")


@pytest.mark.slow
def test_pictures_and_steps_are_measured() -> None:
    figures = real.main(size="tiny", models="sd35-medium", runs=8, images=2, updates=4)["figures"]
    names = (
        "images_per_second",
        "efficiency",
        *(f"{it}_steps_per_second" for it in ("opd", "dpo", "flow_grpo")),
    )
    assert all(figures[f"sd35-medium.{it}"] > 0 for it in names)
    shares = [value for key, value in figures.items() if key.endswith("share")]
    assert len(shares) == 4 and all(0 < value <= 1 for value in shares)


def test_a_generator_of_a_size_is_what_settings_name() -> None:
    made = real.sd35_medium_tiny(GeneratorSettings(device="cpu"))
    about = made.describe()
    assert about["model"] == "emoloop.evals.bench.real:sd35_medium_tiny"
    assert (about["height"], about["steps"], about["pipeline"]) == (64, 2, "StableDiffusion3Pipeline")


def test_an_lvlm_is_a_folder_that_transformers_reads_without_weights(tmp_path: Path) -> None:
    folder = real._lvlm_folder(tmp_path / "qwen25-vl-7b", real._entry("qwen25-vl-7b", "full")["config"])
    config = AutoConfig.from_pretrained(folder).get_text_config()
    assert (config.num_hidden_layers, config.num_key_value_heads, config.vocab_size) == (28, 4, 152064)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    whole = json.loads((folder / "config.json").read_text())
    # Its processor needs torchvision, which vLLM's environment has.
    assert whole["image_token_id"] == tokenizer.token_to_id("<|image_pad|>")
    assert len(tokenizer.encode("critique: a dog by the sea").ids) < 20
