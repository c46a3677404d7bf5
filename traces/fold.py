"""A run's state as a fold of its events: the one place that says what the events of a run mean.

`Fold.apply` takes the next event in constant time, so a run may be followed while it grows. The graph decides by
it, the store writes the rows of `runs` and `candidates` from it, and `fold` gives the result that the loop returns.
A candidate keeps the first critique and the first reward that hold a value: judging a log again later adds events
and does not change what the run did. A missing one gives way to a value.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

from ..domain import Candidate, Critique, Missing, Proposal, Round, RunResult, RunStatus, StopReason, mean
from ..events import (
    Critiqued,
    Event,
    GenerationFailed,
    HumanFeedback,
    ImageGenerated,
    PersonaAnswered,
    Rewarded,
    Rewritten,
    RunFinished,
    RunStarted,
)
from . import final
from .labels import Labels

#: Columns of `candidates` that an `image_generated` fills.
_RECIPE = (
    "negative_prompt", "sha256", "latents", "model", "revision", "adapter", "steps", "guidance", "height", "width",
)  # fmt: skip


@dataclass(slots=True)
class Tried:
    """What is known of one candidate: each field is the event or value that stands.

    Attributes:
        made: The image, or None.
        failed: Why there is no image, where none could be made.
        critique: The reading, or why there is none.
        rewarded: The first reward with a value; else the last one without.
        missing: Why there is no reward; None where there is one, or nothing was tried yet.
        spread: How far readings of this image differ, on the axis where they differ most.
    """

    made: ImageGenerated | None = None
    failed: GenerationFailed | None = None
    critique: Critique | Missing | None = None
    rewarded: Rewarded | None = None
    missing: str | None = None
    spread: float | None = None

    @property
    def reward(self) -> float | None:
        """The reward that stands."""
        return self.rewarded.value if self.rewarded else None


class Fold:
    """A run after the events that were applied.

    Attributes:
        run_id: The run.
        events: How many events were applied.
        started: Its beginning, or None.
        finished: How it ended; None while it goes on, and again when a failed run is resumed.
        failures: How often it ended without being complete.
        rewrites: The rewrites by round and number.
        drafts: What personas answered, by round and number.
        tried: Candidates by (round, index).
        images: How many were made.
        calls: How often the LVLM was asked, as far as its answers tell.
        best: (round, index) of the highest reward, the earliest of several; None where nothing was rewarded. After a
            final round, of the finalist whose pictures were rewarded most in the mean.
        labels: What people call the run and its pictures.
        updated: Time of the last event.
    """

    def __init__(self, run_id: str, events: Iterable[Event] = ()) -> None:
        self.run_id = run_id
        self.events = 0
        self.started: RunStarted | None = None
        self.finished: RunFinished | None = None
        self.failures = 0
        self.rewrites: dict[int, dict[int, Rewritten]] = {}
        self.drafts: dict[int, dict[int, PersonaAnswered]] = {}
        self.tried: dict[tuple[int, int], Tried] = {}
        self.best: tuple[int, int] | None = None
        self.labels = Labels()
        self.updated: datetime | None = None
        self.images = self.calls = 0
        self._rounds: dict[int, dict[int, Tried]] = {}
        self._rewarded = 0
        self._made_by: tuple[str, str | None] | None = None
        # What was made of a round, until its next event.
        self._warnings: dict[int, list[str]] = {}
        self._read: dict[int, Round] = {}
        for event in events:
            self.apply(event)

    # ---- applying

    def apply(self, event: Event) -> None:
        """Take the run's next event."""
        self.events += 1
        self.updated = event.time
        self._warnings.pop(event.round, None)
        self._read.pop(event.round, None)
        match event:
            case RunStarted() if self.started is None:
                self.started = event
            case ImageGenerated():
                self._reopen()
                tried = self._at(event)
                self.images += tried.made is None
                tried.made = event
                self._made_by = self._made_by or (event.model, event.adapter)
            case GenerationFailed():
                self._reopen()
                tried = self._at(event)
                tried.failed, tried.missing = event, event.reason
            case Critiqued():
                if event.seconds is not None:  # a fork and an import ask nobody
                    self.calls += getattr(event.critique, "samples", 1)
                self._critiqued(self._at(event), event.critique)
            case Rewarded(weight=None):
                self._reward(self._at(event), event)
            case PersonaAnswered():
                self._reopen()
                self.calls += answers(event)
                # One that had no answer may be asked again when the run is resumed.
                self.drafts.setdefault(event.round, {})[event.index] = event
            case Rewritten():
                self._reopen()
                self.calls += answers(event)
                # What a person wrote stands in place of all that a model did.
                row = self.rewrites.setdefault(event.round, {})
                if event.model == "human":
                    row.clear()
                if not any(it.model == "human" for it in row.values()):
                    row.setdefault(event.index, event)
            case HumanFeedback():
                self.labels.apply(event)
            case RunFinished():
                self.finished = event
                self.failures += event.status is not RunStatus.COMPLETED
            case _:
                pass

    def _at(self, event: Event) -> Tried:
        key = event.round, event.index
        tried = self.tried.get(key)
        if tried is None:
            tried = self.tried[key] = self._rounds.setdefault(event.round, {})[event.index] = Tried()
        return tried

    def _reopen(self) -> None:
        # Work after a run failed or was interrupted means that it was resumed.
        if self.finished is not None and self.finished.status is not RunStatus.COMPLETED:
            self.finished = None

    def _critiqued(self, tried: Tried, critique: Critique | Missing) -> None:
        if isinstance(critique, Missing):
            if not isinstance(tried.critique, Critique):
                tried.critique, tried.missing = critique, critique.reason
        elif isinstance(tried.critique, Critique):
            # A later reading changes nothing that the run did; it only says how sure the first one was.
            first = tried.critique
            apart = max(abs(first.valence - critique.valence), abs(first.arousal - critique.arousal))
            tried.spread = max(apart, tried.spread or 0.0)
        else:
            tried.critique, tried.missing = critique, None
            spreads = (critique.valence_spread, critique.arousal_spread)
            tried.spread = max((value for value in spreads if value is not None), default=None)

    def _reward(self, tried: Tried, event: Rewarded) -> None:
        if tried.reward is not None:
            return
        tried.rewarded = event
        if event.value is None:
            tried.missing = tried.missing or event.reason or "no reward"
            return
        tried.missing = None
        self._rewarded += 1
        key = event.round, event.index
        if event.round == self.final:
            self.best = final.choose(self, event.round)
            return
        held = self.tried[self.best].reward if self.best is not None else None
        if held is None or event.value > held or (event.value == held and key < (self.best or key)):
            self.best = key

    # ---- reading

    @property
    def final(self) -> int | None:
        """The final round, in which the best prompts are painted and read again; None where there is none."""
        rows = ((number, row.values()) for number, row in self.rewrites.items())
        return next((n for n, row in rows if all(it.node == final.NODE for it in row)), None)

    @property
    def estimate(self) -> Critique | None:
        """What the prompt of the best is read as, by a reading that selected nothing; None where there is none."""
        again = final.unselected(self)
        return again.critique if again and isinstance(again.critique, Critique) else None

    @property
    def status(self) -> RunStatus:
        """How the run stands."""
        return self.finished.status if self.finished else RunStatus.RUNNING

    @property
    def gain(self) -> float | None:
        """Mean reward of the winning prompt's images in its round minus that of the neutral prompt's in round 0.

        None where either has none; all of round 0 counts where it began with another prompt. After a final round the
        image that selected nothing stands for the winner.
        """
        best = self.tried[self.best].made if self.best else None
        if self.best is None or self.started is None:
            return None
        again = final.unselected(self)
        images = {0: again} if again else self.round(self.best[0])
        winning = mean(self._rewards(images, best.prompt if best else None))
        first = mean(self._rewards(self.round(0), self.started.prompt))
        first = self.mean_reward(0) if first is None else first
        return None if first is None or winning is None else winning - first

    @property
    def best_gain(self) -> float | None:
        """Best reward minus best reward of round 0; None where round 0 has none."""
        best = self.tried[self.best].reward if self.best else None
        first = [] if best is None else self.rewards(0)
        return best - max(first) if first and best is not None else None

    def rewards(self, number: int) -> list[float]:
        """The rewards of a round, in order of index whatever the order of the events."""
        return self._rewards(self.round(number))

    def _rewards(self, row: dict[int, Tried], prompt: str | None = None) -> list[float]:
        """The rewards of a round, or those of one of its prompts."""
        kept = (
            it for _, it in sorted(row.items()) if prompt is None or (it.made and it.made.prompt == prompt)
        )
        return [it.reward for it in kept if it.reward is not None]

    def mean_reward(self, number: int) -> float | None:
        """Mean reward of a round; None where nothing in it was rewarded."""
        return mean(self.rewards(number))

    def round(self, number: int) -> dict[int, Tried]:
        """The candidates of a round, by index."""
        return self._rounds.get(number, {})

    def proposals(self, number: int) -> list[Proposal]:
        """The distinct prompts of a round, in order; round 0 begins with the neutral one where no rewrite is first."""
        distinct: dict[str, Proposal] = {}
        for prompt, changes, why in self._written(number):
            if prompt not in distinct:
                distinct[prompt] = Proposal(prompt=prompt, changes=changes, why=why)
        return list(distinct.values())

    def prompt(self, number: int) -> str:
        """The first prompt of a round."""
        return next((prompt for prompt, _, _ in self._written(number)), "")

    def _written(self, number: int) -> Iterator[tuple[str, str, str]]:
        """Prompt, changes and why of a round's prompts, repeated ones too."""
        rewrites = sorted(self.rewrites.get(number, {}).items())
        if number == 0 and self.started and not (rewrites and rewrites[0][0] == 0):
            yield self.started.prompt, "", ""
        elif not rewrites:
            made = (tried.made for _, tried in sorted(self.round(number).items()))
            yield from ((event.prompt, "", "") for event in made if event)
        yield from ((it.prompt, it.changes, it.why) for _, it in rewrites)

    def warnings(self) -> list[str]:
        """One line for each thing that went wrong without ending the run, in the order of rounds."""
        lines = list(self.started.warnings) if self.started else []
        for number in self.numbers:
            if number not in self._warnings:
                told = (
                    line for _, it in sorted(self.rewrites.get(number, {}).items()) for line in it.warnings
                )
                found = [*told, *self.problems(number)]
                self._warnings[number] = [f"round {number}: {line}" for line in found]
            lines += self._warnings[number]
        return list(dict.fromkeys(lines))

    def problems(self, number: int) -> list[str]:
        """What a round lacks: images that could not be made, readings and rewards that could not be had."""
        row = self.round(number).values()
        made = [tried for tried in row if tried.made]
        failed = [tried.failed.reason for tried in row if tried.failed and not tried.made]
        lacking = [tried for tried in made if tried.reward is None and tried.missing]
        lines: list[str] = []
        if failed:
            what = (
                f"{len(failed)} of {len(row)} images could not be made" if made else "no image could be made"
            )
            lines.append(f"{what}: {_most_common(failed)}")
        if lacking:
            kind = "critique" if any(isinstance(tried.critique, Missing) for tried in lacking) else "reward"
            none = all(tried.reward is None for tried in made)
            what = f"no {kind} at all" if none else f"{len(lacking)} of {len(made)} {kind}s missing"
            lines.append(f"{what}: {_most_common([tried.missing or '' for tried in lacking])}")
        return lines

    def candidate(self, key: tuple[int, int], path: Callable[[str], Path] | None = None) -> Candidate | None:
        """A candidate in the terms of the domain; None where it has no image.

        Args:
            key: (round, index).
            path: Where the image of a SHA-256 lies.
        """
        tried = self.tried[key]
        if tried.made is None:
            return None
        critique = tried.critique
        if critique is None and tried.rewarded and tried.rewarded.reason:
            critique = Missing(reason=tried.rewarded.reason)
        return Candidate(
            round=key[0],
            index=key[1],
            prompt=tried.made.prompt,
            seed=tried.made.seed,
            sha256=tried.made.sha256,
            path=path(tried.made.sha256) if path else None,
            model=tried.made.model,
            adapter=tried.made.adapter,
            critique=critique,
            reward=tried.reward,
        )

    @property
    def numbers(self) -> list[int]:
        """The first round, and all others of which anything is known."""
        return sorted({0, *self._rounds, *self.rewrites})

    def rounds(self, path: Callable[[str], Path] | None = None) -> list[Round]:
        """The rounds for somebody who only looks at them: what did not change is not made anew."""
        for number in self.numbers:
            if number not in self._read:
                self._read[number] = self._round(number, path)
        return [self._read[number] for number in self.numbers]

    def _round(self, number: int, path: Callable[[str], Path] | None) -> Round:
        proposals = self.proposals(number)
        found = (self.candidate((number, index), path) for index in sorted(self.round(number)))
        first = proposals[0] if proposals else Proposal(prompt="")
        return Round(
            **first.model_dump(),
            candidates=[candidate for candidate in found if candidate],
            proposals=proposals,
            final=number == self.final,
            drafts=[it.draft for _, it in sorted(self.drafts.get(number, {}).items())],
        )

    def result(self, path: Callable[[str], Path] | None = None, home: Path | None = None) -> RunResult:
        """The run as the loop returns it; one that goes on, or broke off, is `running` without a stop reason.

        Args:
            path: Where the image of a SHA-256 lies.
            home: The folder of the log.

        Raises:
            ValueError: The run has no beginning.
        """
        if self.started is None:
            raise ValueError(f"the log of run {self.run_id!r} has no beginning")
        rounds = {number: self._round(number, path) for number in self.numbers}
        candidates = rounds[self.best[0]].candidates if self.best else []
        return RunResult(
            run_id=self.run_id,
            status=self.status,
            stop_reason=self.finished.stop_reason if self.finished else None,
            prompt=self.started.prompt,
            target=self.started.target,
            best=next((it for it in candidates if (it.round, it.index) == self.best), None),
            rounds=list(rounds.values()),
            gain=self.gain,
            best_gain=self.best_gain,
            estimate=self.estimate,
            home=home,
            warnings=self.finished.warnings if self.finished else self.warnings(),
        )

    # ---- rows of the derived tables

    def run_row(self) -> dict[str, Any] | None:
        """The run's row of `runs`; None for events without a beginning."""
        started = self.started
        if started is None:
            return None
        best = self.tried[self.best] if self.best else None
        stop: StopReason | None = self.finished.stop_reason if self.finished else None
        valence, arousal = started.target.point
        return {
            "run_id": self.run_id,
            "status": self.status,
            "stop_reason": stop,
            "started": started.time,
            "updated": self.updated,
            "finished": self.finished.time if self.finished else None,
            "prompt": started.prompt,
            "prompt_hash": hash_prompt(started.prompt),
            "seed": started.seed,
            "valence": started.target.valence,
            "arousal": started.target.arousal,
            "category": started.target.category,
            "point_valence": valence,
            "point_arousal": arousal,
            "model": self._made_by[0] if self._made_by else None,
            "adapter": self._made_by[1] if self._made_by else None,
            "events": self.events,
            "rounds": len(self._rounds),
            "images": self.images,
            "missing": len(self.tried) - self._rewarded,
            "best_round": self.best[0] if self.best else None,
            "best_index": self.best[1] if self.best else None,
            "best_sha256": best.made.sha256 if best and best.made else None,
            "best_prompt": best.made.prompt if best and best.made else None,
            "best_reward": best.reward if best else None,
            "gain": self.gain,
            "best_gain": self.best_gain,
        }

    def candidate_row(self, key: tuple[int, int]) -> dict[str, Any]:
        """A candidate's row of `candidates`."""
        tried = self.tried[key]
        made, source, read = tried.made, tried.made or tried.failed, tried.critique
        read = read if isinstance(read, Critique) else None
        rewarded = tried.rewarded if tried.reward is not None else None
        return {
            "run_id": self.run_id,
            "round": key[0],
            "index": key[1],
            "prompt": source.prompt if source else None,
            "prompt_hash": hash_prompt(source.prompt) if source else None,
            "seed": source.seed if source else None,
            **({name: getattr(made, name) for name in _RECIPE} if made else dict.fromkeys(_RECIPE)),
            "valence": read.valence if read else None,
            "arousal": read.arousal if read else None,
            "category": read.category if read else None,
            "alignment": read.alignment if read else None,
            "spread": tried.spread,
            "reward": tried.reward,
            "reward_name": rewarded.name if rewarded else None,
            "reward_version": rewarded.version if rewarded else None,
            "missing": tried.missing,
        }


def fold(
    events: Iterable[Event], path: Callable[[str], Path] | None = None, home: Path | None = None
) -> RunResult:
    """A run's result from its events, in order of `seq`.

    Args:
        events: All events of one run.
        path: Where the image of a SHA-256 lies.
        home: The folder of the log.

    Raises:
        ValueError: There are no events, or they lack the beginning.
    """
    log = list(events)
    if not log:
        raise ValueError("a run has at least one event")
    return Fold(log[0].run_id, log).result(path, home)


def answers(event: PersonaAnswered | Rewritten) -> int:
    """How many answers of a model a draft or rewrite took: none for a person's, or one that another's gave too."""
    return event.usage.get("calls", 1) if event.usage or event.seconds else 0


@lru_cache(4096)
def hash_prompt(prompt: str) -> str:
    """SHA-256 of a prompt, in hexadecimal: what groups candidates of one prompt in SQL."""
    return hashlib.sha256(prompt.encode()).hexdigest()


def _most_common(reasons: list[str]) -> str:
    counts = Counter(reasons)
    reason, _ = counts.most_common(1)[0]
    return reason if len(counts) == 1 else f"{reason} (and {len(counts) - 1} other reasons)"
