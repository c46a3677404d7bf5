"""Arms: the ways to answer a request that a suite compares.

An arm is a named set of loop settings, and its answer is a run of the loop in the evaluation's log. All arms of a
suite get the same seed for a request, so that the loop's round 0 is the base arm's images and best-of-N begins with
them. An arm with one round of its own has nothing to choose from and hands over all its images (the figure is the
mean, what one image is expected to be); any other hands over one, picked by the critic's reward.

The controls are what makes a gain mean something: best-of-N at the loop's image budget (is it selection?),
one rewrite without feedback (is it knowing the words?), both together, as many different rewrites as images (does
feedback add anything to exploring?), the teacher
(what of it could weights learn?), a phrase looked up in the log and an edit chosen by a reader of the log's wording
(did weights learn more than those?), and a reader that looks at no picture (what does the suite give for nothing?).
"""

from __future__ import annotations

import asyncio
import inspect
import re
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from itertools import count
from pathlib import Path
from typing import Any

from ..agents.rewriters import KEPT
from ..domain import RunResult, RunStatus, UserError
from ..events import Critiqued, Event, PersonaAnswered, Rewritten, RunStarted
from ..graph.loop import Loop
from ..graph.state import Context, candidate_seed
from ..settings import Settings, merged, read_set
from ..tools.registry import resolve
from ..traces.fold import answers
from .lookup import Phrases, Planner
from .records import Cost, Reading, Row
from .reuse import Reuse, digest
from .suites import Request, Suite

#: What a run may have of its own; any other setting needs models of its own.
OPTIONS = {option.name for option in fields(Context)}


@dataclass(frozen=True)
class Arm:
    """A named set of settings.

    Attributes:
        name: In figures and tables.
        options: Loop settings of each run, over the suite's.
        models: Settings that decide the models, nested by section: arms that share them share a loop.
        answer: Code instead of one run.
    """

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    models: dict[str, Any] = field(default_factory=dict)
    answer: Callable[[Harness, Request, int, str], Awaitable[Row]] | None = None

    @property
    def adapter(self) -> Path | None:
        """The distilled artifact that the generator carries; None is the base model."""
        folder = self.models.get("generator", {}).get("adapter")
        return Path(folder) if folder else None


class Harness:
    """An open loop whose arms answer requests: each answer is a run in its log.

    Args:
        loop: Over the models of the arms.
        suite: Rounds and images.
        reuse: Wrapped around the loop's parts.
        log: Whose log `lookup` reads: the runs that distillation learns from.
    """

    def __init__(self, loop: Loop, suite: Suite, reuse: Reuse, log: Settings) -> None:
        self.loop, self.suite, self.reuse, self.log = loop, suite, reuse, log

    @cached_property
    def phrases(self) -> Phrases:
        """What the log's rewrites added and how that was read."""
        return Phrases.of_log(self.log)

    @cached_property
    def planner(self) -> Planner:
        """What chooses edits by the log's wording."""
        return Planner(self.log)

    @property
    def identity(self) -> dict[str, Any]:
        """What decides an answer besides arm, request and seed."""
        reward, loop = self.loop.parts.reward, self.loop.settings.loop
        return {
            "generator": self.reuse.weights,
            "lvlm": self.reuse.reader,
            "reward": [reward.name, reward.version],
            "loop": loop.model_dump(include={"tolerance", "patience"}),
        }

    async def run(self, arm: Arm, request: Request, seed: int, start: str | None = None) -> Row:
        """One run with the arm's settings; one that is in the log is taken from there, or gone on with.

        Args:
            arm: The arm.
            request: The request.
            seed: The run's seed.
            start: Prompt of round 0, for an arm with `rewrite_first`: it goes into the log as the first rewrite.
        """
        options = {"rounds": self.suite.rounds, "images": self.suite.images, **arm.options}
        options = Context(**options).over(self.loop.settings.loop)
        reward = self.loop.parts.reward
        key = digest(reward.name, reward.version, options, request.id, seed, start)[:12]
        return await self.reuse.once(
            ("run", arm.name, key), lambda: None, lambda: self._run(arm, options, request, seed, start, key)
        )

    async def _run(
        self, arm: Arm, options: dict[str, Any], request: Request, seed: int, start: str | None, key: str
    ) -> Row:
        parts = self.loop.parts
        run_id = first = f"{self.reuse.prefix}-{arm.name}-{key}"
        fold, attempts = await parts.recorder.fold(run_id), count(2)
        # Another run tries again for what a complete one lacks; what it had is found in the log.
        while fold.status is RunStatus.COMPLETED and _lacks(fold.result(), options["images"]):
            run_id = f"{first}.{next(attempts)}"
            fold = await parts.recorder.fold(run_id)
        if start is not None and fold.started is None:
            begin = {"run_id": run_id, "prompt": request.prompt, "target": request.target, "seed": seed}
            await parts.recorder.record(
                RunStarted(**begin, settings=parts.snapshot(options)),
                Rewritten(run_id=run_id, prompt=start, model="evaluation", prompt_version="evaluation"),
            )
        result = await self.loop.run(request.prompt, request.target, seed=seed, run_id=run_id, **options)
        events = await parts.recorder.events(run_id)
        return _row(arm, request, result, events, parts.critic.samples)


