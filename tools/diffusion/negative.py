"""An adapter that serves the negative branch of guidance (Diffusion-NPO, arXiv 2505.11245).

Guidance steers from what the negative branch says to what the positive one says. A model of reversed preferences
(`rl/objectives/npo.py`) says there what people don't want, for the very wish that is asked for:

    ε = ε_n(∅, e) + g [ε_p(text, e) - ε_n(∅, e)]

ε_p is the pipeline as it is without, with any other adapter; ε_n the same plus this adapter's LoRA at its strength, as
in the paper's ω⁻ = θ + αη + βδ with α = 1. Both branches are mostly rows of one batch, so the LoRA is silenced row by
row: what it adds is multiplied by 0 in rows of the positive branch, whose bits stay. Which rows are negative travels
inside the prompt embeddings (`Conditioning.carrier`).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .families import Family
from .layers import layers_of


class NegativeBranch:
    """Lets a LoRA speak in the negative branch's rows alone, until it is removed; elsewhere it is silent.

    Args:
        family: The pipeline's.
        name: The LoRA's name there.
    """

    def __init__(self, family: Family, name: str) -> None:
        self._dim: int = family.encode("").prompt.shape[-1]
        self._rows: Tensor | None = None
        denoiser = family.module
        self._hooks = [
            denoiser.register_forward_pre_hook(self._part, with_kwargs=True, prepend=True),
            denoiser.register_forward_hook(self._forget, always_call=True),
            *(it.lora_B[name].register_forward_hook(self._silence) for it in layers_of(family.pipe, name)),
        ]

    def remove(self) -> None:
        """Leave the denoiser as it was."""
        for hook in self._hooks:
            hook.remove()

    def _part(self, _: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        carrier = kwargs["encoder_hidden_states"]
        if carrier.shape[-1] == self._dim:
            return None
        self._rows = carrier[:, 0, -1]
        return args, {**kwargs, "encoder_hidden_states": carrier[..., :-1].contiguous()}

    def _forget(self, *_: Any) -> None:
        self._rows = None

    def _silence(self, _: Any, __: Any, added: Tensor) -> Tensor:
        rows = added.new_zeros(1) if self._rows is None else self._rows.to(added)
        return added * rows.reshape(-1, *(1,) * (added.ndim - 1))
