"""The model card of an adapter's folder, and what of the folder goes to the hub; no network."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
from emoloop.tools.diffusion.card import card
from huggingface_hub import ModelCard
from huggingface_hub.utils import filter_repo_objects

LORA = SimpleNamespace(r=4, lora_alpha=8)
TRAINING = {
    "reward": {"name": "emotion + 0.5*pickscore", "version": "1 + x@1"},
    "objective": {"name": "opd"},
    "data": {"runs": 10, "prompts": 7},
    "figures": {"guard_alignment": 0.75, "guard_diversity": 0.125, "loss": 1.0},
}


@pytest.mark.parametrize(
    "model, base",
    [
        ("sdxl", "stabilityai/stable-diffusion-xl-base-1.0"),
        ("somebody/model", "somebody/model"),
        ("miniature", None),
        (str(Path(__file__).parent), None),
    ],
)
def test_the_hub_reads_the_base_model_and_the_guards(model: str, base: str | None):
    text = card("StableDiffusionXLPipeline", LORA, model, TRAINING)
    said = ModelCard(text).data
    assert said.base_model == base and (said.get("base_model_relation") == "adapter") == (base is not None)
    assert (said.library_name, said.pipeline_tag, said.license) == ("diffusers", "text-to-image", "other")
    assert {it.metric_type: it.metric_value for it in said.eval_results or []} == {
        "guard_alignment": 0.75,
        "guard_diversity": 0.125,
    }
    assert "| alignment | 0.75 |\n| diversity | 0.125 |\n" in text
    assert "the reward emotion + 0.5*pickscore (version 1 + x@1), 10 runs of 7 prompts, by opd" in text
    # A folder's path says something of the machine, and nothing to anybody else.
    assert str(Path(__file__).parent) not in text


def test_the_shipped_adapters_card_is_one():
    folder = Path(__file__).parents[2] / "miniature/adapters/opd"
    said = ModelCard.load(folder / "README.md").data
    assert (said.library_name, said.license, said.pipeline_tag) == (
        "diffusers",
        "apache-2.0",
        "text-to-image",
    )


def test_what_is_uploaded_is_the_artifact_without_its_training():
    kept = ["README.md", "emotion_tokens.safetensors", "pytorch_lora_weights.safetensors", "training.json"]
    training = ["training/config.yaml", "training/checkpoints/step-100/state.pt", "training/metrics.jsonl"]
    # What `upload_folder` sifts a folder's files by.
    assert list(filter_repo_objects([*kept, *training], ignore_patterns=["training/*"])) == kept
