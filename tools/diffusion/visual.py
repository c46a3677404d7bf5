"""Visual prompts: tokens of remembered pictures that the denoiser attends to beside the text (MC-Diffusion).

Emotion-Director (arXiv 2512.19479) guides a diffusion model by text and by visual tokens that are retrieved for the
wanted emotion (`tools/bank`). Its injection is not published but for file names; this is a reconstruction by decoupled
attention (IP-Adapter, arXiv 2308.06721). In each layer in which the image reads the text,

    h = Attn(x, text) + λ O softmax(Q K_v(p)ᵀ / √d) V_v(p),    Q the layer's own query of the image,

with K_v, V_v and O new and O zero at the start: an untrained module leaves the base's output as it is, and O gets a
gradient from the first step. The tokens p are the top k bank entries of the emotion, by cosine of the prompt's own text
feature to the entries' text centres, through a projection and one block of self-attention. The entries' looks are
weights, initialised by the bank's features and trained, as in the published file list.

λ travels with the tokens, a number per row, so that rows with and without a visual prompt share a batch; the tokens
travel inside the prompt embeddings (`Conditioning.carrier`), so that pipelines need to know nothing. `VisualBridge`
takes them out before the denoiser, and can be taken off without a trace.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize, scaled_dot_product_attention

from ...domain import EmotionTarget, UserError
from .conditioners import Conditioner
from .families import Conditioning, Family

if TYPE_CHECKING:
    from ..bank.bank import Bank

_HEADS = 4


@dataclass(frozen=True)
class VisualControl:
    """How a visual prompt is used when sampling.

    Attributes:
        scale: Strength λ; 0 leaves it out.
        guidance: How far guidance goes along what the visual prompt changes, as a multiple r of the text's guidance g:
            ε(∅) + g [ε(text) - ε(∅)] + g r [ε(text, visual) - ε(text)]. 1 costs nothing, others a third pass.
        negative: The emotion whose visual prompt the negative branch gets; None gives it none.
    """

    scale: float = 1.0
    guidance: float = 1.0
    negative: EmotionTarget | None = None

    def __str__(self) -> str:
        """What differs from the default, for the record; "" for the default."""
        told = [
            f"{name}={value.model_dump_json(exclude_none=True) if name == 'negative' else format(value, 'g')}"
            for name, value in vars(self).items()
            if value != getattr(VISUAL, name)
        ]
        return f"[visual {','.join(told)}]" if told else ""


#: As trained, without a third pass.
VISUAL = VisualControl()


def spoken(embeds: Conditioning) -> Tensor:
    """The text feature of encoded prompts, (B, d_t): the pooled embeddings, or the last row, which has read all."""
    return (embeds.prompt[:, -1] if embeds.pooled is None else embeds.pooled).float()


class VisualAttention(nn.Module):
    """The second attention of one layer: keys and values of the visual tokens, and a zero output projection."""

    def __init__(self, width: int, hidden: int, inner: int) -> None:
        super().__init__()
        self.to_k = nn.Linear(width, inner, bias=False)
        self.to_v = nn.Linear(width, inner, bias=False)
        self.out = nn.Linear(inner, hidden, bias=False)
        nn.init.zeros_(self.out.weight)

    def forward(self, attention: Any, hidden: Tensor, visual: Tensor) -> Tensor:
        """What the image (B, N, hidden) reads in the tokens (B, K, width + 1), whose last column is λ."""
        visual = visual.to(self.out.weight.dtype)
        tokens, strength = visual[..., :-1], visual[:, :1, -1:]
        query, key, value = (
            it.unflatten(-1, (attention.heads, -1)).transpose(1, 2)
            for it in (attention.to_q(hidden), self.to_k(tokens), self.to_v(tokens))
        )
        if attention.norm_q is not None:
            query = attention.norm_q(query)
        read = scaled_dot_product_attention(query.to(key.dtype), key, value)
        return (strength * self.out(read.transpose(1, 2).flatten(2))).to(hidden.dtype)


class VisualConditioner(Conditioner):
    """Finds a visual prompt for prompt and target, and holds the attention that reads it."""

    inputs: ClassVar = ("target",)
    kind = "visual prompts"
    header = "emoloop.visual_prompts"
    version = 1

    texts: Tensor
    points: Tensor
    emotion: Tensor

    def __init__(
        self,
        dim: int,
        text_dim: int,
        visual_dim: int,
        entries: int,
        emotions: int,
        layers: list[list[int]],
        k: int = 4,
        width: int = 128,
        bank: str = "",
    ) -> None:
        """Make a module without a bank's content; see `of_bank`.

        Args:
            dim: Width D of the prompt embeddings.
            text_dim: Width of the prompt's text feature (`spoken`).
            visual_dim: Width of the bank's visual features.
            entries: Entries of the bank.
            emotions: Its emotions.
            layers: (hidden, inner) widths of each attention layer that reads the tokens.
            k: Tokens of a visual prompt.
            width: Their width.
            bank: Hash of the bank.
        """
        # Loads for a second or two, and most adapters have no visual prompts.
        from diffusers.models.attention import BasicTransformerBlock

        super().__init__()
        self.config = dict(
            dim=dim, text_dim=text_dim, visual_dim=visual_dim, entries=entries, emotions=emotions, layers=layers,
            k=k, width=width, bank=bank,
        )  # fmt: skip
        self.looks = nn.Parameter(torch.zeros(entries, visual_dim))
        for name, shape in {"texts": (entries, text_dim), "points": (emotions, 2)}.items():
            self.register_buffer(name, torch.zeros(shape))
        self.register_buffer("emotion", torch.zeros(entries, dtype=torch.int64))
        self.project = nn.Sequential(
            nn.Linear(visual_dim, 4 * width),
            nn.LayerNorm(4 * width),
            nn.GELU(),
            nn.Linear(4 * width, width),
            nn.LayerNorm(width),
        )
        self.mix = BasicTransformerBlock(width, _HEADS, width // _HEADS)
        self.layers = nn.ModuleList(VisualAttention(width, *widths) for widths in layers)

    @classmethod
    def of_bank(cls, bank: Bank, family: Family, k: int = 4, width: int = 128) -> VisualConditioner:
        """An untrained module with a bank's entries, for a model.

        Raises:
            UserError: The bank's text features are not the model's own, or `width` does not divide into heads.
        """
        embeds = family.encode("")
        text_dim = spoken(embeds).shape[1]
        if bank.text.shape[1] != text_dim or not bank.head.text_encoder.startswith("generator="):
            raise UserError(
                f"the bank's text features are of {bank.head.text_encoder} ({bank.text.shape[1]} numbers); a visual "
                f"prompt is found by the generator's own ({text_dim}): emoloop bank build --text generator=MODEL"
            )
        if width % _HEADS:
            raise UserError(f"policy.visual_width {width}: a multiple of {_HEADS} is wanted")
        widths = [[it.query_dim, it.inner_dim] for it in _attentions(family)]
        module = cls(
            embeds.prompt.shape[-1], text_dim, bank.visual.shape[1], len(bank.visual), len(bank.head.points), widths,
            min(k, int(torch.tensor(bank.emotion).bincount().max())), width, bank.sha256,
        )  # fmt: skip
        looks = torch.tensor(bank.visual)
        state = {
            "looks": (looks - looks.mean(0)) / looks.std(0).clamp_min(1e-6),
            "texts": torch.tensor(bank.text),
            "points": torch.tensor(bank.head.points),
            "emotion": torch.tensor(bank.emotion),
        }
        module.load_state_dict(state, strict=False)
        return module

    @property
    def shape(self) -> tuple[int, int]:
        """(K, W) of a visual prompt, λ included."""
        return self.config["k"], self.config["width"] + 1

    def fits(self, embeds: Conditioning) -> bool:
        """Whether a model's embeddings have this module's widths."""
        widths = embeds.prompt.shape[-1], spoken(embeds).shape[-1]
        return widths == (self.config["dim"], self.config["text_dim"])

    def retrieve(self, embeds: Conditioning, wanted: Tensor) -> Tensor:
        """The entries of a prompt's visual prompt.

        Args:
            embeds: Encoded prompts.
            wanted: (B, 2) as `conditioners.points` gives them.

        Returns:
            Indices (B, K); an emotion with fewer entries repeats the nearest.
        """
        away = (self.points[self.emotion] - wanted[:, None]).square().nansum(-1)
        # The nearest emotion's entries: all that are as near as the nearest.
        mine = away <= away.amin(1, keepdim=True)
        cosines = normalize(spoken(embeds), dim=-1) @ self.texts.T
        found = cosines.masked_fill(~mine, -torch.inf).topk(self.config["k"], dim=1)
        return found.indices.where(found.values.isfinite(), found.indices[:, :1])

    def forward(self, embeds: Conditioning, inputs: Mapping[str, Tensor], scale: float = 1.0) -> Conditioning:
        """Put the visual prompt of each row beside its text.

        Args:
            embeds: Encoded prompts, not yet changed by another conditioner: they are what is looked up.
            inputs: `target`, (B, 2). A row of NaN alone gets a silent visual prompt (λ = 0).
            scale: λ; 0 returns `embeds` as they are.
        """
        if scale == 0:
            return embeds
        wanted = inputs["target"]
        tokens = self.mix(self.project(self.looks[self.retrieve(embeds, wanted)]))
        strength = scale * (~wanted.isnan().all(1)).to(tokens.dtype)
        return replace(
            embeds, visual=torch.cat([tokens, strength[:, None, None].expand(*tokens.shape[:2], 1)], -1)
        )

    def null(self, embeds: Conditioning) -> Conditioning:
        """The negative branch: a silent visual prompt."""
        return replace(embeds, visual=embeds.prompt.new_zeros(len(embeds), *self.shape))


class VisualBridge:
    """Hands visual prompts to the attention layers of a denoiser, until it is removed.

    A pre-hook parts the carrier into text and tokens; each attention layer's processor is wrapped by one that adds
    what `VisualAttention` reads. Without tokens both pass everything through as it is.

    Args:
        family: The pipeline's.
        module: Whose tokens and layers; may be replaced by another of the same widths.
        guidance: As `VisualControl.guidance`.

    Raises:
        UserError: The module was made for another model, or the denoiser has a bridge.
    """

    def __init__(self, family: Family, module: VisualConditioner, guidance: float = 1.0) -> None:
        self.module, self.guidance = module, guidance
        self._kwargs = family.attention_kwargs
        self._attentions = _attentions(family)
        if [[it.query_dim, it.inner_dim] for it in self._attentions] != module.config["layers"]:
            raise UserError(
                f"the visual prompts are made for another model than this {type(family.pipe).__name__}"
            )
        if any(isinstance(it.processor, _Decoupled) for it in self._attentions):
            raise UserError("the pipeline has an adapter with visual prompts already: remove that one first")
        for index, attention in enumerate(self._attentions):
            attention.set_processor(_Decoupled(attention.processor, self, index))
        denoiser = family.module
        self._hooks = [
            denoiser.register_forward_pre_hook(self._part, with_kwargs=True),
            # In front of what forgets which rows are negative: its further pass has the same rows.
            denoiser.register_forward_hook(self._guide, with_kwargs=True, prepend=True),
        ]

    def remove(self) -> None:
        """Leave the denoiser as it was."""
        for hook in self._hooks:
            hook.remove()
        for attention in self._attentions:
            attention.set_processor(attention.processor.base)

    def _part(self, _: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        carrier, dim = kwargs["encoder_hidden_states"], self.module.config["dim"]
        k, width = self.module.shape
        if carrier.shape[-1] == dim:
            return None
        visual = carrier[..., dim:].flatten(1)[:, : k * width].unflatten(1, (k, width))
        more = {**(kwargs.get(self._kwargs) or {}), _TOKENS: visual}
        # Contiguous, as an encoder's own embeddings are, so that the text keeps its bits.
        return args, {
            **kwargs,
            "encoder_hidden_states": carrier[..., :dim].contiguous(),
            self._kwargs: more,
        }

    def _guide(self, denoiser: Any, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        more = kwargs.get(self._kwargs) or {}
        if self.guidance == 1 or _TOKENS not in more:
            return None
        unseen = {name: value for name, value in more.items() if name != _TOKENS}
        without = denoiser(*args, **{**kwargs, self._kwargs: unseen or None})
        return (without[0] + self.guidance * (output[0] - without[0]), *output[1:])


#: The one argument that diffusers' processors that don't know it pass over in silence.
_TOKENS = "ip_hidden_states"


class _Decoupled:
    """An attention processor that adds the visual tokens' part to another's output."""

    def __init__(self, base: Any, bridge: VisualBridge, index: int) -> None:
        self.base, self._bridge, self._index = base, bridge, index

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        *args: Any,
        ip_hidden_states: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        out = self.base(attn, hidden_states, *args, **kwargs)
        if ip_hidden_states is None:
            return out
        seen = self._bridge.module.layers[self._index](attn, hidden_states, ip_hidden_states)
        return (out[0] + seen, *out[1:]) if isinstance(out, tuple) else out + seen


def _attentions(family: Family) -> list[Any]:
    """The attention layers in which the image reads the text, in order."""
    pattern = re.compile(family.text_attention)
    return [module for name, module in family.module.named_modules() if pattern.fullmatch(name)]
