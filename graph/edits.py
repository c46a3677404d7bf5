"""What a person changes of a run: edits of a saved state, answers to reviews, both after time travel too.

The log is the truth and the state only names things in it, so an edit is nothing until the log has it. A prompt that
is not painted yet is changed in place; one that is belongs to what happened, and the edit begins a run of its own. So
does an answer to a review that was answered otherwise.
"""

from __future__ import annotations

import hashlib
import json
from datetime import UTC, datetime
from typing import Any

from ..domain import RunStatus, UserError, read_target
from ..events import Event, HumanFeedback, Rewritten, RunFinished, RunStarted
from ..traces.fold import Fold
from ..traces.recorder import StoreRecorder
from .state import State, asks_the_same, read_prompt


def check_request_stands(state: State, fold: Fold) -> None:
    """Refuse an edit of what all of a run refers to.

    Raises:
        UserError: The state has another prompt, target or seed than the run began with.
    """
    asked = state["prompt"], read_target(state["target"]), state["options"]["seed"]
    if fold.started and not asks_the_same(fold.started, *asked):
        raise UserError(
            f"run {fold.run_id!r} began with another prompt, target or seed than the edited state has: put them back, "
            "or begin a run with a new request"
        )


def check_prompt_stands(state: State, fold: Fold) -> None:
    """As above, and refuse an edit of the prompt at a step that does not paint it.

    Raises:
        UserError: The state has another prompt than its round was painted with.
    """
    check_request_stands(state, fold)
    painted = fold.prompt(state["round"])
    if state["rounds"] and painted and painted != state["current"]:
        raise UserError(
            f"round {state['round']} was painted with another prompt than the edited `current`: to paint that one, "
            "update the state with as_node='rewrite'"
        )


async def follow(recorder: StoreRecorder, state: State) -> tuple[str, list[Event]]:
    """The run that is to be painted now, and the events that tell of an edit.

    Returns:
        The run, and what is to be recorded first: nothing where the prompt is as the log has it; a human's rewrite,
        which stands in place of all of the round's prompts; or the beginning of a fork, which has its parent's events
        before the edited round.

    Raises:
        UserError: The edited prompt is none, or more than that was edited.
    """
    run_id, number, prompt = state["run_id"], state["round"], state["current"]
    fold = await recorder.fold(run_id, fresh=False)
    check_request_stands(state, fold)
    started = fold.started
    if started is None or prompt == fold.prompt(number):
        return run_id, []
    prompt = read_prompt(prompt)
    digest = hashlib.sha256(f"{number}:{prompt}".encode()).hexdigest()[:6]
    edit = Rewritten(
        run_id=run_id,
        round=number,
        node=f"edit.{digest}",
        prompt=prompt,
        why="the saved state was edited",
        model="human",
        prompt_version="human",
    )
    painted = any(tried.made for tried in fold.round(number).values())
    if not painted and number >= max(fold.numbers) and fold.status is not RunStatus.COMPLETED:
        return run_id, [edit]
    before = [it for it in await recorder.events(run_id) if it.round < number]
    fork, begun = _fork(started, state, number, digest, [*before, edit])
    # A step that is tried again goes on with the same fork.
    return fork, [] if (await recorder.fold(fork)).started is not None else begun


async def answered(recorder: StoreRecorder, state: State, given: dict[str, Any]) -> tuple[str, list[Event]]:
    """What a person's answer to the review of the state's round adds to the log.

    Returns:
        The run, and what is to be recorded: nothing where the log has this very answer; where it has another, the
        beginning of a fork, which has its parent's events up to the review.
    """
    run_id, number, best = state["run_id"], state["round"], state["best"]
    comment, prompt, stop = given.get("comment") or "", given.get("prompt"), bool(given.get("stop"))
    said = HumanFeedback(
        run_id=run_id, round=number, sha256=best["sha256"] if best else None, comment=comment
    )
    wrote = Rewritten(
        run_id=run_id,
        round=number + 1,
        prompt=prompt or "",
        why=comment,
        model="human",
        prompt_version="human",
    )
    told: list[Event] = [*([said] if comment else []), *([wrote] if prompt and not stop else [])]
    fold, log = await recorder.fold(run_id), await recorder.events(run_id)
    onward = [it for it in log if isinstance(it, Rewritten) and it.round == number + 1]
    if not onward and fold.status is not RunStatus.COMPLETED:
        return run_id, told
    humans = {it.prompt for it in onward if it.model == "human"}
    end = onward[0].seq if onward else len(log)
    comments = {
        it.comment for it in log if isinstance(it, HumanFeedback) and it.round == number and it.seq < end
    }
    if (stop, {prompt} - {None}, {comment} - {""}) == (not onward, humans, comments - {""}):
        return run_id, []
    digest = hashlib.sha256(f"{number}:{json.dumps([comment, prompt, stop])}".encode()).hexdigest()[:6]
    before = [
        it
        for it in log
        if it.round <= number and not (isinstance(it, HumanFeedback) and it.round == number and it.comment)
    ]
    assert fold.started is not None
    return _fork(fold.started, state, number + 1, digest, [*before, *told])


def _fork(
    parent: RunStarted, state: State, number: int, digest: str, events: list[Event]
) -> tuple[str, list[Event]]:
    """A run that goes another way than its parent from a round on, and the events that it begins with.

    Its name follows from what was changed, so that a step that is tried again goes on with the same fork.
    """
    fork = f"{parent.run_id}+{digest}"
    options = {key: value for key, value in state["options"].items() if key != "seed"}
    settings = {
        **parent.settings,
        "loop": {**parent.settings.get("loop", {}), **options},
        "parent": {"run_id": parent.run_id, "round": number},
    }
    begun = _copy(parent, fork, settings=settings, time=datetime.now(UTC))
    had = (event for event in events if not isinstance(event, RunStarted | RunFinished))
    return fork, [begun, *(_copy(event, fork) for event in had)]


def _copy(event: Event, run_id: str, **changes: Any) -> Event:
    """The event in a fork, which spent nothing on it."""
    spent = {key: value for key, value in (("usage", {}), ("seconds", None)) if hasattr(event, key)}
    return event.model_copy(update={"run_id": run_id, "seq": -1, "cursor": 0, **spent, **changes})
