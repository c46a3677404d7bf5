"""A distilled target in a stock diffusers pipeline, and the pipeline afterwards as it was."""

from pathlib import Path

import emoloop
import torch
from diffusers import DiffusionPipeline
from emoloop import EmotionTarget
from emoloop.miniature import codec  # noqa: F401  the embedded model's VAE class, for diffusers to find
from emoloop.tools.presets import resolve
from PIL import Image, ImageChops

if __name__ == "__main__":
    pipe = DiffusionPipeline.from_pretrained(
        resolve("miniature"), dtype=torch.float32, text_encoder_3=None, tokenizer_3=None
    )

    def paint() -> Image.Image:
        """The pipeline's own call; the adapter needs no argument of it."""
        noise = torch.Generator("cpu").manual_seed(7)
        size = {"height": 96, "width": 96, "max_sequence_length": 0}
        return pipe(
            "a dog by the sea", num_inference_steps=14, guidance_scale=3.0, generator=noise, **size
        ).images[0]

    # The artifact that ships with the package; a folder of `emoloop distill`, or any LoRA, is given the same way.
    adapter = Path(emoloop.__file__).parent / "miniature" / "adapters" / "opd"

    before = paint()
    with emoloop.apply(pipe, adapter, EmotionTarget(valence=-2, arousal=1)) as applied:
        paint().save("tense.png")
        applied.target = EmotionTarget(valence=2, arousal=-1)
        paint().save("calm.png")
    # Without a `with`, `applied.remove()` takes it off.
    assert ImageChops.difference(before, paint()).getbbox() is None
    before.save("base.png")