def _lacks(result: RunResult, images: int) -> bool:
    """Whether a run had less than its budget allows: an image unmade or unvalued, or no first rewrite."""
    rounds = result.rounds
    return rounds[0].why.startswith(KEPT) or any(
        (len(round.candidates) < images and not round.final)
        or any(one.reward is None for one in round.candidates)
        for round in rounds
    )


def _row(arm: Arm, request: Request, result: RunResult, events: Sequence[Event], samples: int) -> Row:
    selects = arm.options.get("rounds") != 1
    made = [candidate for round in result.rounds for candidate in round.candidates]
    written = [e for e in events if isinstance(e, PersonaAnswered | Rewritten)]
    read = [e for e in events if isinstance(e, Critiqued)] if selects else []
    cost = Cost(
        images=len(made) if selects else 1,
        critiques=len(read),
        rewrites=sum(map(answers, written)),
        samples=samples,
        tokens=sum(event.usage.get("total_tokens", 0) for event in [*read, *written]),
    )
    handed_over = made if not selects else [result.best] if result.best else []
    failure = None
    if result.rounds[0].why.startswith(KEPT):
        failure = f"no rewrite: {result.rounds[0].why}"
    elif not handed_over or (selects and result.status is not RunStatus.COMPLETED):
        # A run that broke off may have a best candidate, out of less than the other arms chose from.
        failure = result.warnings[-1] if result.warnings else f"{result.status}: {result.stop_reason}"
    return Row(arm.name, request, result, [] if failure else handed_over, cost, failure)


async def teacher(harness: Harness, request: Request, seed: int, name: str) -> Row:
    """Fresh images of the prompt that the loop found: its gain without its selection.

    Their noise is none that the loop has seen, because the prompt was chosen by what it did with that.
    """
    found = await harness.run(ARMS["loop"], request, seed)
    if found.failure:
        return replace(found, arm=name)
    fresh = candidate_seed(seed, harness.suite.rounds + 1000, 0)
    arm = Arm(name, {"rewriter": "keep", "rewrite_first": True, "rounds": 1})
    made = await harness.run(arm, request, fresh, start=found.prompt)
    # To have the prompt one has to run the loop; the image comes on top.
    return replace(made, cost=replace(found.cost, images=found.cost.images + 1))


async def constant(harness: Harness, request: Request, seed: int, name: str) -> Row:
    """No picture at all: a reader that says (0, 0) to everything. A suite's error without looking."""
    return Row(name, request, readings=[Reading(valence=0.0, arousal=0.0)])


async def lookup(harness: Harness, request: Request, seed: int, name: str) -> Row:
    """The neutral prompt with the phrase of the log whose reading was nearest to the target, as plain text."""
    phrase = harness.phrases.nearest(request.target)
    arm = Arm(name, {"rewriter": "keep", "rewrite_first": True, "rounds": 1})
    return await harness.run(arm, request, seed, start=f"{request.prompt}{phrase}")


async def planner(harness: Harness, request: Request, seed: int, name: str) -> Row:
    """The edit of the neutral prompt that the log's wording promises to come nearest, as plain text: no picture is
    made for it and no model asked."""
    arm = Arm(name, {"rewriter": "keep", "rewrite_first": True, "rounds": 1})
    edited = await asyncio.to_thread(lambda: harness.planner.edit(request.prompt, request.target))
    return await harness.run(arm, request, seed, start=edited)


