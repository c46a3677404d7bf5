"""The model card of a distilled adapter: what the hub reads of it, then what people do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jinja2
from huggingface_hub import EvalResult, ModelCardData

from ..presets import GENERATORS


def card(
    pipeline: str,
    config: Any,
    base_model: str,
    training: dict[str, Any],
    *,
    tokens: Any = None,
    visual: Any = None,
) -> str:
    """The card's text.

    Args:
        pipeline: The class of the pipeline.
        config: The LoRA's.
        base_model: As the log names it: a preset, a hub id or a folder.
        training: What `training.json` says.
        tokens: The emotion tokens, None where there are none.
        visual: The visual prompts, None where there are none.
    """
    preset = GENERATORS.get(base_model)
    base = base_model if preset is None else str(preset.model)
    # A folder of somebody's own is no address that the hub knows.
    on_hub = not Path(base).exists() and base.count("/") == 1
    name = Path(base_model).name if Path(base_model).exists() else base_model
    figures = training.get("figures", {})
    guards = {key.removeprefix("guard_"): value for key, value in figures.items() if key.startswith("guard_")}
    metadata = ModelCardData(
        base_model=base if on_hub else None,
        base_model_relation="adapter" if on_hub else None,
        library_name="diffusers",
        license="other",
        license_name="that-of-the-base-model",
        license_link=f"https://huggingface.co/{base}" if on_hub else None,
        pipeline_tag="text-to-image",
        tags=["text-to-image", "diffusers", "lora", "template:sd-lora", "emoloop", "affective-computing"],
        model_name=f"Emotion adapter for {name or pipeline}" if guards else None,
        eval_results=[
            EvalResult("text-to-image", "emoloop", "held-out prompts of the log", f"guard_{key}", value)
            for key, value in guards.items()
        ]
        or None,
    )
    template = Path(__file__).with_name("card.md.jinja").read_text(encoding="utf-8")
    return jinja2.Template(template, keep_trailing_newline=True).render(
        metadata=metadata.to_yaml(),
        base_model=name,
        pipeline=pipeline,
        config=config,
        tokens=tokens,
        visual=visual,
        training=training,
        guards=guards,
    )
