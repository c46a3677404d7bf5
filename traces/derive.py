"""From events to the `runs` and `candidates` tables.

Applied event by event in order of `seq`, so that a rebuild from the log gives the same rows whatever the
batches were. A candidate keeps the first critique and the first reward that hold a value: judging the log
again later adds events and does not change what the run did. A missing one gives way to a value.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from sqlalchemy import Connection, and_, func, insert, select, update

from ..domain import Critique, RunStatus
from ..events import (
    Critiqued,
    Event,
    GenerationFailed,
    HumanFeedback,
    ImageGenerated,
    Rewarded,
    Rewritten,
    RunFinished,
    RunStarted,
)
from .schema import candidates, events, runs

_UNFINISHED = (RunStatus.FAILED, RunStatus.INTERRUPTED)


class Outcome(NamedTuple):
    """The best candidate of a run and what the loop gained.

    Attributes:
        best: (round, index) of the highest reward; the earliest where several share it.
        gain: Mean reward of the winning round minus mean reward of round 0.
        best_gain: Best reward minus best reward of round 0.
    """

    best: tuple[int, int] | None
    gain: float | None
    best_gain: float | None


def outcome(rewards: Mapping[tuple[int, int], float | None]) -> Outcome:
    """Find the winner among rewards by (round, index); missing ones take no part."""
    known = {place: value for place, value in sorted(rewards.items()) if value is not None}
    if not known:
        return Outcome(None, None, None)
    best = max(known, key=known.__getitem__)
    first = [value for (round_, _), value in known.items() if round_ == 0]
    if not first:
        return Outcome(best, None, None)
    winning = [value for (round_, _), value in known.items() if round_ == best[0]]
    return Outcome(best, sum(winning) / len(winning) - sum(first) / len(first), known[best] - max(first))


def hash_prompt(prompt: str) -> str:
    """SHA-256 of a prompt, in hexadecimal: what groups candidates of one prompt in SQL."""
    return hashlib.sha256(prompt.encode()).hexdigest()


def apply(connection: Connection, batch: Iterable[Event]) -> None:
    """Bring the derived tables up to date with events that were just written, in order of `seq`."""
    touched: dict[str, Event] = {}
    for event in batch:
        _apply(connection, event)
        touched[event.run_id] = event
    for event in touched.values():
        _summarise(connection, event)


def _text(value: str | None) -> str | None:
    # PostgreSQL refuses NUL in text; the event's JSON body keeps it.
    return None if value is None else value.replace("\0", "�")


def _apply(connection: Connection, event: Event) -> None:
    match event:
        case RunStarted():
            point = event.target.point
            values = {
                "run_id": event.run_id,
                "status": RunStatus.RUNNING,
                "started": event.time,
                "updated": event.time,
                "prompt": _text(event.prompt),
                "prompt_hash": hash_prompt(event.prompt),
                "seed": event.seed,
                "valence": event.target.valence,
                "arousal": event.target.arousal,
                "category": event.target.category,
                "point_valence": point[0],
                "point_arousal": point[1],
            }
            if not connection.scalar(select(runs.c.run_id).where(runs.c.run_id == event.run_id)):
                connection.execute(insert(runs).values(values))
        case ImageGenerated():
            _reopen(connection, event.run_id)
            made = {
                "prompt": _text(event.prompt),
                "prompt_hash": hash_prompt(event.prompt),
                "negative_prompt": _text(event.negative_prompt),
                "seed": event.seed,
                "sha256": event.sha256,
                "latents": event.latents,
                "model": event.model,
                "revision": event.revision,
                "adapter": event.adapter,
                "steps": event.steps,
                "guidance": event.guidance,
                "height": event.height,
                "width": event.width,
            }
            _put(connection, event, made)
            connection.execute(
                update(runs)
                .where(runs.c.run_id == event.run_id, runs.c.model.is_(None))
                .values(model=event.model, adapter=event.adapter)
            )
        case GenerationFailed():
            _reopen(connection, event.run_id)
            failed = {
                "prompt": _text(event.prompt),
                "prompt_hash": hash_prompt(event.prompt),
                "seed": event.seed,
                "missing": _text(event.reason),
            }
            _put(connection, event, failed)
        case Critiqued():
            critique = event.critique
            if _candidate(connection, event, "valence") is not None:
                if isinstance(critique, Critique):
                    _disagree(connection, event, critique)
                return
            if isinstance(critique, Critique):
                read = critique.model_dump(include={"valence", "arousal", "category", "alignment"})
                spreads = (critique.valence_spread, critique.arousal_spread)
                spread = max((value for value in spreads if value is not None), default=None)
                _put(connection, event, {**read, "spread": spread, "missing": None})
            else:
                _put(connection, event, {"missing": _text(critique.reason)})
        case Rewarded():
            if _candidate(connection, event, "reward") is not None:
                return
            if event.value is not None:
                reward = {"reward": event.value, "reward_name": event.name, "reward_version": event.version}
                _put(connection, event, {**reward, "missing": None})
            elif _candidate(connection, event, "missing") is None:
                _put(connection, event, {"missing": _text(event.reason or "no reward")})
        case Rewritten():
            _reopen(connection, event.run_id)
        case RunFinished():
            connection.execute(
                update(runs)
                .where(runs.c.run_id == event.run_id)
                .values(status=event.status, stop_reason=event.stop_reason, finished=event.time)
            )
        case HumanFeedback():
            pass


def _reopen(connection: Connection, run_id: str) -> None:
    # Work after a run failed or was interrupted means that it was resumed.
    connection.execute(
        update(runs)
        .where(runs.c.run_id == run_id, runs.c.status.in_(_UNFINISHED))
        .values(status=RunStatus.RUNNING, stop_reason=None, finished=None)
    )


def _here(event: Event) -> Any:
    return and_(
        candidates.c.run_id == event.run_id,
        candidates.c.round == event.round,
        candidates.c.index == event.index,
    )


def _candidate(connection: Connection, event: Event, column: str) -> Any:
    return connection.scalar(select(candidates.c[column]).where(_here(event)))


def _disagree(connection: Connection, event: Event, second: Critique) -> None:
    # A later critique changes nothing that the run did; it only says how sure the first one was.
    row = connection.execute(
        select(candidates.c.valence, candidates.c.arousal, candidates.c.spread).where(_here(event))
    ).one()
    apart = max(abs(row.valence - second.valence), abs(row.arousal - second.arousal))
    _put(connection, event, {"spread": max(apart, row.spread or 0.0)})


def _put(connection: Connection, event: Event, values: dict[str, Any]) -> None:
    if connection.execute(update(candidates).where(_here(event)).values(values)).rowcount == 0:
        place = {"run_id": event.run_id, "round": event.round, "index": event.index}
        connection.execute(insert(candidates).values({**place, **values}))


def _summarise(connection: Connection, last: Event) -> None:
    c = candidates.c
    query = select(c.round, c.index, c.reward, c.sha256, c.prompt).where(c.run_id == last.run_id)
    rewards: dict[tuple[int, int], float | None] = {}
    made: dict[tuple[int, int], tuple[str | None, str | None]] = {}
    for round_, index, reward, sha256, prompt in connection.execute(query):
        rewards[round_, index] = reward
        made[round_, index] = sha256, prompt
    best, gain, best_gain = outcome(rewards)
    best_sha256, best_prompt = made[best] if best else (None, None)
    count = select(func.count()).select_from(events).where(events.c.run_id == last.run_id).scalar_subquery()
    connection.execute(
        update(runs)
        .where(runs.c.run_id == last.run_id)
        .values(
            updated=last.time,
            events=count,
            rounds=len({round_ for round_, _ in rewards}),
            images=sum(sha256 is not None for sha256, _ in made.values()),
            missing=sum(reward is None for reward in rewards.values()),
            best_round=best[0] if best else None,
            best_index=best[1] if best else None,
            best_sha256=best_sha256,
            best_prompt=best_prompt,
            best_reward=rewards[best] if best else None,
            gain=gain,
            best_gain=best_gain,
        )
    )
