"""One neutral prompt, several targets: the lines of such a collection, from which pairs "across" targets are made."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from ..domain import EmotionTarget, UserError, read_target
from ..files import write_atomic
from .collect import read_lines

#: Keys by which a line says its own target.
_OWN = {"target", "valence", "arousal", "category", "emotion"}


def read_targets(text: str) -> list[EmotionTarget]:
    """Targets as a command line has them: categories, or valence/arousal, with commas between.

    Raises:
        UserError: One of them is none.
    """
    found: list[EmotionTarget] = []
    for word in filter(None, map(str.strip, text.split(","))):
        valence, slash, arousal = (part.strip() or None for part in word.partition("/"))
        found.append(
            read_target({"valence": valence, "arousal": arousal} if slash else {"category": valence})
        )
    if not found:
        raise UserError(f"--targets {text!r}: want categories or valence/arousal, as in fear,2/-1")
    return found


def with_targets(source: Path, targets: Sequence[EmotionTarget]) -> Path:
    """Write a file of prompts beside it, in which each line without a target stands once for each of these.

    A prompt has one seed for all targets: what differs in its pictures is then what was asked for.

    Returns:
        `SOURCE.targets.jsonl`; the same each time, so that `collect` goes on with it.

    Raises:
        UserError: The file cannot be read.
    """
    out = source.with_name(f"{source.stem}.targets.jsonl")
    asked = [it for number, line in read_lines(source) for it in _each(number, line.rstrip("\r\n"), targets)]
    write_atomic(out, "".join(f"{it}\n" for it in asked))
    return out


def _each(number: int, line: str, targets: Sequence[EmotionTarget]) -> list[str]:
    try:
        given = json.loads(line)
    except ValueError:
        return [line]
    if not isinstance(given, dict) or given.keys() & _OWN:
        return [line]
    # The line's number decides its seed, so that it stays that of the prompt.
    said = [it.model_dump(mode="json", exclude_none=True) for it in targets]
    return [json.dumps({"line": number, **given, "target": it}, ensure_ascii=False) for it in said]
