"""What a persona answers: its chain of concepts and the prompt that comes of it, as one flat object."""

from __future__ import annotations

from typing import Any

from pydantic import field_validator

from ...schemas import ModelAnswer, Said, flat

#: The chain in order, and the longest that each step may be, in characters.
STEPS = {
    "emotion": 120,
    "appraisal": 240,
    "concepts": 200,
    "objects": 160,
    "action": 120,
    "expression": 120,
    "light": 120,
    "colour": 120,
    "composition": 120,
}


def persona_schema(limit: int) -> dict[str, Any]:
    """The schema of an answer.

    Args:
        limit: Longest prompt, in characters.
    """
    steps = {step: {"type": "string", "maxLength": longest} for step, longest in STEPS.items()}
    return flat(**steps, prompt={"type": "string", "maxLength": limit})


class PersonaAnswer(ModelAnswer):
    """An answer, read leniently: a list counts as words with commas, and a step may be missing.

    Attributes:
        emotion: What is to be felt, in the persona's own words.
        appraisal: What would have to be the case for the persona to feel so.
        concepts: Things and events in which that is so.
        objects: What is seen beside what was asked for.
        action: What happens.
        expression: Faces and posture.
        light: Light, weather, time of day.
        colour: Colours.
        composition: Viewpoint, distance, place in the frame.
        prompt: The prompt, on one line.
    """

    emotion: Said = ""
    appraisal: Said = ""
    concepts: Said = ""
    objects: Said = ""
    action: Said = ""
    expression: Said = ""
    light: Said = ""
    colour: Said = ""
    composition: Said = ""
    prompt: str

    @field_validator(*STEPS, mode="before")
    @classmethod
    def _join(cls, value: str | list[Any]) -> str:
        return ", ".join(map(str, value)) if isinstance(value, list) else value

    @field_validator("prompt")
    @classmethod
    def _one_line(cls, value: str) -> str:
        return " ".join(value.split())

    def said(self) -> dict[str, str]:
        """The steps that were filled in, in order."""
        return {step: words for step in STEPS if (words := getattr(self, step))}
