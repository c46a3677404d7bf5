"""`python -m emoloop.miniature.train MODEL`."""

from __future__ import annotations

import argparse
from importlib import import_module
from pathlib import Path

import torch

from .common import Recipe

#: Model → (module, its argument, steps, batch, peak learning rate, largest averaging decay).
RECIPES: dict[str, tuple[str, list[str], int, int, float, float]] = {
    "generator": ("generator", [], 5000, 32, 1.2e-3, 0.998),
    "lvlm": ("lvlm", [], 6000, 32, 1.0e-3, 0.998),
    "lvlm-vision": ("lvlm", ["vision"], 3000, 32, 1.5e-3, 0.998),
    "lvlm-rewriter": ("lvlm", ["rewriter"], 1600, 36, 7.0e-4, 0.998),
    "judge": ("recogniser", ["judge"], 2500, 48, 2.0e-3, 0.995),
    "guard": ("recogniser", ["guard"], 2500, 48, 2.0e-3, 0.995),
}


def main() -> None:
    """Run one recipe."""
    parser = argparse.ArgumentParser(prog="python -m emoloop.miniature.train", description=__doc__)
    parser.add_argument("model", choices=RECIPES)
    folder = "folder for checkpoints and the model (default runs/MODEL)"
    init = "model folder or checkpoint.pt to go on from, with a new schedule"
    parser.add_argument("--out", type=Path, help=folder)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--batch", type=int)
    parser.add_argument("--lr", type=float)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--init", type=Path, help=init)
    parser.add_argument("--bf16", action="store_true", help="forward passes in bfloat16")
    parser.add_argument("--minutes", type=float, help="stop after so many minutes")
    painted = (
        "lvlm, lvlm-vision: painted pictures to learn from too, as `miniature.build critic-data` writes them"
    )
    parser.add_argument("--pictures", type=Path, help=painted)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    module, extra, steps, batch, lr, ema = RECIPES[args.model]
    recipe = Recipe(
        out=args.out or Path("runs") / args.model, steps=args.steps or steps, batch=args.batch or batch,
        lr=args.lr or lr, seed=args.seed, device=args.device, minutes=args.minutes, ema=ema, bf16=args.bf16,
        init=args.init,
    )  # fmt: skip
    import_module(f"{__package__}.{module}").train(
        recipe, *extra, **({"pictures": args.pictures} if args.pictures else {})
    )
    if losses := recipe.losses:
        print(f"loss {losses[0]:.4f} → {sum(losses[-20:]) / len(losses[-20:]):.4f} after {len(losses)} steps")


if __name__ == "__main__":
    main()
