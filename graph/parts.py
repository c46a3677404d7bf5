"""What the nodes of a loop work with, loaded once and shared by all its runs."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import cache, cached_property, partial
from typing import Any

from ..agents.critic import Critic, critic_of
from ..agents.rewriters import Rewriter, load_rewriter
from ..domain import Critique, EmotionTarget, UserError, read_target
from ..events import Critiqued, Event, ImageGenerated, Rewarded
from ..settings import Settings
from ..tools import presets
from ..tools.images.base import Generator, unread_text
from ..tools.images.load import load_generator
from ..tools.lvlm.load import load_lvlm
from ..tools.reward import Reward, load_reward
from ..tools.urls import public
from ..traces.recorder import StoreRecorder, open_recorder
from .knowledge import Knowledge
from .state import read_prompt


@dataclass
class Parts:
    """What the nodes work with; shared by all runs of a loop.

    Attributes:
        generator: Makes the pictures.
        critic: Reads them.
        rewriter: Gives the rewriter of a name in settings.
        reward: Values a reading.
        recorder: The log.
        settings: The resolved settings.
        patient: Whether the chat model retries by itself, so that the graph should not.
        objects: Which of generator, lvlm and reward were handed over as objects: a log cannot name those.
    """

    generator: Generator
    critic: Critic
    rewriter: Callable[[str], Rewriter]
    reward: Reward
    recorder: StoreRecorder
    settings: Settings
    patient: bool = False
    objects: tuple[str, ...] = ()

    @cached_property
    def knowledge(self) -> Knowledge:
        """What the log knows of prompts; another log's may be put in its place."""
        return Knowledge(self.recorder.store, self.generator)

    def snapshot(self, options: dict[str, Any]) -> dict[str, Any]:
        """The settings as a run's first event holds them: resolved, without secrets."""
        dumped = public(self.settings.model_dump(mode="json", exclude={"home", "traces", "service", "ray"}))
        dumped["loop"].update(options)
        return {**dumped, "objects": list(self.objects)} if self.objects else dumped

    def resolved(self, options: dict[str, Any]) -> dict[str, Any]:
        """The options of a run with how many images its rounds have, of how many distinct prompts, out of how many.

        Prompts as asked for, else by the generator's preset, else half as many as images; one where the rewriter has
        but one.
        """
        images, proposals, oversample = (options[key] for key in ("images", "proposals", "oversample"))
        if options["max_images"] is not None:
            images = min(images, options["max_images"])
        own = "generator" in self.objects
        known = {} if own else presets.defaults_if_known(self.settings.generator.model)
        if proposals is None:
            proposals = int(images * known.get("proposals_per_image", 0.5))
        if getattr(self.rewriter(options["rewriter"]), "one_prompt", False):
            proposals = 1
        proposals = max(1, min(proposals, images))
        if oversample is None:
            oversample = known.get("oversample", 1) if proposals > 1 else 1
        return {**options, "images": images, "proposals": proposals, "oversample": oversample}

    def check_same(self, run_id: str, events: list[Event]) -> None:
        """Refuse to mix: what was made, read or valued is not comparable with another model's.

        Raises:
            UserError: The events were made with other models or another reward.
        """
        made = (e for e in events if isinstance(e, ImageGenerated))
        read = (e for e in events if isinstance(e, Critiqued) and isinstance(e.critique, Critique))
        valued = (e for e in events if isinstance(e, Rewarded) and e.value is not None and e.weight is None)
        keys = ("model", "revision", "adapter", "steps", "guidance", "height", "width")
        generator = self.generator.describe()
        for what, before, now in (
            ("", made, {key: generator[key] for key in keys if key in generator}),
            ("critic ", read, {"model": self.critic.model}),
            ("reward ", valued, {"name": self.reward.name, "version": self.reward.version}),
        ):
            first = next(before, None)
            for key, value in now.items() if first else ():
                if (then := getattr(first, key)) != value:
                    raise UserError(
                        f"run {run_id!r} was made with {what}{key} {then}, this loop has {value}: "
                        "resume it with the settings that it began with"
                    )


