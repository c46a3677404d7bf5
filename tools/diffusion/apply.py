"""A distilled target in anybody's own diffusers pipeline: `emoloop.apply(pipe, adapter, target)`.

The LoRA alone has no target. So the pipeline's class is replaced by a subclass of the same name, whose `encode_prompt`
adds the target to whatever the pipeline's own call encodes (or is given as embeddings): all of the call's arguments
keep their meaning. Outside of a call `encode_prompt` is as it was.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cache, wraps
from pathlib import Path
from typing import Any

from ...domain import EmotionTarget, UserError, read_target
from .adapter import Adapter, known, load_artifact, unload
from .families import Conditioning, family_of
from .layers import strength
from .visual import VisualControl


class Applied:
    """An adapter and a target on a pipeline; a context manager that takes them off at its end.

    Attributes:
        pipe: The pipeline.
        adapter: The adapter as it was bound.
    """

    def __init__(self, pipe: Any, adapter: Adapter, target: EmotionTarget | Mapping[str, Any] | None) -> None:
        self.pipe, self.adapter, self.target = pipe, adapter, target

    def __repr__(self) -> str:
        return f"Applied({self.adapter.path} on {type(self.pipe).__name__}, {self.target!r})"

    @property
    def target(self) -> EmotionTarget | None:
        """What the next pictures shall make people feel; may be changed, None leaves it to the LoRA."""
        return self._target

    @target.setter
    def target(self, target: EmotionTarget | Mapping[str, Any] | None) -> None:
        self._target = None if target is None else read_target(target)

    @property
    def current(self) -> Adapter:
        """The adapter at the strength that its LoRA has now: `set_adapters`, `disable_lora` and the like move both."""
        return replace(self.adapter, scale=strength(self.pipe, self.adapter.name))

    @property
    def id(self) -> str | None:
        """For the record: the adapter's id and the target; None where it is switched off."""
        told = "" if self.target is None else self.target.model_dump_json(exclude_none=True)
        adapter = self.current.id
        return None if adapter is None else f"{adapter}{told}"

    def remove(self) -> None:
        """Take the adapter off; with the last one the pipeline is as it was, to the bit."""
        if known(self.pipe).get(self.adapter.name) is self:
            unload(self.pipe, self.adapter)
        replaced = isinstance(self.pipe, _Emotional)
        if replaced and not _applied(self.pipe):
            self.pipe.__class__ = type(self.pipe).__base__

    def __enter__(self) -> Applied:
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()


def apply(
    pipe: Any,
    adapter: Path | str,
    target: EmotionTarget | Mapping[str, Any] | None = None,
    *,
    scale: float = 1.0,
    visual_scale: float = 1.0,
    visual_guidance: float = 1.0,
    visual_negative: EmotionTarget | None = None,
    negative: bool = False,
) -> Applied:
    """Put an adapter and a target on a diffusers pipeline; its plain call makes the pictures then.

        emoloop.apply(pipe, "runs/opd", emoloop.EmotionTarget(valence=2, arousal=-1))
        pipe("a dog by the sea").images[0]

    What is on the pipeline already stays, and several adapters add up. The call's arguments are the pipeline's own: for
    the picture of `emoloop run --adapter` give the same steps, guidance, size and batch (`Applied.adapter.guidance` is
    the guidance that the adapter was made for).

    Args:
        pipe: A pipeline of a supported class. Left as it was when this fails.
        adapter: A distilled artifact, or any LoRA, which knows no target.
        target: The wanted emotion.
        scale: Strength; 0 checks the adapter and changes nothing.
        visual_scale: Strength of the adapter's visual prompts, where it has some; 0 leaves them out.
        visual_guidance: How far guidance goes along what they change, as a multiple of the text's (`VisualControl`).
        visual_negative: The emotion whose visual prompt the negative branch gets.
        negative: Whether the adapter serves the negative branch alone, as one of reversed preferences does
            (`emoloop distill npo`).

    Returns:
        What takes it off again: `with emoloop.apply(...):`, or its `remove()`.

    Raises:
        UserError: Nothing there, not a LoRA, made for another model, no target, or a second one
            with visual prompts or for the negative branch.
    """
    target = None if target is None else read_target(target)
    visual = VisualControl(visual_scale, visual_guidance, visual_negative)
    applied = Applied(
        pipe, load_artifact(pipe, adapter, scale=scale, visual=visual, negative=negative), target
    )
    if applied.adapter.id is not None:
        known(pipe)[applied.adapter.name] = applied
        if not isinstance(pipe, _Emotional):
            pipe.__class__ = _emotional(type(pipe))
    return applied


class _Emotional:
    """Marks a pipeline whose class was replaced."""


def _applied(pipe: Any) -> list[Applied]:
    return [it for it in known(pipe).values() if isinstance(it, Applied)]


@cache
def _emotional(base: Any) -> Any:
    class Emotional(base, _Emotional):
        @wraps(base.__call__)
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            self._encodings = 0
            try:
                return super().__call__(*args, **kwargs)
            finally:
                del self._encodings

        @wraps(base.encode_prompt)
        def encode_prompt(self, *args: Any, **kwargs: Any) -> Any:
            encoded = super().encode_prompt(*args, **kwargs)
            if "_encodings" not in self.__dict__:
                return encoded
            self._encodings += 1
            # FLUX encodes its negative branch by a second call.
            return _told(self, encoded, positive=self._encodings == 1)

        def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
            # diffusers writes the layers by the names that they have under a LoRA, and draws new ones at loading.
            raise UserError(
                "the pipeline has an adapter on it, and would load without these layers: remove it first"
            )

    for name in ("__name__", "__qualname__", "__module__", "__doc__"):
        setattr(Emotional, name, getattr(base, name))
    return Emotional


def _told(pipe: Any, encoded: Any, positive: bool) -> tuple[Any, ...]:
    """What `encode_prompt` gave, with every target on the pipeline added."""
    family = family_of(pipe)
    named: dict[str, Any] = family.named(encoded)
    applied = [(it.current, it.target) for it in _applied(pipe)]
    for sign in ("", "negative_"):
        if named.get(f"{sign}prompt_embeds") is None:
            continue
        embeds: Conditioning = family.conditioning(named, sign)
        for adapter, target in applied:
            embeds = adapter.condition(embeds, target, negative=bool(sign) or not positive)
        named[f"{sign}prompt_embeds"], named[f"{sign}pooled_prompt_embeds"] = embeds.carrier, embeds.pooled
    if "text_ids" in named:
        named["text_ids"] = named["text_ids"].new_zeros(named["prompt_embeds"].shape[1], 3)
    return tuple(named[name] for name in family.named(encoded))
