"""The answers that agents give: JSON schemas for decoders, and readers for what comes back.

Version 1 is frozen: the embedded model was trained on it and logged critiques refer to it. One flat object,
the reasoning before the numbers (numbers that come at once are four times worse), numbers as strings of one
fixed shape so that their tokens can be read as scores. The readers take more than the schemas allow, because
a model without a grammar writes 1.5 where "+1.5" was asked for.
"""

from __future__ import annotations

import math
import re
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, field_validator, model_validator

from ..domain import HIGH, LOW, Critique, Emotion, EmotionTarget

SCHEMA_VERSION = 1

_SCORE = {"type": "string", "pattern": r"^[+-][0-3]\.[0-9]$"}


def flat(**properties: dict[str, Any]) -> dict[str, Any]:
    """The schema of one flat object, all of whose properties are required, in this order."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


CRITIC_SCHEMA: dict[str, Any] = flat(
    analysis={"type": "string", "maxLength": 400},
    valence=_SCORE,
    arousal=_SCORE,
    category={"type": "string", "enum": [emotion.value for emotion in Emotion]},
    alignment={"type": "string", "pattern": r"^[01]\.[0-9]$"},
    suggestion={"type": "string", "maxLength": 200},
)

#: Longest prompt a rewriter may write, in characters.
PROMPT_LIMIT = 400

REWRITER_SCHEMA: dict[str, Any] = flat(
    why={"type": "string", "maxLength": 300},
    changes={"type": "string", "maxLength": 200},
    prompt={"type": "string", "maxLength": PROMPT_LIMIT},
)


def several_schema(limit: int, most: int) -> dict[str, Any]:
    """The schema of several rewrites in one answer.

    Args:
        limit: Longest prompt, in characters.
        most: Most prompts.
    """
    one = flat(changes={"type": "string", "maxLength": 200}, prompt={"type": "string", "maxLength": limit})
    return flat(
        why={"type": "string", "maxLength": 300}, prompts={"type": "array", "items": one, "maxItems": most}
    )


def response_format(name: str, schema: dict[str, Any]) -> dict[str, Any]:
    """A schema as OpenAI-compatible servers and the embedded engine take it."""
    return {"type": "json_schema", "json_schema": {"name": name, "schema": schema, "strict": True}}


def signed(value: float) -> str:
    """A score as the schemas write it: sign, digit, one decimal; minus zero is plus zero."""
    text = f"{value:+.1f}"
    return "+0.0" if text == "-0.0" else text


def target_text(target: EmotionTarget) -> str:
    """A target in words: "valence +2.0 arousal -1.0 category awe", without what is not wanted."""
    parts = [
        f"{name} {signed(value)}"
        for name, value in zip(("valence", "arousal"), target.point, strict=True)
        if value is not None
    ]
    if target.category is not None:
        parts.append(f"category {target.category.value}")
    return " ".join(parts)


_NUMBER = re.compile(r"[+-]?\d+(\.\d+)?")


def _number(value: Any) -> float:
    # Unicode's minus sign is what many models print.
    text = str(value).strip().replace("\N{MINUS SIGN}", "-")
    if isinstance(value, bool) or not _NUMBER.fullmatch(text):
        raise ValueError(f"a number such as +1.5 is wanted, not {value!r}")
    return float(text)


def _clipped(number: float, low: float, high: float) -> float:
    # The schemas' patterns reach 0.9 beyond the scale ("+3.4", "1.2"): rounding up, so it counts as the end.
    # Anything further is another scale, and guessing which would invent data.
    if not low - 0.95 < number < high + 0.95:
        raise ValueError(f"{number:g} lies outside [{low:g}, {high:g}]")
    return min(max(number, low), high)


#: Terminal sequences; then lone surrogates, controls other than tab and line ends, and marks that reverse text.
_UNSAFE = re.compile(
    r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)?)"
    r"|[\ud800-\udfff\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]"
)

#: Text beside the prompt. The schemas allow 400 characters at most; a model without a grammar may say more.
Said = Annotated[str, StringConstraints(max_length=4000)]


def cleaned(text: str) -> str:
    """What a model wrote, without what no prompt, log or terminal may get."""
    return _UNSAFE.sub("", text)


class ModelAnswer(BaseModel):
    """Common to all answers: unknown keys are ignored, text is cleaned."""

    model_config = ConfigDict(extra="ignore")

    @field_validator("*", mode="before")
    @classmethod
    def _clean(cls, value: Any) -> Any:
        return cleaned(value) if isinstance(value, str) else value


class CriticAnswer(ModelAnswer):
    """A critic's answer, read leniently.

    Attributes:
        analysis: What is seen.
        valence: In [-3, 3].
        arousal: In [-3, 3].
        category: One of the eight.
        alignment: In [0, 1].
        suggestion: What would help.
    """

    analysis: Said = ""
    valence: float
    arousal: float
    category: Emotion
    alignment: float
    suggestion: Said = ""

    @field_validator("valence", "arousal", mode="before")
    @classmethod
    def _read_score(cls, value: Any) -> float:
        return _clipped(_number(value), LOW, HIGH)

    @field_validator("alignment", mode="before")
    @classmethod
    def _read_alignment(cls, value: Any) -> float:
        number = _number(value)
        if number < 0:
            raise ValueError(f"{number:g} lies outside [0, 1]")
        return _clipped(number, 0.0, 1.0)

    @field_validator("category", mode="before")
    @classmethod
    def _read_category(cls, value: Any) -> Any:
        return value.strip().lower() if isinstance(value, str) else value

    def critique(self) -> Critique:
        """The same as the domain type."""
        return Critique(**self.model_dump())


class RewriterAnswer(ModelAnswer):
    """A rewriter's answer, read leniently.

    Attributes:
        why: Its reason.
        changes: What it changed.
        prompt: The new prompt, on one line; may be empty or too long, which the rewriter judges.
    """

    why: Said = ""
    changes: Said = ""
    prompt: str

    @field_validator("why", "changes", mode="before")
    @classmethod
    def _join(cls, value: Any) -> Any:
        return cleaned("; ".join(map(str, value))) if isinstance(value, list) else value

    @field_validator("prompt")
    @classmethod
    def _one_line(cls, value: str) -> str:
        return " ".join(value.split())


class RewriterAnswers(ModelAnswer):
    """Several rewrites in one answer, read leniently.

    Attributes:
        why: The reason behind all of them.
        prompts: At least one; a prompt may stand as plain text, and a single one in place of the list.
    """

    why: Said = ""
    prompts: Annotated[list[RewriterAnswer], Field(min_length=1)]

    @model_validator(mode="before")
    @classmethod
    def _list(cls, data: Any) -> Any:
        return {**data, "prompts": [data]} if isinstance(data, dict) and "prompt" in data else data

    @field_validator("prompts", mode="before")
    @classmethod
    def _objects(cls, value: Any) -> Any:
        return (
            [{"prompt": it} if isinstance(it, str) else it for it in value]
            if isinstance(value, list)
            else value
        )


def average(answers: list[Critique]) -> Critique:
    """The mean of several critiques of one picture, with its spread.

    Text comes from the answer nearest to the mean, so that words and numbers fit together; the category is
    the most frequent one, the nearer answer's at a tie.

    Args:
        answers: At least one.
    """
    if len(answers) == 1:
        return answers[0]
    count = len(answers)
    valence = sum(a.valence for a in answers) / count
    arousal = sum(a.arousal for a in answers) / count
    by_distance = sorted(answers, key=lambda a: math.hypot(a.valence - valence, a.arousal - arousal))
    categories = [a.category for a in by_distance]
    return Critique(
        analysis=by_distance[0].analysis,
        valence=valence,
        arousal=arousal,
        category=max(categories, key=categories.count),
        alignment=sum(a.alignment for a in answers) / count,
        suggestion=by_distance[0].suggestion,
        samples=count,
        valence_spread=math.sqrt(sum((a.valence - valence) ** 2 for a in answers) / count),
        arousal_spread=math.sqrt(sum((a.arousal - arousal) ** 2 for a in answers) / count),
    )
