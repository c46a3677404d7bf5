"""The contact sheet: a whole run on one picture, rounds as rows, candidates as columns."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from ...domain import Candidate, Critique, EmotionTarget, Missing, Round, RunResult
from ...files import replacing

_COLUMNS = 8
_CELL = 200
_GAP = 16
_MARGIN = 32

_PAPER, _INK, _GREY, _RED, _GREEN = "#ffffff", "#1c1c1c", "#6b6b6b", "#b3261e", "#1b7f3b"


def draw_sheet(result: RunResult) -> Image.Image:
    """Draw a run.

    Above each row stands its prompt; under each picture the target, what was read from it, and its reward.
    The best one has a frame.

    Args:
        result: A run whose candidates know where their images lie.

    Returns:
        The sheet, RGB; some 1,800 pixels wide for eight candidates.
    """
    widest = max((min(len(round.candidates), _COLUMNS) for round in result.rounds), default=1)
    columns = max(widest, 3)
    width = 2 * _MARGIN + columns * _CELL + (columns - 1) * _GAP
    # Drawn twice, first on nothing: the first pass finds the height.
    height = _draw(Image.new("RGB", (1, 1)), result, width)
    sheet = Image.new("RGB", (width, height), _PAPER)
    _draw(sheet, result, width)
    return sheet


def save_sheet(result: RunResult, path: Path) -> Path:
    """Draw a run into a PNG file."""
    with replacing(path) as beside:
        draw_sheet(result).save(beside, compress_level=6)
    return path


def _draw(sheet: Image.Image, result: RunResult, width: int) -> int:
    pen = ImageDraw.Draw(sheet)
    inner = width - 2 * _MARGIN
    y = _text(pen, _MARGIN, _MARGIN, result.prompt, 28, _INK, inner) + 6
    y = _text(pen, _MARGIN, y, f"wanted: {_target(result.target)}", 18, _INK, inner) + 4
    state = result.status.value if result.stop_reason is None else result.stop_reason.value.replace("_", " ")
    facts = f"{state} · run {result.run_id}"
    if result.gain is not None and result.best_gain is not None:
        facts += f" · gain {result.gain:+.2f} (mean), {result.best_gain:+.2f} (best)"
    y = _text(pen, _MARGIN, y, facts, 15, _GREY, inner)
    for number, round in enumerate(result.rounds):
        y += 28
        pen.line((_MARGIN, y, width - _MARGIN, y), fill="#d9d9d9", width=1)
        y = _row(sheet, pen, y + 14, number, round, result, inner)
    for warning in result.warnings:
        y = _text(pen, _MARGIN, y + 14, f"warning: {warning}", 15, _RED, inner)
    return y + _MARGIN


def _row(
    sheet: Image.Image, pen: Any, y: int, number: int, round: Round, result: RunResult, inner: int
) -> int:
    mean = "" if round.mean_reward is None else f" · mean reward {round.mean_reward:+.2f}"
    y = _text(pen, _MARGIN, y, f"round {number}{mean}", 15, _GREY, inner) + 4
    y = _text(pen, _MARGIN, y, round.prompt, 19, _INK, inner)
    if round.changes:
        y = _text(pen, _MARGIN, y + 4, f"changed: {round.changes}", 15, _GREY, inner)
    y += 12
    for start in range(0, len(round.candidates), _COLUMNS):
        bottom = y
        for place, candidate in enumerate(round.candidates[start : start + _COLUMNS]):
            best = result.best is not None and candidate.sha256 == result.best.sha256
            x = _MARGIN + place * (_CELL + _GAP)
            bottom = max(bottom, _cell(sheet, pen, x, y, candidate, result.target, best))
        y = bottom + _GAP
    return y - (_GAP if round.candidates else 0)


def _cell(
    sheet: Image.Image, pen: Any, x: int, y: int, candidate: Candidate, target: EmotionTarget, best: bool
) -> int:
    if sheet.width > 1:
        image = _thumbnail(candidate)
        sheet.paste(image, (x + (_CELL - image.width) // 2, y + (_CELL - image.height) // 2))
    if best:
        pen.rectangle((x - 5, y - 5, x + _CELL + 4, y + _CELL + 4), outline=_GREEN, width=5)
    y = _text(pen, x, y + _CELL + 8, f"target  {_target(target)}", 14, _GREY, _CELL)
    critique = candidate.critique
    if isinstance(critique, Critique):
        category = f" {critique.category.value}" if critique.category else ""
        read = f"read  V {critique.valence:+.1f} A {critique.arousal:+.1f}{category}"
        y = _text(pen, x, y + 2, read, 14, _INK, _CELL)
    else:
        reason = critique.reason if isinstance(critique, Missing) else "not read yet"
        y = _text(pen, x, y + 2, f"no critique: {reason}"[:90], 14, _RED, _CELL)
    if candidate.reward is not None and isinstance(critique, Critique):
        text = f"reward {candidate.reward:+.2f}, shows {critique.alignment:.1f}"
        y = _text(pen, x, y + 2, text, 14, _GREEN if best else _INK, _CELL)
    return y


def _thumbnail(candidate: Candidate) -> Image.Image:
    try:
        image = candidate.image
    except OSError:
        return Image.new("RGB", (_CELL, _CELL), "#eeeeee")
    scale = _CELL / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.resize(size, Image.Resampling.LANCZOS if scale < 1 else Image.Resampling.BICUBIC)


def _target(target: EmotionTarget) -> str:
    valence, arousal = target.point
    parts = [
        f"V {valence:+.1f}" if valence is not None else "",
        f"A {arousal:+.1f}" if arousal is not None else "",
    ]
    parts.append(target.category.value if target.category else "")
    return " ".join(part for part in parts if part)


@cache
def _font(size: int) -> Any:
    # DejaVu knows more scripts than Pillow's own font, where the machine has it.
    try:
        return ImageFont.truetype("DejaVuSans.ttf", size)
    except OSError:
        return ImageFont.load_default(size)


def _text(pen: Any, x: int, y: int, text: str, size: int, colour: str, width: int) -> int:
    """Write text wrapped to `width`; return where the next line may begin."""
    font = _font(size)
    for line in _wrapped(text, font, width):
        pen.text((x, y), line, fill=colour, font=font)
        y += round(size * 1.3)
    return y


def _wrapped(text: str, font: Any, width: int) -> list[str]:
    lines: list[str] = []
    line = ""
    for word in text.split():
        longer = f"{line} {word}".strip()
        if line and font.getlength(longer) > width:
            lines.append(line)
            longer = word
        # A word wider than the column is cut, as a language without spaces needs.
        while font.getlength(longer) > width and len(longer) > 1:
            keep = max(1, int(len(longer) * width / font.getlength(longer)) - 1)
            lines.append(longer[:keep])
            longer = longer[keep:]
        line = longer
    return [*lines, line] if line else lines or [""]
