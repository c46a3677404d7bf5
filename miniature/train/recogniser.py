"""Recipe of the judge's and the guard's recogniser: a small residual network on rendered scenes.

The two differ in seed and in the compositions they see. Pictures are spoiled as a generator would spoil them,
so that they also read what comes out of one.
"""

from __future__ import annotations

import json

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from .. import world
from ..codec import PatchAutoencoder
from ..judge import Recogniser, labels
from .common import Recipe, save_half
from .lvlm import spoil


def train(recipe: Recipe, name: str) -> list[float]:
    """Train a recogniser and write it to `recipe.out / "model"`.

    Args:
        recipe: The run.
        name: "judge" or "guard": which compositions it sees, and its seed.
    """
    seed = recipe.seed + {"judge": 1000, "guard": 2000}[name]
    torch.manual_seed(seed)
    codec = PatchAutoencoder()
    rng = np.random.default_rng([seed, 78])
    codec.fit(np.stack([world.render(world.sample_scene(rng)) for _ in range(1000)]))
    model = Recogniser(32 if name == "judge" else 28).to(recipe.device)
    model.train()
    print(f"parameters: {sum(p.numel() for p in model.parameters()):,}")

    def loss(step: int) -> tuple[Tensor, dict[str, float]]:
        rng = np.random.default_rng([seed, step])
        scenes = [world.sample_scene(rng, world.FOLDS[name]) for _ in range(recipe.batch)]
        x = spoil(rng, codec, np.stack([world.render(s) for s in scenes])).to(recipe.device)
        truth = [labels(s) for s in scenes]
        out = model(x)
        parts = {
            key: F.cross_entropy(value.float(), torch.tensor([t[key] for t in truth], device=recipe.device))
            for key, value in out.items()
            if key != "features"
        }
        return torch.stack(list(parts.values())).sum(), {
            "subject": parts["subject"].item(),
            "corner": parts["corner0"].item(),
        }

    for _ in recipe.run(model, loss, name):
        pass
    tensors = {k: v for k, v in model.state_dict().items() if v.is_floating_point()}
    save_half(recipe.out / "model", "model.safetensors", tensors)
    card = {"steps": len(recipe.losses), "seed": seed, "folds": world.FOLDS[name], "law": 1}
    (recipe.out / "model" / "training.json").write_text(json.dumps(card, indent=2) + "\n")
    return recipe.losses
