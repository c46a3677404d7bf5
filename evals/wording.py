"""What reports, terminal and documents call things, and how they write numbers."""

from __future__ import annotations

from typing import Any, NamedTuple

from ..domain import EmotionTarget

#: Counts of images at which the error is told.
IMAGES = (1, 2, 4, 8, 12, 24)


class Metric(NamedTuple):
    """How a metric is shown."""

    label: str
    digits: int = 2
    less_is_better: bool = False


#: The metrics in the order of the report.
METRICS: dict[str, Metric] = {
    "error": Metric("|ΔV| + |ΔA|", less_is_better=True),
    "valence_error": Metric("V-Error", less_is_better=True),
    "arousal_error": Metric("A-Error", less_is_better=True),
    "guard_error": Metric("guard's |ΔV| + |ΔA|", less_is_better=True),
    "dispute": Metric("judge − guard", less_is_better=True),
    "bias": Metric("bias", less_is_better=True),
    "spread": Metric("spread", less_is_better=True),
    "error_reduction": Metric("error reduction"),
    "amortisation": Metric("amortisation"),
    "emotion_accuracy": Metric("Emo-A"),
    "subject_accuracy": Metric("subject"),
    "alignment": Metric("alignment"),
    "content_kept": Metric("content kept"),
    "drift": Metric("drift", less_is_better=True),
    "quality": Metric("CLIP-IQA"),
    "aesthetic": Metric("aesthetic"),
    "preference": Metric("preference"),
    "diversity": Metric("diversity", 3),
    "sensitivity": Metric("sensitivity"),
    "distinct_2": Metric("distinct-2"),
    "self_bleu": Metric("self-BLEU", less_is_better=True),
    "recipe_share": Metric("three recipes", less_is_better=True),
    "drawability_violations": Metric("undrawable words", less_is_better=True),
    "reward": Metric("critic's reward"),
    "estimate_bias": Metric("estimate bias", less_is_better=True),
    "paraphrase_gap": Metric("paraphrase gap", less_is_better=True),
    "valence_tau": Metric("τ valence"),
    "arousal_tau": Metric("τ arousal"),
    "smoothness": Metric("step distance", 3, less_is_better=True),
    **{f"error_at_{images}": Metric(f"|ΔV| + |ΔA| at {images}", less_is_better=True) for images in IMAGES},
    "images_to_target": Metric("images to target", 1, less_is_better=True),
    "images": Metric("images", 1, less_is_better=True),
    "lvlm_calls": Metric("LVLM calls", 1, less_is_better=True),
    "tokens": Metric("tokens", 0, less_is_better=True),
    "seconds": Metric("seconds", less_is_better=True),
}
CURVE = tuple(f"error_at_{images}" for images in IMAGES)
COSTS = ("images_to_target", "images", "lvlm_calls", "tokens", "seconds")


def number(value: float | None, digits: int = 2, sign: bool = False) -> str:
    """A number for people, with a real minus sign; a dash where there is none."""
    if value is None:
        return "–"
    # z: a rounded zero has no minus.
    text = f"{value:{'+' if sign else ''}z.{digits}f}"
    return (text.lstrip("+") if float(text) == 0 else text).replace("-", "\N{MINUS SIGN}")


def interval(found: dict[str, Any], digits: int = 2, sign: bool = False) -> str:
    """`low to high`; a dash where one prompt gave no interval."""
    if found["low"] is None:
        return "–"
    return f"{number(found['low'], digits, sign)} to {number(found['high'], digits, sign)}"


def shown(found: dict[str, Any] | None, digits: int, between: str = " ") -> str:
    """`value (low to high)`; a dash where an arm has no such metric."""
    if found is None:
        return number(None)
    return f"{number(found['value'], digits)}{between}({interval(found, digits)})"


def target_words(target: EmotionTarget) -> str:
    """A target in words."""
    parts = [
        f"{name} {number(value, 1, sign=True)}"
        for name, value in (("valence", target.valence), ("arousal", target.arousal))
        if value is not None
    ]
    return ", ".join([*parts, target.category.value] if target.category else parts)