async def open_parts(settings: Settings, given: Mapping[str, Any], stack: AsyncExitStack) -> Parts:
    """Load models and agents, then open the log; all of it in threads, so that a server's event loop goes on.

    Args:
        settings: The resolved settings.
        given: `generator`, `lvlm` and `reward` as objects, over the settings; None or absent where there is none.
        stack: Closes what was opened here.

    Raises:
        UserError: A model, an adapter, a server or the home cannot be used.
    """
    reward = await asyncio.to_thread(load_reward, given.get("reward") or settings.loop.reward)
    generator = await asyncio.to_thread(_load_generator, given.get("generator"), settings)
    if generator is not given.get("generator"):
        stack.push_async_callback(generator.aclose)
    critic, rewriter = await open_agents(settings, given.get("lvlm"), stack)
    recorder = await asyncio.to_thread(open_recorder, settings)
    stack.push_async_callback(recorder.aclose)
    return Parts(
        generator=generator,
        critic=critic,
        rewriter=rewriter,
        reward=reward,
        recorder=recorder,
        settings=settings,
        patient=given.get("lvlm") is None and settings.lvlm.engine != "embedded",
        objects=tuple(name for name, value in given.items() if value is not None),
    )


def check_chat_model(model: Any) -> None:
    """Refuse at once what no agent could ask.

    Raises:
        UserError: It is neither a chat model nor None.
    """
    if model is not None and not hasattr(model, "ainvoke"):
        raise UserError(f"lvlm {model!r} is no LangChain chat model: it has no ainvoke")


async def open_agents(
    settings: Settings, model: Any, stack: AsyncExitStack, *, images: bool = True
) -> tuple[Critic, Callable[[str], Rewriter]]:
    """Load the chat model, in a thread, and the agents that ask it.

    Args:
        settings: The resolved settings.
        model: A chat model instead of the settings' one, or None.
        stack: Closes what was opened here.
        images: Whether the settings' model must take images.

    Raises:
        UserError: The model, a prompt file or the rewriter cannot be used.
    """
    own = model is None
    check_chat_model(model)
    if own:
        model = await asyncio.to_thread(_load_lvlm, settings, images)
        stack.push_async_callback(asyncio.to_thread, model.close)
    critic, rewriter = await asyncio.to_thread(_agents, model, own, settings)
    await asyncio.to_thread(rewriter, settings.loop.rewriter)
    return critic, rewriter


def _load_generator(spec: Any, settings: Settings) -> Generator:
    return load_generator(settings.generator if spec is None else spec, settings.generator)


def _load_lvlm(settings: Settings, images: bool) -> Any:
    if settings.lvlm.samples > 1 and settings.lvlm.temperature == 0:
        raise UserError(
            "setting lvlm.samples above 1 needs lvlm.temperature above 0: equal answers tell nothing"
        )
    return load_lvlm(settings.lvlm, images=images)


def _agents(model: Any, own: bool, settings: Settings) -> tuple[Critic, Callable[[str], Rewriter]]:
    lvlm, critic = settings.lvlm, critic_of(model, settings.lvlm, own)
    wanted = presets.defaults_if_known(lvlm.model, "lvlm") if own else {}
    prompt = lvlm.rewriter_prompt or wanted.get("rewriter_prompt", "rewriter")
    return critic, cache(partial(load_rewriter, asker=critic.asker, prompt=prompt))


def check_request(parts: Parts, prompt: Any, target: Any) -> tuple[str, EmotionTarget]:
    """Read a request before anything is written for it.

    Raises:
        UserError: The prompt or target is none; or, in strict mode, a word that the generator does not know.
    """
    text, wanted = read_prompt(prompt), read_target(target)
    if parts.settings.generator.strict and (message := unknown_words(parts.generator, text)):
        raise UserError(message)
    return text, wanted


def unknown_words(generator: Generator, prompt: str, said: str = "") -> str | None:
    """One line that names the words which the generator does not know, with the nearest it does; or None.

    Words that `said` names in quotes are left out.
    """
    unknown = [u for u in generator.unknown_words(prompt) if repr(u.word) not in said]
    if not unknown:
        return None
    named = "; ".join(
        f"{u.word!r} (nearest: {', '.join(u.nearest)})" if u.nearest else repr(u.word) for u in unknown
    )
    return f"the model does not know {named}"


def prompt_notes(generator: Generator, prompt: str, said: list[str]) -> list[str]:
    """What is to be known of a prompt before it is painted: unknown words, and an end that is not read.

    A rewriter keeps the neutral prompt's words, and once is enough to be told of each: what was said is left out.
    """
    unknown = unknown_words(generator, prompt, said="\n".join(said))
    unread = unread_text(generator, prompt)
    long = (
        f"the prompt is too long for the model, which does not read its end: {unread!r}" if unread else None
    )
    return [note for note in (unknown, long) if note]
