"""The contact sheet: a whole run on one picture, rounds as rows, candidates as columns."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont, ImageOps

from ...domain import Candidate, Critique, EmotionTarget, Missing, RunResult
from ...files import replacing

_COLUMNS = 8
_CELL = 200
_GAP = 16
_MARGIN = 32

_PAPER, _INK, _GREY, _RED, _GREEN = "#ffffff", "#1c1c1c", "#6b6b6b", "#b3261e", "#1b7f3b"

#: A line of text: what it says, size in pixels, colour.
_Line = tuple[str, int, str]


def draw_sheet(result: RunResult) -> Image.Image:
    """Draw a run.

    Above each row stands its prompt, or under each picture its own where a round has several; then the target, what was
    read from it, and its reward.
    The best one has a frame.

    Args:
        result: A run whose candidates know where their images lie.

    Returns:
        The sheet, RGB; some 1,800 pixels wide for eight candidates.
    """
    widest = max((len(round.candidates) for round in result.rounds), default=1)
    columns = min(max(widest, 3), _COLUMNS)
    width = columns * _CELL + (columns - 1) * _GAP
    state = result.status.value if result.stop_reason is None else result.stop_reason.value.replace("_", " ")
    facts = f"{state} · run {result.run_id}"
    if result.gain is not None and result.best_gain is not None:
        facts += f" · gain {result.gain:+.2f} (mean), {result.best_gain:+.2f} (best)"
    wanted = f"wanted: {_target(result.target)}"
    parts = [_block([(result.prompt, 28, _INK), (wanted, 18, _INK), (facts, 15, _GREY)], width)]
    for number, round in enumerate(result.rounds):
        mean = "" if round.mean_reward is None else f" · mean reward {round.mean_reward:+.2f}"
        several = len({it.prompt for it in round.candidates}) > 1
        changed = [(f"changed: {round.changes}", 15, _GREY)] if round.changes and not several else []
        told = [] if several else [(round.prompt, 19, _INK)]
        head = [(f"round {number}{mean}", 15, _GREY), *told, *changed]
        parts += [Image.new("RGB", (width, 1), "#d9d9d9"), _block(head, width)]
        for start in range(0, len(round.candidates), _COLUMNS):
            row = round.candidates[start : start + _COLUMNS]
            best = result.best.sha256 if result.best is not None else None
            cells = [_cell(it, result.target, it.sha256 == best, several) for it in row]
            parts.append(_join(cells, down=False))
    parts += [_block([(f"warning: {warning}", 15, _RED)], width) for warning in result.warnings]
    return ImageOps.expand(_join(parts, down=True), _MARGIN, _PAPER)


def save_sheet(result: RunResult, path: Path) -> Path:
    """Draw a run into a PNG file."""
    with replacing(path) as beside:
        draw_sheet(result).save(beside, compress_level=6)
    return path


def _join(parts: Sequence[Image.Image], down: bool) -> Image.Image:
    """Pictures of any size beside or below each other."""
    wide, high = [it.width for it in parts], [it.height for it in parts]
    gaps = _GAP * (len(parts) - 1)
    size = (max(wide), sum(high) + gaps) if down else (sum(wide) + gaps, max(high))
    sheet, place = Image.new("RGB", size, _PAPER), 0
    for part in parts:
        sheet.paste(part, (0, place) if down else (place, 0))
        place += (part.height if down else part.width) + _GAP
    return sheet


def _cell(candidate: Candidate, target: EmotionTarget, best: bool, told: bool) -> Image.Image:
    try:
        picture = ImageOps.pad(candidate.image, (_CELL, _CELL), Image.Resampling.LANCZOS, color=_PAPER)
    except OSError:
        picture = Image.new("RGB", (_CELL, _CELL), "#eeeeee")
    if best:
        ImageDraw.Draw(picture).rectangle((0, 0, _CELL - 1, _CELL - 1), outline=_GREEN, width=5)
    lines = [(candidate.prompt, 14, _INK)] if told else []
    lines.append((f"target  {_target(target)}", 14, _GREY))
    critique = candidate.critique
    if isinstance(critique, Critique):
        category = f" {critique.category.value}" if critique.category else ""
        lines.append((f"read  V {critique.valence:+.1f} A {critique.arousal:+.1f}{category}", 14, _INK))
        if candidate.reward is not None:
            reward = f"reward {candidate.reward:+.2f}, shows {critique.alignment:.1f}"
            lines.append((reward, 14, _GREEN if best else _INK))
    else:
        reason = critique.reason if isinstance(critique, Missing) else "not read yet"
        lines.append((f"no critique: {reason}"[:90], 14, _RED))
    return _join([picture, _block(lines, _CELL)], down=True)


def _target(target: EmotionTarget) -> str:
    axes = zip("VA", target.point, strict=True)
    parts = [f"{axis} {value:+.1f}" for axis, value in axes if value is not None]
    return " ".join([*parts, *([target.category.value] if target.category else [])])


@cache
def _font(size: int) -> Any:
    # DejaVu knows more scripts than Pillow's own font, where the machine has it.
    try:
        return ImageFont.truetype("DejaVuSans.ttf", size)
    except OSError:
        return ImageFont.load_default(size)


def _block(lines: Sequence[_Line], width: int) -> Image.Image:
    """Lines of text, each wrapped to `width`."""
    wrapped = []
    for text, size, colour in lines:
        # By the text's own mean width of a letter, since scripts differ; words without spaces are cut.
        letters = int(0.85 * len(text) * width / max(1, _font(size).getlength(text)))
        wrapped += [(line, size, colour) for line in textwrap.wrap(text, max(1, letters))]
    block = Image.new("RGB", (width, sum(round(size * 1.4) for _, size, _ in wrapped)), _PAPER)
    pen, y = ImageDraw.Draw(block), 0
    for line, size, colour in wrapped:
        pen.text((0, y), line, fill=colour, font=_font(size))
        y += round(size * 1.4)
    return block
