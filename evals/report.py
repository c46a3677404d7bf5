"""The report: one self-contained HTML page, the same as JSON, and every request's values as CSV.

The page has no script and loads nothing, so it can be mailed, printed and read on a phone ten years on.
Pictures are inlined; large ones as thumbnails.
"""

from __future__ import annotations

import base64
import csv
import json
import math
from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, select_autoescape

from ..tools.images.base import encoded
from ..traces.blobs import BlobStore
from . import metrics
from .analysis import of_request
from .records import Outcome, Row
from .suites import Suite
from .wording import COSTS, CURVE, IMAGES, METRICS, interval, number, target_words

#: Sweeps shown for each axis, and cases at each end.
STRIPS, CASES = 3, 3


def write_report(document: dict[str, Any], outcome: Outcome, out: Path) -> None:
    """Write `report.json`, `report.csv` and `report.html`.

    Args:
        document: From `evaluate.describe`.
        outcome: The rows behind it.
        out: Folder, existing.
    """
    budget = outcome.suite and outcome.suite.budget
    rows = [flat_row(row, outcome.pace, budget) for row in outcome.rows]
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


def flat_row(row: Row, pace: dict[str, float], budget: int | None) -> dict[str, Any]:
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
        **of_request(row, pace, budget),
        "shots": [one.sha256 for one in row.handed_over],
        "readings": [
            reading and reading.model_dump(mode="json", exclude={"features"}, exclude_none=True)
            for reading in row.readings
        ],
    }


def data_uri(blobs: BlobStore, sha256: str) -> str:
    """A picture as a data URI: as it is where it is small, else a thumbnail."""
    data, kind = blobs.get_bytes(sha256), "png"
    if len(data) > 24_000:
        small = blobs.get_image(sha256)
        small.thumbnail((192, 192))
        data, kind = encoded(small, "JPEG", quality=85), "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def render(document: dict[str, Any], outcome: Outcome) -> str:
    """The page."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=select_autoescape(["html", "jinja"], default=True),
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals |= {"number": number, "interval": interval, "about": METRICS, "getattr": getattr}
    environment.filters |= {"target": target_words, "log2": math.log2}
    environment.filters["uri"] = cache(partial(data_uri, BlobStore(outcome.home / "blobs")))
    shown = [key for key in METRICS if any(key in arm["metrics"] for arm in document["arms"].values())]
    return environment.get_template("report.html.jinja").render(
        doc=document,
        metrics=[key for key in shown if key not in (*COSTS, *CURVE)],
        cost_metrics=[key for key in shown if key in COSTS],
        planes=planes(outcome.rows),
        curves=curves(document),
        counts=IMAGES,
        strips=strips(outcome.rows, outcome.suite),
        cases=cases(outcome.rows),
    )


def curves(document: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The error after 1 … 24 images of each arm that selects; of any other its error, a level to compare with."""
    found: dict[str, dict[str, Any]] = {}
    for name, arm in document["arms"].items():
        told = arm["metrics"]
        along = zip(IMAGES, CURVE, strict=True)
        points = [(images, told[key]["value"]) for images, key in along if key in told]
        if "error" in told:
            level = [(images, told["error"]["value"]) for images in (IMAGES[0], IMAGES[-1])]
            found[name] = {"points": points or level, "selects": bool(points)}
    return found if any(curve["selects"] for curve in found.values()) else {}


def planes(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """For each arm the valence-arousal plane: where it was to go and where the judge saw it."""
    found: dict[str, dict[str, Any]] = {}
    for row in (row for row in rows if row.made):
        plane = found.setdefault(row.arm, {"arm": row.arm, "targets": set(), "points": []})
        wanted = row.request.target.point
        if None not in wanted:
            plane["targets"].add(wanted)
            read = [r for r in row.readings if r and None not in (r.valence, r.arousal)]
            point = {axis: metrics.mean(getattr(r, axis) for r in read) for axis in ("valence", "arousal")}
            plane["points"] += [{**point, "wanted": wanted}] if read else []
    return [{**plane, "targets": sorted(plane["targets"])} for plane in found.values() if plane["points"]]


def strips(rows: Sequence[Row], suite: Suite | None = None) -> list[dict[str, Any]]:
    """Sweeps as picture strips: for each of a few, one line of rows an arm, whose first images are shown."""
    by_arm = {arm: [row for row in rows if row.arm == arm] for arm in dict.fromkeys(row.arm for row in rows)}
    requests = [row.request for row in next(iter(by_arm.values()), [])]
    sweeps = metrics.sweeps(requests, suite and suite.declared)
    found = []
    for axis, other in (("valence", "arousal"), ("arousal", "valence")):
        for places in [places for swept, places in sweeps if swept == axis][:STRIPS]:
            lines = {arm: [mine[place] for place in places] for arm, mine in by_arm.items()}
            kept = {arm: line for arm, line in lines.items() if any(row.handed_over for row in line)}
            requests = [row.request for row in next(iter(lines.values()))]
            found.append({"axis": axis, "other": other, "requests": requests, "lines": kept})
    return found


def cases(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The requests that the most elaborate arm answered best and worst, beside all arms' answers."""
    arms = list(dict.fromkeys(row.arm for row in rows))
    shown = "loop" if "loop" in arms else arms[-1]
    errors = {(row.arm, row.request.id): of_request(row)["error"] for row in rows}
    scored = [
        (error, row)
        for row in rows
        if row.arm == shown and (error := errors[shown, row.request.id]) is not None
    ]
    scored.sort(key=lambda pair: (pair[0], pair[1].request.id))
    worst = scored[CASES:][: -CASES - 1 : -1]
    return [
        {
            "kind": kind,
            "error": error,
            "row": row,
            "others": [
                (other, errors[other.arm, other.request.id])
                for other in rows
                if other.request.id == row.request.id and other.handed_over
            ],
            "picked": {(one.round, one.index) for one in row.handed_over},
        }
        for kind, chosen in (("best", scored[:CASES]), ("worst", worst))
        for error, row in chosen
    ]
