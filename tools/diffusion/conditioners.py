"""Conditioners: what enters a generator beside the text, as a change of its conditioning.

A `Conditioner` takes the encoded text and named tensors and gives conditioning of the same kind, so that any pipeline
which takes prompt embeddings can be controlled. `EmotionConditioner` maps a target emotion to residuals on the text
embeddings and, where asked for, extra tokens; its file keeps the name "emotion tokens".

How emotion enters. Each row of prompt embeddings E (L, D) becomes

    E' = E + U silu(M silu((1 + g(h)) * N(norm(E)) + s(h))),     pooled' = pooled + P silu(h + Q(norm(pooled))),
    h = trunk(valence, arousal, F mean(norm(E)))

with N: D → r, M: r → r and U: r → D; U and P start at zero. So an untrained module returns its input unchanged and
training starts at the base model *exactly*. Tokens that are merely appended cannot give that: in softmax attention a
further token takes attention away from the others whatever it holds, and stock pipelines have no attention bias to
silence it. Nothing is lost: text encoders pad prompts to a fixed length, the padding takes part in attention and its
embeddings differ by position, so that the residual can turn it into words for the emotion. That takes two layers: a
residual linear in E leaves more of the way from a prompt's embeddings to those of the same prompt with words added.

The trunk reads valence and arousal as plain numbers and as three octaves of sines and cosines (Tancik et al. 2020,
arXiv 2006.10739), since neighbouring wishes may want different words. Beside them it reads a few numbers of the whole
prompt (F, linear): a graveyard needs more than a garden to feel as glad, so that the way to a wish depends on where
the prompt stands. They are few, so that some hundred prompts teach what holds for others.

Where what may be said is a list (`choices` > 0), h is a mean of so many learned vectors, weighted by what the trunk
finds likely. Between two wishes that want different words stands then a choice, sharp once it is learned, and not a
blend of both, which would show neither.

Extra tokens can still be asked for (`tokens` > 0), and then as many null tokens go to the negative branch,
which must keep the same length. They start as copies of the prompt's last token, most often padding: near the
base, but not exactly at it.

A target without numbers, or a scale of 0, leaves everything out: no residual and no extra tokens.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import silu

from ...domain import HIGH, EmotionTarget, UserError, first_line
from .families import Conditioning

#: Octaves of the trunk's waves; the first has a period of 12 points.
_BANDS = 3

#: Numbers that the trunk hears of the prompt.
_HEARD = 8


def points(targets: Sequence[EmotionTarget | None], device: torch.device | str | None = None) -> Tensor:
    """Targets as numbers.

    Returns:
        Float32, shape (B, 2): valence and arousal in [-3, 3], NaN where an axis is not wanted.
    """
    rows = [(None, None) if target is None else target.point for target in targets]
    nan = float("nan")
    return torch.tensor([[nan if x is None else x for x in row] for row in rows], device=device).reshape(
        -1, 2
    )


class Conditioner(nn.Module, ABC):
    """A module that changes conditioning by named tensors; untrained, it changes nothing.

    Attributes:
        inputs: Names of the tensors it reads.
        config: The arguments it was made with; they are saved in the file's header.
        kind: What its file holds, for people.
        header: Name of the file's header entry.
        version: Of the architecture.
    """

    inputs: ClassVar[tuple[str, ...]]
    kind: ClassVar[str]
    header: ClassVar[str]
    version: ClassVar[int]
    config: dict[str, Any]

    @abstractmethod
    def forward(self, embeds: Conditioning, inputs: Mapping[str, Tensor], scale: float = 1.0) -> Conditioning:
        """The changed conditioning; `embeds` as they are at scale 0."""

    @abstractmethod
    def null(self, embeds: Conditioning) -> Conditioning:
        """The negative branch beside `forward`, of the same length L."""

    @abstractmethod
    def fits(self, embeds: Conditioning) -> bool:
        """Whether a model's embeddings have this module's widths."""

    @property
    def about(self) -> dict[str, Any]:
        """Version of the architecture, and arguments: what weights have to agree on."""
        return {"version": self.version, **self.config}

    def save(self, path: Path) -> None:
        """Write weights as safetensors; version and arguments go into the header, the same ones every time."""
        state = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
        # One entry, since safetensors writes several in random order.
        save_file(state, path, metadata={self.header: json.dumps(self.about)})

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a file that `save` wrote; on the CPU, in eval mode.

        Raises:
            UserError: Not such a file, or written by another version.
        """
        try:
            with safe_open(path, framework="pt") as file:
                header = json.loads((file.metadata() or {}).get(cls.header, "{}"))
                state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError, ValueError) as error:
            raise UserError(f"{path} is not a readable safetensors file: {error}") from error
        if header.pop("version", None) != cls.version:
            raise UserError(f"{path} holds no {cls.kind} of version {cls.version}: distil again")
        try:
            module = cls(**header)
            module.load_state_dict(state)
        except (TypeError, RuntimeError) as error:
            raise UserError(f"{path} is damaged: {first_line(error)}") from error
        return module.eval()


