"""The personas of a run's round: their answers are events, so that a run that broke off asks none of them again."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

from ..agents.rewriters.mc_agent.panel import Answered, Panel
from ..events import Event, PersonaAnswered
from ..traces.fold import Fold


class LoggedPanel(Panel):
    """A panel over the log.

    Attributes:
        error: What went wrong with a question that shall be asked again when the node is.

    Args:
        fold: The run.
        number: The round.
        node: The node's name in this attempt at the run: what failed in an earlier one is asked again.
        options: The run's.
        folder: A user's own personas.
        record: Commits an event.
        again: Whether the node will be tried again after an error.
    """

    def __init__(
        self,
        fold: Fold,
        number: int,
        node: str,
        options: Mapping[str, Any],
        folder: Path | None,
        record: Callable[[Event], Awaitable[object]],
        again: Callable[[Exception | None], bool],
    ) -> None:
        known = fold.drafts.get(number, {}).items()
        answers = {
            index: Answered(it.draft, it.model, it.prompt_version)
            for index, it in known
            if it.draft.reason is None or it.node == node
        }
        super().__init__(options.get("personas", 5), folder, answers)
        self.error: Exception | None = None
        self._place: dict[str, Any] = {"run_id": fold.run_id, "round": number, "node": node}
        self._record, self._again = record, again

    async def keep(self, number: int, answered: Answered) -> None:
        """Commit an answer; one that failed by a passing trouble is left to the next attempt."""
        if self._again(answered.error):
            self.error = answered.error
            return
        await super().keep(number, answered)
        event = PersonaAnswered(
            **self._place,
            index=number,
            draft=answered.draft,
            model=answered.model,
            prompt_version=answered.prompt_id,
            usage=answered.usage,
            seconds=round(answered.seconds, 4),
        )
        await self._record(event)
