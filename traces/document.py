"""The document that a run is to programs: what `--json` prints."""

from __future__ import annotations

from typing import Any

from ..domain import Candidate, Critique, RunResult


def result_json(result: RunResult) -> dict[str, Any]:
    """The document that `emoloop run --json` and `emoloop traces show --json` print."""

    def shot(it: Candidate) -> dict[str, Any]:
        kept = it.model_dump(mode="json", include={"prompt", "sha256", "seed", "reward", "critique"})
        return {"image": None if it.path is None else str(it.path), **kept}

    document = result.model_dump(
        mode="json",
        include={"run_id", "status", "stop_reason", "prompt", "target", "gain", "best_gain", "warnings"},
    )
    best = result.best
    if best is not None:
        own = best.critique if isinstance(best.critique, Critique) else None
        estimate = result.estimate or own
        read = {"valence", "arousal", "category", "alignment"}
        document["best"] = {
            **best.model_dump(mode="json", include={"sha256", "prompt", "seed", "round", "index", "reward"}),
            "image": None if best.path is None else str(best.path),
            "estimate": None if estimate is None else estimate.model_dump(mode="json", include=read),
        }
    else:
        document["best"] = None
    document["rounds"] = [
        {**it.model_dump(include={"prompt", "changes", "why"}), "candidates": list(map(shot, it.candidates))}
        for it in result.rounds
    ]
    document["home"] = None if result.home is None else str(result.home)
    return document
