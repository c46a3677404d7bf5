"""The ledger of a suite that a release is read on once.

What is looked at again and again is trained on in the end, by the choices that people make after each look. So such a
suite names a file in which every reading is a line, and a second reading of the same release is refused unless one
insists (`--again`); the line then says so. A release is emoloop's version and the weights in use: generator, LVLM and
adapters of all arms. Prompts, settings and code change with the version.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..domain import UserError
from ..settings import Settings
from ..tools import presets
from ..tools.fingerprint import content_hash, versions
from .reuse import digest


def release_of(settings: Iterable[Settings]) -> dict[str, str]:
    """`version` of emoloop, and `weights`: a hash over all models and adapters of some settings."""
    weights: set[str] = set()
    for its in settings:
        models = [presets.resolve(its.generator.model), presets.resolve(its.lvlm.model, "lvlm")]
        models += [Path(its.generator.adapter)] if its.generator.adapter else []
        weights |= {content_hash(it) if isinstance(it, Path) else it for it in models}
    return {"version": versions("emoloop")["emoloop"], "weights": digest(sorted(weights))[:12]}


def readings(ledger: Path) -> list[dict[str, Any]]:
    """The lines of a ledger, oldest first.

    Raises:
        UserError: A line that is no JSON.
    """
    if not ledger.is_file():
        return []
    try:
        return [json.loads(line) for line in ledger.read_text(encoding="utf-8").splitlines()]
    except ValueError as error:
        raise UserError(f"{ledger}: not a ledger, each line of which is JSON ({error})") from error


def check(ledger: Path, suite: str, release: dict[str, str], again: bool) -> None:
    """Refuse a second reading, and a ledger that cannot be written.

    Raises:
        UserError: Either.
    """
    before = [it for it in readings(ledger) if it["suite"] == suite and release.items() <= it.items()]
    if before and not again:
        raise UserError(
            f"suite {suite!r} was read for emoloop {release['version']} with weights {release['weights']} on "
            f"{before[-1]['time'][:10]} ({ledger}): work with the suite dev, or add --again and the ledger says so"
        )
    try:
        ledger.parent.mkdir(parents=True, exist_ok=True)
        ledger.open("a").close()
    except OSError as error:
        raise UserError(
            f"the ledger {ledger} of suite {suite!r} cannot be written: {error.strerror}"
        ) from error


def record(ledger: Path, document: dict[str, Any], release: dict[str, str], again: bool) -> None:
    """Add a reading: what was asked of which release, and each arm's error.

    Args:
        ledger: The file.
        document: The report.
        release: From `release_of`.
        again: Whether one insisted.
    """
    told = ("suite", "suite_version", "suite_sha256", "time", "command", "n", "prompts")
    errors = {
        arm: it["metrics"]["error"]["value"]
        for arm, it in document["arms"].items()
        if "error" in it["metrics"]
    }
    judge = document["judge"]["name"]
    line = {
        **{key: document[key] for key in told},
        **release,
        "again": again,
        "judge": judge,
        "error": errors,
    }
    with ledger.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(line, ensure_ascii=False) + "\n")
