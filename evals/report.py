"""The report: one self-contained HTML page, the same as JSON, and every request's values as CSV.

The page has no script and loads nothing, so it can be mailed, printed and read on a phone ten years on.
Pictures are inlined; large ones as thumbnails.
"""

from __future__ import annotations

import base64
import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, select_autoescape

from ..traces.blobs import BlobStore
from . import metrics
from .analysis import of_request
from .records import Outcome, Row
from .wording import COSTS, METRICS, interval, number, target_words

#: Sweeps shown for each axis, and cases at each end.
STRIPS, CASES = 3, 3


def write_report(document: dict[str, Any], outcome: Outcome, out: Path) -> None:
    """Write `report.json`, `report.csv` and `report.html`.

    Args:
        document: From `evaluate.describe`.
        outcome: The rows behind it.
        out: Folder, existing.
    """
    rows = [flat_row(row, outcome.pace) for row in outcome.rows]
    (out / "report.json").write_text(
        json.dumps({**document, "rows": rows}, indent=1, ensure_ascii=False, allow_nan=False),
        encoding="utf-8",
    )
    with (out / "report.csv").open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, [key for key in rows[0] if key not in ("shots", "readings")])
        writer.writeheader()
        for row in rows:
            writer.writerow({key: row[key] for key in writer.fieldnames})
    (out / "report.html").write_text(render(document, outcome), encoding="utf-8")


def flat_row(row: Row, pace: dict[str, float]) -> dict[str, Any]:
    """One arm × request as plain values."""
    target = row.request.target
    return {
        "arm": row.arm,
        "request": row.request.id,
        "prompt": row.request.prompt,
        "valence": target.valence,
        "arousal": target.arousal,
        "category": target.category and target.category.value,
        "run_id": row.run_id,
        "failure": row.failure,
        "delivered_prompt": row.prompt,
        **of_request(row, pace),
        "shots": [one.sha256 for one in row.handed_over],
        "readings": [
            reading and reading.model_dump(mode="json", exclude={"features"}, exclude_none=True)
            for reading in row.readings
        ],
    }


class Pictures:
    """Turns addresses into data URIs, each once."""

    def __init__(self, blobs: BlobStore, side: int = 192) -> None:
        self._blobs, self._side = blobs, side
        self._known: dict[str, str] = {}

    def uri(self, sha256: str) -> str:
        """The picture as a data URI: as it is where it is small, else a thumbnail."""
        if sha256 not in self._known:
            data, kind = self._blobs.get_bytes(sha256), "png"
            if len(data) > 24_000:
                small = self._blobs.get_image(sha256)
                small.thumbnail((self._side, self._side))
                buffer = io.BytesIO()
                small.save(buffer, "JPEG", quality=85)
                data, kind = buffer.getvalue(), "jpeg"
            self._known[sha256] = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
        return self._known[sha256]


