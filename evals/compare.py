"""Two reports side by side: the same arm on the same requests, before and after something changed."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..domain import UserError
from .stats import difference, estimate, sign_test
from .wording import METRICS


def load_report(path: Path) -> dict[str, Any]:
    """A report from its folder or its `report.json`.

    Raises:
        UserError: Not there, or not a report.
    """
    file = path / "report.json" if path.is_dir() else path
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"no report at {file}: {error.strerror}") from error
    except json.JSONDecodeError as error:
        raise UserError(f"{file} is not a report: {error}") from error
    if not isinstance(document, dict) or not {"suite", "rows", "arms"} <= document.keys():
        raise UserError(f"{file} is not a report of `emoloop eval`")
    return {**document, "path": str(file)}


def compare(a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
    """Paired differences B - A of every metric of every arm that both have, over the requests that both have.

    Args:
        a: From `load_report`.
        b: Likewise.

    Returns:
        `changes` (arm, metric, a, b, value, low, high, p, n, better) and `warnings` on what makes the two hard to
        compare. `better` is True or False where the interval leaves zero out, else None.

    Raises:
        UserError: Nothing in common.
    """
    warnings = [
        f"{what} differ: {a.get(key)} and {b.get(key)}"
        for key, what in (("suite_sha256", "the suites"), ("judge", "the judges"), ("guard", "the guards"))
        if a.get(key) != b.get(key)
    ]
    changes = []
    for arm in [arm for arm in a["arms"] if arm in b["arms"]]:
        before, after = _columns(a, arm), _columns(b, arm)
        for metric in [metric for metric in METRICS if metric in before and metric in after]:
            one, other = before[metric], after[metric]
            shared = [unit for unit in one if unit in other]
            left, right = [one[unit][0] for unit in shared], [other[unit][0] for unit in shared]
            clusters = [one[unit][1] for unit in shared]
            found = difference(right, left, clusters)
            if found.value is None:
                continue
            certain = found.low is not None and found.high is not None and found.low * found.high > 0
            changes.append(
                {
                    "arm": arm,
                    "metric": metric,
                    "a": estimate([left], clusters).value,
                    "b": estimate([right], clusters).value,
                    **asdict(found),
                    "p": sign_test(right, left, clusters),
                    "better": (found.value < 0) == METRICS[metric].less_is_better if certain else None,
                }
            )
    if not changes:
        raise UserError(f"{a['path']} and {b['path']} have no arm and request in common")
    return {"a": a["path"], "b": b["path"], "warnings": warnings, "changes": changes}


def _columns(document: dict[str, Any], arm: str) -> dict[str, dict[str, tuple[float, str]]]:
    """metric → unit → (value, prompt)."""
    rows = [row for row in document["rows"] if row["arm"] == arm]
    found = {
        metric: {row["request"]: (row[metric], row["prompt"]) for row in rows if row.get(metric) is not None}
        for metric in METRICS
    }
    for metric, sweeps in document["arms"][arm].get("sweeps", {}).items():
        found[metric] = {it["sweep"]: (it["value"], it["prompt"]) for it in sweeps if it["value"] is not None}
    return found
