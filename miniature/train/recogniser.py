"""Recipe of the judge's and the guard's recogniser: a small residual network on rendered scenes.

The two differ in seed and in the compositions they see. Pictures are spoiled as a generator would spoil them,
so that they also read what comes out of one.
"""

from __future__ import annotations

import json

import numpy as np
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from .. import law, world
from ..judge import Recogniser, labels
from .common import Loss, Recipe, draw, fitted_codec, spoil


def train(recipe: Recipe, name: str) -> None:
    """Train a recogniser and write it to `recipe.out / "model"`.

    Args:
        recipe: The run.
        name: "judge" or "guard": which compositions it sees, and its seed.
    """
    seed = recipe.seed + {"judge": 1000, "guard": 2000}[name]
    torch.manual_seed(seed)
    codec = fitted_codec(seed)
    model = Recogniser(32 if name == "judge" else 28).to(recipe.device)
    model.train()
    print(f"parameters: {sum(p.numel() for p in model.parameters()):,}")

    def loss(step: int) -> Loss:
        rng = np.random.default_rng([seed, step])
        scenes, pixels = draw(rng, recipe.batch, world.FOLDS[name])
        out = model(spoil(rng, codec, pixels).to(recipe.device))
        truth = [labels(scene) for scene in scenes]
        parts = {
            key: F.cross_entropy(
                out[key].float(), torch.tensor([t[key] for t in truth], device=recipe.device)
            )
            for key in truth[0]
        }
        metrics = {"subject": parts["subject"].item(), "corner": parts["corner0"].item()}
        return torch.stack(list(parts.values())).sum(), metrics

    recipe.run(model, loss, name)
    folder = recipe.out / "model"
    folder.mkdir(parents=True, exist_ok=True)
    # The counters of batch norm are whole numbers and only matter in training.
    tensors = {k: v.half().cpu() for k, v in model.state_dict().items() if v.is_floating_point()}
    save_file(tensors, folder / "model.safetensors")
    card = {"steps": len(recipe.losses), "seed": seed, "folds": world.FOLDS[name], "law": law.VERSION}
    (folder / "training.json").write_text(json.dumps(card, indent=2) + "\n")
