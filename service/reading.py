"""From events to what is shown: a run's document, and pages of the list of runs."""

from __future__ import annotations

import base64
import difflib
import json
import re
from collections import defaultdict
from collections.abc import Sequence, Set
from datetime import UTC, datetime
from typing import Any, Literal

from sqlalchemy import ColumnElement, and_, func, literal, or_, select, tuple_

from ..domain import Critique, RunStatus, UserError
from ..events import Critiqued, Event, HumanFeedback, ImageGenerated, PersonaAnswered, Rewritten
from ..settings import ServiceSettings
from ..traces.fold import Fold, Tried
from ..traces.labels import of_runs
from ..traces.rows import RunFilter, RunRow
from ..traces.schema import labels as table
from ..traces.schema import runs
from ..traces.store import TraceStore
from .documents import Listing, Proposal, RoundDocument, RunDocument, RunPage, RunSummary, Said, Shot, State

#: Fields of `ImageGenerated` that are its place in the log and not the making.
_PLACE = {
    "run_id",
    "seq",
    "time",
    "round",
    "node",
    "index",
    "schema_version",
    "type",
    "sha256",
    "prompt",
    "seconds",
}

#: What the seconds of an event were spent on.
_SPENT: dict[type[Any], str] = {
    ImageGenerated: "images",
    Critiqued: "critiques",
    PersonaAnswered: "rewrites",
    Rewritten: "rewrites",
}

#: What stands for a missing number in an order.
_LOWEST = -1e9

Piece = tuple[Literal["=", "+", "-"], str]


def summary(row: RunRow, held: Set[str], labels: Sequence[str] = ()) -> RunSummary:
    """A row of the list.

    Args:
        row: As the store has it.
        held: Runs that somebody works on.
        labels: Its own and its pictures'.
    """
    return RunSummary(**row.model_dump(), state=_state(row.status, row.run_id in held), labels=list(labels))


def _state(status: RunStatus, held: bool) -> State:
    if status is RunStatus.COMPLETED or status is RunStatus.FAILED:
        return status.value
    return "running" if held else "stopped"


def row(store: TraceStore, run_id: str, held: Set[str]) -> RunSummary | None:
    """The list's row of one run, without its labels; None where there is none."""
    found = store.runs(RunFilter(run_ids=(run_id,)))
    return summary(found[0], held) if found else None


def document(events: Sequence[Event], held: Set[str] = frozenset()) -> RunDocument:
    """A run from its events, which are not empty and have its beginning.

    Args:
        events: In order of `seq`.
        held: Runs that somebody works on.
    """
    fold = Fold(events[0].run_id, events)
    row = fold.run_row()
    assert row is not None and fold.started is not None
    said: dict[str | None, list[Said]] = defaultdict(list)
    critics: dict[tuple[int, int], Critiqued] = {}
    rewrites: dict[int, list[Rewritten]] = defaultdict(list)
    seconds, tokens = defaultdict(float), defaultdict(int)
    for event in events:
        match event:
            case HumanFeedback():
                kept = event.model_dump(include=set(Said.model_fields))
                said[event.sha256].append(Said.model_construct(**kept))
            case Critiqued():
                first = critics.get((event.round, event.index))
                if first is None or not isinstance(first.critique, Critique):
                    critics[event.round, event.index] = event
            case Rewritten():
                rewrites[event.round].append(event)
            case _:
                pass
        if (spent := getattr(event, "seconds", None)) is not None:
            seconds[_SPENT[type(event)]] += spent
        for key, count in getattr(event, "usage", {}).items():
            if key in ("input_tokens", "output_tokens"):
                tokens[key.removesuffix("_tokens")] += count
    # What people say of a run later is no work on it.
    worked = max((it.time for it in events if not isinstance(it, HumanFeedback)), default=row["started"])
    seconds["wall"] = (worked - row["started"]).total_seconds()
    rounds: list[RoundDocument] = []
    before = fold.started.prompt
    for number in fold.numbers:
        shots = {
            index: _shot(fold, (number, index), tried, critics.get((number, index)), said)
            for index, tried in sorted(fold.round(number).items())
        }
        rounds.append(_round(fold, number, list(shots.values()), rewrites[number], before))
        rewarded = [shot for shot in shots.values() if shot.reward is not None]
        before = max(rewarded, key=lambda it: it.reward or 0.0).prompt if rewarded else fold.prompt(number)
    state = _state(fold.status, fold.run_id in held)
    return RunDocument(
        run=RunSummary(**row, state=state, labels=fold.labels.names),
        rounds=rounds,
        warnings=fold.finished.warnings if fold.finished else fold.warnings(),
        feedback=said[None],
        settings=fold.started.settings,
        seconds={key: round(value, 2) for key, value in seconds.items()},
        tokens=dict(tokens),
        cursor=events[-1].cursor,
    )


def cost(run: RunDocument, prices: ServiceSettings) -> float | None:
    """What a run's pictures and tokens cost; None where no price is set."""
    hours, tokens = run.seconds.get("images", 0.0) / 3600, run.tokens
    terms = (
        (prices.hour_price, hours),
        (prices.input_price, tokens.get("input", 0) / 1e6),
        (prices.output_price, tokens.get("output", 0) / 1e6),
    )
    return sum(price * used for price, used in terms) if any(price for price, _ in terms) else None


