"""A start for the emotion tokens that costs no pass of the network.

Where the student hears a neutral prompt and a target and the teacher a refined prompt, both in the end condition the
same network on embeddings. So the tokens are first taught on embeddings alone,

    L = ||E'(neutral, target) - E(refined)||² / ||E(neutral) - E(refined)||²,   and the same of the pooled ones,

which takes minutes where the objective takes many. The rows of E(refined) lie as `Family.added_last` has them: what
was added stands in the same rows behind every prompt. New tokens that choose among phrases are also told which phrase
it is (cross-entropy). What is left, what the network makes of it, is the objective's. The tokens start as what they
are, so that a second round goes on from its first; what its log calls phrase 3 is not what the first round's did, so
that the choice is then left to the text.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ..tools.diffusion.conditioners import EmotionConditioner
from ..tools.diffusion.families import Conditioning
from .objectives.base import Batch

#: What an example has to have.
TEXT = frozenset({"prompt", "refined", "target"})

#: Examples in one step, many since they are cheap, and AdamW's rate at the start: the loss has no unit.
BATCH, RATE = 64, 2e-3

#: Weight of the choice: enough to make it sharp, and little beside the way that is left.
CHOICE = 0.3


def text_loss(tokens: EmotionConditioner, batch: Batch) -> Tensor:
    """The loss above.

    Args:
        tokens: In training.
        batch: `prompt`, `added` and `target`, and `phrase` for tokens that choose among as many.

    Returns:
        Scalar, without the choice's part 2 for tokens that do nothing (1 for models without pooled embeddings); 0
        for perfect ones.
    """
    told: Conditioning = tokens(batch["prompt"], {"target": batch["target"]})
    pairs = [(told.prompt, batch["added"].prompt, batch["prompt"].prompt)]
    if told.pooled is not None:
        pairs.append((told.pooled, batch["added"].pooled, batch["prompt"].pooled))
    losses = [(ours - goal).square().mean() / (start - goal).square().mean() for ours, goal, start in pairs]
    loss = torch.stack(losses).sum()
    if "phrase" in batch:
        loss = loss + CHOICE * cross_entropy(tokens.choice(batch["prompt"], batch["target"]), batch["phrase"])
    return loss


def warm_start(
    tokens: EmotionConditioner,
    batches: Callable[[int], Batch],
    steps: int,
    stop: Callable[[], bool] = lambda: False,
    begun: dict[str, Any] | None = None,
) -> tuple[EmotionConditioner, float, dict[str, Any] | None]:
    """Teach a copy of the tokens.

    Args:
        tokens: Where to start.
        batches: Gives the batch of a step.
        steps: How many.
        stop: Asked before each step whether to break off.
        begun: What an earlier call left when it broke off.

    Returns:
        The taught copy, its mean loss over the last tenth of the steps, and where it broke off what `begun` takes.
    """
    taught = copy.deepcopy(tokens).float().requires_grad_(True)
    optimizer = torch.optim.AdamW(taught.parameters(), lr=RATE, weight_decay=0.0)
    losses: list[float] = []
    if begun is not None:
        taught.load_state_dict(begun["tokens"])
        optimizer.load_state_dict(begun["optimizer"])
        losses = list(begun["losses"])
    for step in range(len(losses), steps):
        if stop():
            left = {"tokens": taught.state_dict(), "optimizer": optimizer.state_dict(), "losses": losses}
            return taught, math.nan, left
        optimizer.param_groups[0]["lr"] = RATE * 0.5 * (1 + math.cos(math.pi * step / steps))
        loss = text_loss(taught, batches(step))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
    last = losses[-max(1, steps // 10) :]
    return taught, sum(last) / len(last), None