def render(document: dict[str, Any], outcome: Outcome) -> str:
    """The page."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=select_autoescape(["html", "jinja"], default=True),
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals |= {"number": number, "interval": interval, "about": METRICS, "costs": COSTS}
    environment.filters["target"] = target_words
    pictures = Pictures(BlobStore(outcome.home / "blobs"))
    shown = [key for key in METRICS if any(key in arm["metrics"] for arm in document["arms"].values())]
    return environment.get_template("report.html.jinja").render(
        doc=document,
        metrics=[key for key in shown if key not in COSTS],
        cost_metrics=[key for key in shown if key in COSTS],
        planes=planes(outcome.rows),
        strips=strips(outcome.rows, pictures),
        cases=cases(outcome.rows, pictures),
        runs={arm: found["runs"] for arm, found in document["arms"].items()},
    )


def planes(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """For each arm the valence-arousal plane: where it was to go and where the judge saw it."""
    found: dict[str, dict[str, Any]] = {}
    for row in rows:
        plane = found.setdefault(row.arm, {"arm": row.arm, "targets": set(), "points": []})
        wanted = row.request.target.point
        if None in wanted:
            continue
        plane["targets"].add(wanted)
        read = [r for r in row.readings if r and r.valence is not None and r.arousal is not None]
        if read:
            valence, arousal = (
                metrics.mean(getattr(r, axis) for r in read) for axis in ("valence", "arousal")
            )
            plane["points"].append({"valence": valence, "arousal": arousal, "wanted": wanted})
    for plane in found.values():
        plane["targets"] = sorted(plane["targets"])
    return [plane for plane in found.values() if plane["points"]]


def strips(rows: Sequence[Row], pictures: Pictures) -> list[dict[str, Any]]:
    """Sweeps as picture strips: for each of a few, one line of pictures an arm, first image of each."""
    by_arm: dict[str, list[Row]] = {}
    for row in rows:
        by_arm.setdefault(row.arm, []).append(row)
    first = next(iter(by_arm.values()), [])
    found, count = [], {"valence": 0, "arousal": 0}
    for axis, places in metrics.sweeps([row.request for row in first]):
        if count[axis] == STRIPS:
            continue
        count[axis] += 1
        lines = []
        for arm, mine in by_arm.items():
            cells = [_cell(mine[place], pictures) for place in places]
            if any(cells):
                lines.append({"arm": arm, "cells": cells})
        requests = [first[place].request for place in places]
        other = "arousal" if axis == "valence" else "valence"
        found.append(
            {
                "axis": axis,
                "prompt": requests[0].prompt,
                "other": other,
                "other_value": getattr(requests[0].target, other),
                "values": [getattr(request.target, axis) for request in requests],
                "lines": lines,
            }
        )
    return found


def _cell(row: Row, pictures: Pictures) -> dict[str, Any] | None:
    if not row.handed_over:
        return None
    reading = row.readings[0]
    return {
        "uri": pictures.uri(row.handed_over[0].sha256),
        "alt": f"{row.arm}: {row.request.prompt}, {target_words(row.request.target)}",
        "valence": reading and reading.valence,
        "arousal": reading and reading.arousal,
    }


def cases(rows: Sequence[Row], pictures: Pictures) -> list[dict[str, Any]]:
    """The requests that the most elaborate arm answered best and worst, with every round of it."""
    arms = list(dict.fromkeys(row.arm for row in rows))
    shown = "loop" if "loop" in arms else arms[-1]
    by_request = {(row.arm, row.request.id): row for row in rows}
    scored = []
    for row in rows:
        error = of_request(row)["error"] if row.arm == shown else None
        if error is not None:
            scored.append((error, row))
    scored.sort(key=lambda pair: (pair[0], pair[1].request.id))
    best = scored[:CASES]
    worst = [pair for pair in reversed(scored) if pair not in best][:CASES]
    return [
        {
            "kind": kind,
            "arm": shown,
            "error": error,
            "prompt": row.request.prompt,
            "target": row.request.target,
            "run_id": row.run_id,
            "final": row.prompt,
            "others": [
                {**cell, "arm": arm, "error": of_request(other)["error"]}
                for arm in arms
                if (other := by_request.get((arm, row.request.id))) and (cell := _cell(other, pictures))
            ],
            "rounds": _rounds(row, pictures),
        }
        for kind, chosen in (("best", best), ("worst", worst))
        for error, row in chosen
    ]


def _rounds(row: Row, pictures: Pictures) -> list[dict[str, Any]]:
    picked = {(one.round, one.index) for one in row.handed_over}
    return [
        {
            "number": number,
            "prompt": round.prompt,
            "changes": round.changes,
            "why": round.why,
            "shots": [
                {
                    "uri": pictures.uri(one.sha256),
                    "seed": one.seed,
                    "reward": one.reward,
                    "valence": getattr(one.critique, "valence", None),
                    "arousal": getattr(one.critique, "arousal", None),
                    "analysis": getattr(one.critique, "analysis", "") or getattr(one.critique, "reason", ""),
                    "suggestion": getattr(one.critique, "suggestion", ""),
                    "picked": (one.round, one.index) in picked,
                }
                for one in round.candidates
            ],
        }
        for number, round in enumerate(row.run.rounds if row.run else ())
        if round.candidates
    ]
