"""What reports, terminal and documents call things, and how they write numbers."""

from __future__ import annotations

from typing import Any

from ..domain import EmotionTarget

#: What the tables call a metric, and how many decimals it needs.
LABELS: dict[str, tuple[str, int]] = {
    "error": ("|ΔV| + |ΔA|", 2),
    "valence_error": ("V-Error", 2),
    "arousal_error": ("A-Error", 2),
    "error_reduction": ("error reduction", 2),
    "amortisation": ("amortisation", 2),
    "emotion_accuracy": ("Emo-A", 2),
    "subject_accuracy": ("subject", 2),
    "alignment": ("alignment", 2),
    "quality": ("CLIP-IQA", 2),
    "aesthetic": ("aesthetic", 2),
    "diversity": ("diversity", 3),
    "reward": ("critic's reward", 2),
    "valence_tau": ("τ valence", 2),
    "arousal_tau": ("τ arousal", 2),
    "smoothness": ("step distance", 3),
    "images": ("images", 1),
    "lvlm_calls": ("LVLM calls", 1),
    "tokens": ("tokens", 0),
    "seconds": ("seconds", 2),
}
COSTS = ("images", "lvlm_calls", "tokens", "seconds")


def number(value: float | None, digits: int = 2, sign: bool = False) -> str:
    """A number for people, with a real minus sign; a dash where there is none."""
    if value is None:
        return "–"
    text = f"{value:{'+' if sign else ''}.{digits}f}"
    # A rounded zero has no sign.
    if float(text) == 0:
        text = text.lstrip("+-")
    return text.replace("-", "\N{MINUS SIGN}")


def interval(found: dict[str, Any], digits: int = 2, sign: bool = False) -> str:
    """`low to high`; a dash where one prompt gave no interval."""
    if found["low"] is None:
        return "–"
    return f"{number(found['low'], digits, sign)} to {number(found['high'], digits, sign)}"


def target_words(target: EmotionTarget) -> str:
    """A target in words."""
    parts = [
        f"{name} {number(value, 1, sign=True)}"
        for name, value in (("valence", target.valence), ("arousal", target.arousal))
        if value is not None
    ]
    return ", ".join([*parts, target.category.value] if target.category else parts)
