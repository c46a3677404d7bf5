"""A generator from a diffusers pipeline that your program holds already."""

import torch
from diffusers import DiffusionPipeline
from emoloop import EmotionTarget, open_loop
from emoloop.miniature import codec  # noqa: F401  the embedded model's VAE class, for diffusers to find
from emoloop.tools.presets import resolve

if __name__ == "__main__":
    # Any pipeline of the SD3, FLUX, SDXL and SD1.5 families, with its LoRA, scheduler and offload as you set them.
    pipe = DiffusionPipeline.from_pretrained(
        resolve("miniature"), dtype=torch.float32, text_encoder_3=None, tokenizer_3=None
    )

    with open_loop(generator=pipe, loop={"rounds": 1, "images": 2}) as loop:
        result = loop.run_sync("a cat in the city", EmotionTarget(valence=1), seed=1)
        print(loop.parts.generator.describe())
    assert result.best is not None, result.warnings
    print(f"best reward {result.best.reward:.2f}")
