"""Tables in the documentation come from committed JSON, never from a keyboard.

    emoloop eval loop --json > docs/results/loop.json
    python tests/tables.py            # fills the tables in README.md and docs/*.md
    python tests/tables.py --check    # exit 1 and the names of files that differ

A table stands between `<!-- results: SUITE KIND -->` and `<!-- /results -->`; KIND is arms, curve, content, kinds,
gain, cost or health.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from emoloop.evals.wording import CURVE, METRICS, interval, number, shown

_BLOCK = re.compile(r"(<!-- results: ([\w-]+) (\w+) -->\n).*?(<!-- /results -->)", re.DOTALL)

#: Metrics of each kind of table.
_ARMS = (
    "error",
    "error_reduction",
    "amortisation",
    "subject_accuracy",
    "alignment",
    "diversity",
    "valence_tau",
    "arousal_tau",
    "images",
    "lvlm_calls",
)
_CURVE = (*CURVE, "images_to_target")
_CONTENT = ("content_kept", "drift", "paraphrase_gap", "emotion_accuracy", "estimate_bias")
_COST = ("images", "lvlm_calls", "tokens", "seconds")


def pages(root: Path) -> list[Path]:
    """The files that may hold tables."""
    return [page for page in (root / "README.md", *sorted((root / "docs").rglob("*.md"))) if page.is_file()]


def filled(text: str, results: Path) -> str:
    """A page with every table made anew.

    Args:
        text: The page.
        results: Folder of the committed documents, `SUITE.json`.

    Raises:
        ValueError: A table of a kind that does not exist.
    """

    def table(match: re.Match[str]) -> str:
        head, suite, kind, tail = match.groups()
        file = results / f"{suite}.json"
        if not file.is_file():
            missing = (
                f"No results are committed yet: `emoloop eval {suite} --json > docs/results/{suite}.json`."
            )
            return f"{head}{missing}\n{tail}"
        if kind not in _KINDS:
            raise ValueError(f"no table of kind {kind!r}: {', '.join(_KINDS)}")
        document = json.loads(file.read_text(encoding="utf-8"))
        return head + "\n".join(_KINDS[kind](document)) + f"\n{tail}"

    return _BLOCK.sub(table, text)


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _columns(document: dict[str, Any], metrics: tuple[str, ...]) -> Iterator[str]:
    columns = [key for key in metrics if any(key in arm["metrics"] for arm in document["arms"].values())]
    yield _row(["arm", *(METRICS[key].label.replace("|", "\\|") for key in columns)])
    yield _row(["---", *["---:"] * len(columns)])
    for name, arm in document["arms"].items():
        cells = (shown(arm["metrics"].get(key), METRICS[key].digits) for key in columns)
        yield _row([f"`{name}`", *cells])
    yield ""
    yield _made(document)


def _made(document: dict[str, Any]) -> str:
    counts = f"{document['n']} requests over {document['prompts']} neutral prompts"
    made = f"{document['device']}, {document['time'][:10]}; `{document['command']}`"
    return f"{counts}; 95 % intervals by bootstrap over prompts; judge: {document['judge']['name']}; {made}"


def _arms(document: dict[str, Any]) -> Iterator[str]:
    yield from _columns(document, _ARMS)


def _curve(document: dict[str, Any]) -> Iterator[str]:
    yield from _columns(document, _CURVE)


def _content(document: dict[str, Any]) -> Iterator[str]:
    yield from _columns(document, _CONTENT)


def _kinds(document: dict[str, Any]) -> Iterator[str]:
    yield _row(["arm", *document["kinds"]])
    yield _row(["---", *["---:"] * len(document["kinds"])])
    for arm in document["arms"]:
        yield _row([f"`{arm}`", *(shown(arms.get(arm), 2) for arms in document["kinds"].values())])


def _cost(document: dict[str, Any]) -> Iterator[str]:
    yield from _columns(document, _COST)


def _gain(document: dict[str, Any]) -> Iterator[str]:
    yield _row(["part", "from → to", "fall of the error (95 %)", "sign test p", "n"])
    yield _row(["---", "---", "---:", "---:", "---:"])
    for gain in document["gains"]:
        fall = f"{number(gain['value'], sign=True)} ({interval(gain, sign=True)})"
        arrow = f"`{gain['from']}` → `{gain['to']}`"
        yield _row([gain["part"], arrow, fall, number(gain["p"], 4), str(gain["n"])])
    if document["verdict"]:
        yield ""
        yield document["verdict"]


def _health(document: dict[str, Any]) -> Iterator[str]:
    yield _row(["figure", "value", "95 %", "n"])
    yield _row(["---", "---:", "---:", "---:"])
    for name, found in document["measures"].items():
        yield _row([name.replace("_", " "), number(found["value"], 3), interval(found, 3), str(found["n"])])


_KINDS = {
    "arms": _arms,
    "curve": _curve,
    "content": _content,
    "kinds": _kinds,
    "gain": _gain,
    "cost": _cost,
    "health": _health,
}


def main() -> None:
    """Fill the tables, or with `--check` only compare."""
    root = Path(__file__).resolve().parent.parent
    stale = []
    for page in pages(root):
        before = page.read_text(encoding="utf-8")
        after = filled(before, root / "docs" / "results")
        if after != before:
            stale.append(page.relative_to(root).as_posix())
            if "--check" not in sys.argv:
                page.write_text(after, encoding="utf-8")
    for page in stale:
        print(f"{page}: {'differs from docs/results' if '--check' in sys.argv else 'written'}")
    if stale and "--check" in sys.argv:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