def _shot(
    fold: Fold,
    key: tuple[int, int],
    tried: Tried,
    read: Critiqued | None,
    said: dict[str | None, list[Said]],
) -> Shot:
    made, source = tried.made, tried.made or tried.failed
    times = {"making": made.seconds if made else None, "reading": read.seconds if read else None}
    recipe = {} if made is None else made.model_dump(mode="json", exclude=_PLACE, exclude_none=True)
    return Shot(
        round=key[0],
        index=key[1],
        prompt=source.prompt if source else "",
        sha256=made.sha256 if made else None,
        failure=tried.failed.reason if tried.failed and not made else None,
        recipe=recipe,
        critique=tried.critique,
        critic=f"{read.model}, {read.prompt_version}" if read else None,
        reward=tried.reward,
        reward_name=f"{tried.rewarded.name} {tried.rewarded.version}" if tried.rewarded else None,
        missing=tried.missing,
        seconds={name: value for name, value in times.items() if value is not None},
        tokens=read.usage if read else {},
        best=key == fold.best,
        feedback=said.get(made.sha256, []) if made else [],
    )


def _round(
    fold: Fold, number: int, shots: list[Shot], rewrites: list[Rewritten], before: str
) -> RoundDocument:
    written = {event.prompt: event for event in rewrites}
    # Each picture has its own prompt; what is written and not painted yet is shown while the run goes on.
    coming = written if fold.finished is None and number == fold.numbers[-1] else ()
    prompts = dict.fromkeys([*(shot.prompt for shot in shots), *coming]) or [fold.prompt(number)]
    proposals = []
    for prompt in prompts:
        event = written.get(prompt)
        about = {} if event is None else {"changes": event.changes, "why": event.why, "writer": event.model}
        mine = [shot for shot in shots if shot.prompt == prompt]
        proposals.append(Proposal(prompt=prompt, diff=diff(before, prompt), candidates=mine, **about))
    rewards = fold.rewards(number)
    return RoundDocument(
        number=number,
        mean_reward=fold.mean_reward(number),
        best_reward=max(rewards, default=None),
        proposals=proposals,
        drafts=[it.draft for _, it in sorted(fold.drafts.get(number, {}).items())],
    )


def diff(before: str, after: str) -> list[Piece]:
    """How a text came from another, word by word."""
    old, new = (re.findall(r"\s*\S+|\s+$", text) for text in (before, after))
    pieces: list[Piece] = []
    for tag, a, b, c, d in difflib.SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
        if tag == "equal":
            pieces.append(("=", "".join(new[c:d])))
            continue
        if a < b:
            pieces.append(("-", "".join(old[a:b])))
        if c < d:
            pieces.append(("+", "".join(new[c:d])))
    return pieces


def page(store: TraceStore, wanted: Listing, held: Set[str]) -> RunPage:
    """A page of the list.

    Raises:
        UserError: `after` is not what an earlier page gave.
    """
    columns: dict[str, tuple[ColumnElement[Any], bool]] = {
        "newest": (runs.c.started, True),
        "oldest": (runs.c.started, False),
        "updated": (runs.c.updated, True),
        "reward": (func.coalesce(runs.c.best_reward, _LOWEST), True),
        "gain": (func.coalesce(runs.c.gain, _LOWEST), True),
    }
    column, descending = columns[wanted.sort]
    words = RunFilter(**wanted.model_dump(include={"category", "model", "adapter", "label", "min_gain"}))
    chosen = words.apply(select(runs)).order_by(None)
    if wanted.q:
        by_id = runs.c.run_id.startswith(wanted.q, autoescape=True)
        chosen = chosen.where(or_(runs.c.prompt.icontains(wanted.q, autoescape=True), by_id))
    if wanted.state in ("completed", "failed"):
        chosen = chosen.where(runs.c.status == wanted.state)
    elif wanted.state is not None:
        known = runs.c.run_id.in_(held)
        by_state = known if wanted.state == "running" else ~known
        chosen = chosen.where(and_(runs.c.status == RunStatus.RUNNING, by_state))
    query = chosen
    if wanted.after:
        place = tuple_(column, runs.c.run_id)
        value, run_id = _place(wanted)
        last = tuple_(literal(value, column.type), literal(run_id))
        query = query.where(place < last if descending else place > last)
    order = [column, runs.c.run_id]
    query = query.order_by(*(it.desc() if descending else it for it in order)).limit(wanted.limit + 1)
    with store.read() as connection:
        total = connection.execute(select(func.count()).select_from(chosen.subquery())).scalar_one()
        rows = [RunRow.model_validate(dict(row)) for row in connection.execute(query).mappings()]
        ids = [row.run_id for row in rows]
        called = of_runs(connection, ids)
    further, rows = len(rows) > wanted.limit, rows[: wanted.limit]
    return RunPage(
        items=[summary(row, held, called[row.run_id]) for row in rows],
        next=_token(wanted, rows[-1]) if further else None,
        total=total,
    )


def labels(store: TraceStore) -> list[str]:
    """All labels of the log."""
    with store.read() as connection:
        return list(connection.scalars(select(table.c.label).distinct().order_by(table.c.label)))


def _token(wanted: Listing, row: RunRow) -> str:
    values: dict[str, Any] = {
        "reward": _LOWEST if row.best_reward is None else row.best_reward,
        "gain": _LOWEST if row.gain is None else row.gain,
        "updated": row.updated.isoformat(),
    }
    text = json.dumps([wanted.sort, values.get(wanted.sort, row.started.isoformat()), row.run_id])
    return base64.urlsafe_b64encode(text.encode()).decode()


def _place(wanted: Listing) -> tuple[Any, str]:
    try:
        sort, value, run_id = json.loads(base64.urlsafe_b64decode(wanted.after))
        if sort != wanted.sort or not isinstance(run_id, str):
            raise ValueError
        number = sort in ("reward", "gain")
        return (float(value) if number else datetime.fromisoformat(value).astimezone(UTC)), run_id
    except (ValueError, TypeError, OverflowError) as error:
        raise UserError("`after` is not the `next` of a page in this order") from error
