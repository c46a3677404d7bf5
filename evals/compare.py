"""Two reports side by side: the same arm on the same requests, before and after something changed."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..domain import UserError
from .stats import difference, sign_test
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
        for metric, about in METRICS.items():
            if metric not in before or metric not in after:
                continue
            one, other = before[metric], after[metric]
            shared = [unit for unit in one if unit in other]
            left, right = [one[unit][0] for unit in shared], [other[unit][0] for unit in shared]
            clusters = [one[unit][1] for unit in shared]
            found = difference(right, left, clusters)
            if found.value is None:
                continue
            pairs = [(x, y) for x, y in zip(left, right, strict=True) if x is not None and y is not None]
            certain = found.low is not None and found.high is not None and (found.low > 0 or found.high < 0)
            changes.append(
                {
                    "arm": arm,
                    "metric": metric,
                    "a": sum(x for x, _ in pairs) / len(pairs),
                    "b": sum(y for _, y in pairs) / len(pairs),
                    **asdict(found),
                    "p": sign_test(right, left, clusters),
                    "better": ((found.value < 0) == about.less_is_better) if certain else None,
                }
            )
    if not changes:
        raise UserError(f"{a['path']} and {b['path']} have no arm and request in common")
    return {"a": a["path"], "b": b["path"], "warnings": warnings, "changes": changes}


def _columns(document: dict[str, Any], arm: str) -> dict[str, dict[str, tuple[float | None, str]]]:
    """metric → unit → (value, prompt)."""
    found: dict[str, dict[str, tuple[float | None, str]]] = {}
    for row in document["rows"]:
        if row["arm"] == arm:
            for metric in METRICS:
                if row.get(metric) is not None:
                    found.setdefault(metric, {})[row["request"]] = (row[metric], row["prompt"])
    for metric, sweeps in document["arms"][arm].get("sweeps", {}).items():
        found[metric] = {sweep["sweep"]: (sweep["value"], sweep["prompt"]) for sweep in sweeps}
    return found
