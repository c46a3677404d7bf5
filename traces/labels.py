"""Labels and favourites of a run and its pictures: a fold of what people said, and the rows of the table."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

from sqlalchemy import Connection, delete, insert, select

from ..events import FAVOURITE, HumanFeedback
from .schema import labels


class Labels:
    """What a run and its pictures are called after the feedback that was applied.

    Attributes:
        held: By SHA-256 of the picture; those of the run as a whole by "".
    """

    def __init__(self) -> None:
        self.held: defaultdict[str, set[str]] = defaultdict(set)

    def apply(self, event: HumanFeedback) -> None:
        """Take the run's next feedback: the last word on the labels stands, and the last on the favourite."""
        held = self.held[event.sha256 or ""]
        if event.labels is not None:
            held.intersection_update({FAVOURITE})
            held.update(event.labels)
        if event.favourite is not None:
            (held.add if event.favourite else held.discard)(FAVOURITE)

    @property
    def names(self) -> list[str]:
        """Those of the run and of its pictures."""
        return sorted(set[str]().union(*self.held.values()))

    def write(self, connection: Connection, run_id: str) -> None:
        """Put the run's rows in place of those that are there."""
        connection.execute(delete(labels).where(labels.c.run_id == run_id))
        rows = [
            {"run_id": run_id, "sha256": sha256, "label": label}
            for sha256, held in self.held.items()
            for label in held
        ]
        if rows:
            connection.execute(insert(labels), rows)


def of_runs(connection: Connection, run_ids: Iterable[str]) -> defaultdict[str, list[str]]:
    """The labels of runs and of their pictures, by run."""
    query = select(labels.c.run_id, labels.c.label).distinct().order_by(labels.c.label)
    found: defaultdict[str, list[str]] = defaultdict(list)
    for run_id, label in connection.execute(query.where(labels.c.run_id.in_(run_ids))):
        found[run_id].append(label)
    return found
