"""Who writes for a round, and what they have said so far: in memory here; the loop's keeps it in the log."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from ....domain import Draft


@dataclass(frozen=True)
class Answered:
    """A persona's draft and what it cost.

    Attributes:
        draft: The draft, with a reason where it cannot be used.
        model: The model's name.
        prompt_id: Name and version of the prompt file.
        usage: Tokens.
        seconds: Wall-clock time.
        error: The exception where the model itself failed.
    """

    draft: Draft
    model: str
    prompt_id: str
    usage: dict[str, int] = field(default_factory=dict[str, int])
    seconds: float = 0.0
    error: Exception | None = None


@dataclass
class Panel:
    """The personas of one round.

    Attributes:
        personas: How many are drawn.
        folder: A user's own personas, beside those that are shipped.
        answers: What was answered, by the question's number; such a question is not asked again.
    """

    personas: int = 5
    folder: Path | None = None
    answers: dict[int, Answered] = field(default_factory=dict[int, Answered])

    async def keep(self, number: int, answered: Answered) -> None:
        """Keep an answer, as soon as it is there."""
        self.answers[number] = answered
