"""From the log back to the domain: a run as the loop returned it, or as far as it has come."""

from __future__ import annotations

from typing import Any

from ..domain import Candidate, Critique, Missing, Round, RunResult, RunStatus, UserError
from ..events import (
    Critiqued,
    Event,
    GenerationFailed,
    ImageGenerated,
    Rewarded,
    Rewritten,
    RunFinished,
    RunStarted,
)
from . import derive
from .store import TraceStore


def load_run(store: TraceStore, run_id: str) -> RunResult:
    """Rebuild a run from its events; candidates know where their images lie.

    A run that goes on, or broke off, has status `running` and no stop reason.

    Raises:
        UserError: There is no such run.
    """
    events = store.events(run_id)
    started = next((event for event in events if isinstance(event, RunStarted)), None)
    if started is None:
        raise UserError(f"no run {run_id!r} in {store.home} (see `emoloop traces list`)")
    return _fold(started, events, store)


def result_json(result: RunResult) -> dict[str, Any]:
    """The document that `emoloop run --json` and `emoloop traces show --json` print."""

    def candidate(it: Candidate) -> dict[str, Any]:
        critique = None if it.critique is None else it.critique.model_dump(mode="json")
        return {
            "image": None if it.path is None else str(it.path),
            "sha256": it.sha256,
            "seed": it.seed,
            "reward": it.reward,
            "critique": critique,
        }

    best = result.best
    estimate = best.critique if best is not None and isinstance(best.critique, Critique) else None
    return {
        "run_id": result.run_id,
        "status": result.status.value,
        "stop_reason": None if result.stop_reason is None else result.stop_reason.value,
        "prompt": result.prompt,
        "target": result.target.model_dump(mode="json"),
        "best": None
        if best is None
        else {
            "image": None if best.path is None else str(best.path),
            "sha256": best.sha256,
            "prompt": best.prompt,
            "seed": best.seed,
            "round": best.round,
            "index": best.index,
            "reward": best.reward,
            "estimate": None
            if estimate is None
            else estimate.model_dump(mode="json", include={"valence", "arousal", "category", "alignment"}),
        },
        "rounds": [
            {
                "prompt": round_.prompt,
                "changes": round_.changes,
                "why": round_.why,
                "candidates": [candidate(it) for it in round_.candidates],
            }
            for round_ in result.rounds
        ],
        "gain": result.gain,
        "best_gain": result.best_gain,
        "warnings": result.warnings,
        "home": None if result.home is None else str(result.home),
    }


def _fold(started: RunStarted, events: list[Event], store: TraceStore) -> RunResult:
    rounds: dict[int, Round] = {0: Round(prompt=started.prompt)}
    found: dict[tuple[int, int], Candidate] = {}
    finished: RunFinished | None = None
    for event in events:
        place = event.round, event.index
        candidate = found.get(place)
        match event:
            case ImageGenerated():
                rounds.setdefault(event.round, Round(prompt=event.prompt))
                found[place] = Candidate(
                    round=event.round,
                    index=event.index,
                    prompt=event.prompt,
                    seed=event.seed,
                    sha256=event.sha256,
                    path=store.blobs.path(event.sha256),
                    model=event.model,
                    adapter=event.adapter,
                )
            # The first value stands, as in the `candidates` table; a missing one gives way.
            case Critiqued() if candidate and not isinstance(candidate.critique, Critique):
                candidate.critique = event.critique
            case Rewarded() if candidate and candidate.reward is None:
                candidate.reward = event.value
                if candidate.critique is None and event.reason is not None:
                    candidate.critique = Missing(reason=event.reason)
            case Rewritten():
                rounds[event.round] = Round(prompt=event.prompt, changes=event.changes, why=event.why)
            case RunFinished():
                finished = event
        resumed = isinstance(event, ImageGenerated | GenerationFailed | Rewritten)
        if resumed and finished is not None and finished.status is not RunStatus.COMPLETED:
            finished = None
    for place in sorted(found):
        rounds[place[0]].candidates.append(found[place])
    best, gain, best_gain = derive.outcome({place: it.reward for place, it in found.items()})
    return RunResult(
        run_id=started.run_id,
        status=finished.status if finished else RunStatus.RUNNING,
        stop_reason=finished.stop_reason if finished else None,
        prompt=started.prompt,
        target=started.target,
        best=found[best] if best else None,
        rounds=[rounds[number] for number in sorted(rounds)],
        gain=gain,
        best_gain=best_gain,
        home=store.home,
        warnings=finished.warnings if finished else [],
    )
