"""What a log knows that another run can use: what prompts were read as, and which rewrites came near a target.

Both answers depend on what was logged before a moment alone, so that a run that is resumed gets those it began with.
Both are bounded: the latest events are looked through for readings, and of runs only their rows.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any, NamedTuple

from sqlalchemy import ColumnElement, and_, select

from ..domain import EmotionTarget, Example
from .schema import candidates, events, runs
from .store import TraceStore

#: A rewrite is near a target when its run's was, and its reading, within so many points on each wanted axis.
NEAR = 0.75

#: Events that are looked through for readings, for each that is wanted; rewrites that are looked at for each.
_EVENTS, _REWRITES = 20, 16


class Read(NamedTuple):
    """What the critic read from an image of a prompt."""

    prompt: str
    valence: float
    arousal: float


def cursor_at(store: TraceStore, moment: datetime) -> int:
    """The cursor of the last event that is not later than a moment; 0 where there is none."""
    query = select(events.c.cursor).where(events.c.time <= moment).order_by(events.c.cursor.desc()).limit(1)
    with store.read() as connection:
        return connection.scalar(query) or 0


def readings(
    store: TraceStore, upto: int, most: int, *, model: str, adapter: str | None = None
) -> list[Read]:
    """The latest readings of a generator's pictures, newest first.

    Args:
        store: The log.
        upto: Cursor of the last event that counts.
        most: How many at most.
        model: Who painted.
        adapter: With which adapter.
    """
    e, c = events.c, candidates.c
    mine = and_(c.run_id == e.run_id, c.round == e.round, c.index == e.index)
    query = (
        select(c.prompt, c.valence, c.arousal)
        .select_from(events.join(candidates, mine))
        .where(e.cursor <= upto, e.cursor > upto - _EVENTS * most, e.type == "critiqued")
        .where(c.valence.is_not(None), c.model == model, c.adapter.is_not_distinct_from(adapter))
        .order_by(e.cursor.desc())
        .limit(most)
    )
    with store.read() as connection:
        return [Read(*row) for row in connection.execute(query)]


def examples(
    store: TraceStore,
    target: EmotionTarget,
    before: datetime,
    most: int,
    *,
    neutral: str,
    model: str,
    adapter: str | None = None,
) -> list[Example]:
    """Rewrites of other neutral prompts that came near a target, the nearest first; one for each neutral prompt.

    Args:
        store: The log.
        target: The wanted emotion.
        before: Only runs that were done by then.
        most: How many at most.
        neutral: The prompt whose own runs stay out.
        model: Who painted.
        adapter: With which adapter.
    """
    r = runs.c
    done = (
        select(r.run_id, r.prompt, r.best_round, r.best_index)
        .where(*_near(r.point_valence, r.point_arousal, target), r.finished <= before)
        .where(r.best_prompt != r.prompt, r.prompt != neutral)
        .where(r.model == model, r.adapter.is_not_distinct_from(adapter))
        .order_by(r.best_reward.desc(), r.run_id)
        .limit(_REWRITES * most)
        .subquery()
    )
    c, d = candidates.c, done.c
    best = and_(c.run_id == d.run_id, c.round == d.best_round, c.index == d.best_index)
    query = (
        select(d.prompt, c.prompt, c.valence, c.arousal)
        .select_from(done.join(candidates, best))
        .where(*_near(c.valence, c.arousal, target))
        .where(*([] if target.category is None else [c.category == target.category]))
    )
    with store.read() as connection:
        found = [Example(*row) for row in connection.execute(query)]
    found.sort(key=lambda it: (_distance((it.valence, it.arousal), target), it.neutral, it.prompt))
    nearest: dict[str, Example] = {}
    for it in found:
        nearest.setdefault(it.neutral, it)
    return list(nearest.values())[:most]


def _near(valence: ColumnElement[Any], arousal: ColumnElement[Any], target: EmotionTarget) -> list[Any]:
    axes = zip((valence, arousal), target.point, strict=True)
    return [axis.between(aim - NEAR, aim + NEAR) for axis, aim in axes if aim is not None]


def _distance(read: tuple[float, float], target: EmotionTarget) -> float:
    return sum(abs(at - aim) for at, aim in zip(read, target.point, strict=True) if aim is not None)