class EmotionConditioner(Conditioner):
    """Adds valence and arousal to prompt embeddings; reads the input "target".

    Attributes:
        tokens: Extra tokens appended to the prompt, 0 by default.
    """

    inputs: ClassVar = ("target",)
    kind = "emotion tokens"
    header = "emoloop.emotion_tokens"
    version = 3

    def __init__(
        self,
        dim: int,
        pooled_dim: int = 0,
        tokens: int = 0,
        rank: int = 32,
        hidden: int = 128,
        choices: int = 0,
    ) -> None:
        """Make an untrained module.

        Args:
            dim: Width D of the prompt embeddings.
            pooled_dim: Width P of the pooled embeddings; 0 for models that have none.
            tokens: Extra tokens K.
            rank: Width r of the residual's layers; 0 leaves the rows as they are and changes the pooled embeddings
                alone, which reach the denoiser by its modulation.
            hidden: Width of the trunk.
            choices: Vectors to choose among; 0 leaves h free.
        """
        super().__init__()
        self.config = dict(
            dim=dim, pooled_dim=pooled_dim, tokens=tokens, rank=rank, hidden=hidden, choices=choices
        )
        self.tokens = tokens
        if not rank and (tokens or not pooled_dim):
            raise UserError("emotion tokens of rank 0 speak by pooled embeddings alone: this model has none")
        self.norm = nn.LayerNorm(dim, elementwise_affine=False)
        self.hear = nn.Linear(dim, _HEARD)
        self.trunk = nn.Sequential(
            nn.Linear(4 + 4 * _BANDS + _HEARD, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU()
        )
        if rank:
            self.down = nn.Linear(dim, rank, bias=False)
            self.gate = nn.Linear(hidden, rank)
            self.shift = nn.Linear(hidden, rank)
            self.mix = nn.Linear(rank, rank)
            self.up = nn.Linear(rank, dim, bias=False)
            nn.init.zeros_(self.up.weight)
        if pooled_dim:
            self.pooled_norm = nn.LayerNorm(pooled_dim, elementwise_affine=False)
            self.pooled_down = nn.Linear(pooled_dim, hidden)
            self.pooled = nn.Linear(hidden, pooled_dim)
            nn.init.zeros_(self.pooled.weight)
            nn.init.zeros_(self.pooled.bias)
        if choices:
            self.choose = nn.Linear(hidden, choices)
            self.chosen = nn.Parameter(torch.randn(choices, hidden) / 2)
        if tokens:
            self.extra = nn.Linear(hidden, tokens * rank)
            self.null_extra = nn.Parameter(torch.zeros(tokens, rank))
            self.up_extra = nn.Linear(rank, dim, bias=False)
            nn.init.zeros_(self.up_extra.weight)

    @classmethod
    def for_embeds(cls, embeds: Conditioning, **kwargs: Any) -> EmotionConditioner:
        """A module of the widths that a model's embeddings have; `kwargs` as for the constructor."""
        pooled = embeds.pooled
        return cls(embeds.prompt.shape[-1], 0 if pooled is None else pooled.shape[-1], **kwargs)

    def fits(self, embeds: Conditioning) -> bool:
        """Whether a model's embeddings have this module's widths."""
        pooled = 0 if embeds.pooled is None else embeds.pooled.shape[-1]
        return (embeds.prompt.shape[-1], pooled) == (self.config["dim"], self.config["pooled_dim"])

    def forward(self, embeds: Conditioning, inputs: Mapping[str, Tensor], scale: float = 1.0) -> Conditioning:
        """Add the emotion.

        Args:
            embeds: Encoded prompts: (B, L, D) and (B, P).
            inputs: `target`: valence and arousal, (B, 2), NaN where an axis is not wanted; see `points`. A row of
                NaN alone gets no residual and, with K > 0, null tokens, since a batch has one length.
            scale: Strength of the residual and of what the extra tokens say; 0 returns `embeds` as they are.

        Returns:
            Embeddings of the same dtype, (B, L + K, D) and (B, P).
        """
        if scale == 0:
            return embeds
        wanted = inputs["target"]
        present = (~wanted.isnan().all(-1)).to(self.hear.weight.dtype)[:, None] * scale
        normed, h = self._hear(embeds, wanted)
        if self.config["choices"]:
            h = self.choose(h).softmax(-1) @ self.chosen
        prompt = embeds.prompt
        if self.config["rank"]:
            low = self.down(normed)
            low = silu((1 + self.gate(h))[:, None] * low + self.shift(h)[:, None])
            residual = self.up(silu(self.mix(low))) * present[..., None]
            prompt = prompt + residual.to(prompt.dtype)
        pooled = embeds.pooled
        if pooled is not None:
            both = silu(h + self.pooled_down(self.pooled_norm(pooled.to(h.dtype))))
            pooled = pooled + (self.pooled(both) * present).to(pooled.dtype)
        if self.tokens:
            spoken = self.extra(h).unflatten(-1, (self.tokens, -1)) * present[..., None]
            silent = self.null_extra * (1 - (present != 0).to(h.dtype))[..., None]
            prompt = self._append(prompt, embeds.prompt, spoken + silent)
        return replace(embeds, prompt=prompt, pooled=pooled)

    def choice(self, embeds: Conditioning, wanted: Tensor) -> Tensor:
        """Logits of the choice, (B, choices), for embeddings and a target (B, 2)."""
        return self.choose(self._hear(embeds, wanted)[1])

    def _hear(self, embeds: Conditioning, wanted: Tensor) -> tuple[Tensor, Tensor]:
        """Normed embeddings, and what the trunk makes of prompt and wish."""
        missing = wanted.isnan()
        numbers = torch.where(missing, 0.0, wanted) / HIGH
        angles = [numbers * (torch.pi * 2**band / 2) for band in range(_BANDS)]
        waves = [wave for angle in angles for wave in (angle.sin(), angle.cos())]
        normed = self.norm(embeds.prompt.to(self.hear.weight.dtype))
        wish = torch.cat([numbers, missing, *waves], -1).to(normed.dtype)
        return normed, self.trunk(torch.cat([wish, self.hear(normed.mean(1))], -1))

    def null(self, embeds: Conditioning) -> Conditioning:
        """The negative branch beside `forward`: null tokens where there are extra ones, nothing else.

        Args:
            embeds: Encoded negative prompts: (B, L, D) and (B, P).
        """
        if not self.tokens:
            return embeds
        silent = self.null_extra.expand(len(embeds.prompt), -1, -1)
        return replace(embeds, prompt=self._append(embeds.prompt, embeds.prompt, silent))

    def _append(self, prompt: Tensor, source: Tensor, low: Tensor) -> Tensor:
        extra = source[:, -1:] + self.up_extra(low).to(source.dtype)
        return torch.cat([prompt, extra], dim=1)