#: Arms by name.
ARMS = {
    name: Arm(name, options)
    for name, options in {
        "base": {"rewriter": "keep", "rounds": 1},
        "rewrite": {"rewriter": "one_shot", "rewrite_first": True, "rounds": 1},
        "best_of_n": {"rewriter": "keep", "exhaust": True},
        "rewrite_best_of_n": {"rewriter": "one_shot", "rewrite_first": True, "exhaust": True},
        # A round has no more prompts than images: one for each.
        "diverse_best_of_n": {
            "rewriter": "diverse",
            "rewrite_first": True,
            "exhaust": True,
            "proposals": 256,
            "oversample": 1,
        },
        "loop": {},
    }.items()
} | {arm.__name__: Arm(arm.__name__, answer=arm) for arm in (teacher, constant, lookup, planner)}

#: How a part of an adapter is named, `tokens_of_NAME`.
PARTS = ("tokens", "lora")


#: How an arm is named that is the same but for the critic.
TUNED = "+critic"


def crossed(adapters: Iterable[str], critic: str | None) -> list[str]:
    """EmoFeedback²'s ablation (arXiv 2511.19982): each generator in one pass, then under the loop with each critic.

    Args:
        adapters: What the generator may carry, beside nothing.
        critic: The other critic, if there is one.
    """
    loops = ["loop", *(f"loop_on_{name}" for name in adapters)]
    return ["base", *adapters, *loops, *(f"{loop}{TUNED}" for loop in loops if critic)]


def load_arm(spec: str, adapters: dict[str, Path], critic: str | None = None) -> Arm:
    """An arm from how it is written on the command line or in a suite.

    Args:
        spec: A name in `ARMS`; a name in `adapters` (one pass of the neutral prompt on those weights);
            `loop_on_NAME` (the loop on them); `tokens_of_NAME` or `lora_of_NAME` (one pass of that part alone); a
            dotted path to a function like `teacher`; any of these may be given a name of its own,
            `mine=pkg.mod:arm`. `mine=FOLDER` is an adapter, and
            `mine=KEY=VALUE,…` the loop with these settings: those of a run by their names, any other as
            `section.key`, and `adapter=FOLDER`. NAME`+critic` is the same arm with the model of `critic`.
        adapters: Name → artifact folder.
        critic: Another `lvlm.model`.

    Raises:
        UserError: None of these, or an adapter that is not there.
    """
    name, given, what = spec.partition("=")
    if not given:
        name, what = spec.rpartition(":")[2], spec
    if not re.fullmatch(r"[\w.+-]+", name):
        raise UserError(f"arm name {name!r}: letters, digits and . + - _ are allowed")
    on_adapter = what.removeprefix("loop_on_")
    part, _, whole = what.partition("_of_")
    if what.endswith(TUNED):
        if critic is None:
            raise UserError(f"arm {what!r} needs a critic: --critic MODEL")
        arm = load_arm(what.removesuffix(TUNED), adapters)
        return replace(arm, name=name, models=merged(arm.models, {"lvlm": {"model": critic}}))
    if "=" in what:
        return _of_settings(name, what.split(","))
    if what in ARMS:
        return replace(ARMS[what], name=name)
    if on_adapter in adapters:
        return Arm(name, ARMS["base" if on_adapter == what else "loop"].options, _on(adapters[on_adapter]))
    if part in PARTS and whole in adapters:
        return Arm(
            name, ARMS["base"].options, merged(_on(adapters[whole]), {"generator": {"adapter_part": part}})
        )
    if "adapter" in (on_adapter, whole):
        raise UserError(f"arm {what!r} needs an adapter: --adapter DIR")
    if given and ":" not in what:
        return Arm(name, ARMS["base"].options, _on(Path(what)))
    found: Any = resolve(what, {**ARMS, **adapters}, "arm")
    if not inspect.iscoroutinefunction(found) and not inspect.iscoroutinefunction(type(found).__call__):
        raise UserError(f"arm {what!r} is not an async function (harness, request, seed, name) -> Row")
    return Arm(name, answer=found)


def _of_settings(name: str, words: Sequence[str]) -> Arm:
    short = {"adapter": "generator.adapter"}
    named = ((word, word.partition("=")[0]) for word in words)
    models = read_set(
        word if "." in key else f"{short.get(key, f'loop.{key}')}={word.partition('=')[2]}"
        for word, key in named
    )
    loop = models.pop("loop", {})
    options = {key: loop.pop(key) for key in OPTIONS & loop.keys()}
    if folder := models.get("generator", {}).get("adapter"):
        _on(Path(folder))
    return Arm(name, options, models | ({"loop": loop} if loop else {}))


def _on(folder: Path) -> dict[str, Any]:
    """Settings of a generator that carries an adapter.

    Raises:
        UserError: It is not there.
    """
    if not folder.exists():
        raise UserError(f"no adapter at {folder}")
    return {"generator": {"adapter": str(folder)}}
