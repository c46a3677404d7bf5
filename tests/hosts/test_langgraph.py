"""`langgraph dev` and its SDK: many operations at a time, held against the log; and the embedded models, for real."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path
from random import Random

from emoloop.domain import RunStatus
from emoloop.events import ImageGenerated, RunStarted
from emoloop.settings import Settings
from emoloop.traces.fold import Fold
from emoloop.traces.store import open_store
from hosts.operations import KINDS, Claim, Operations

HERE = Path(__file__).parent
COUNT, AT_ONCE = 200, 8


async def carry_out(url: str, seed: int, kinds: list[str]) -> list[Claim]:
    """The operations, some at a time; their claims."""
    slots = asyncio.Semaphore(AT_ONCE)
    claims: list[Claim] = []

    async def one(number: int, kind: str) -> str | None:
        async with slots:
            try:
                operations = Operations(url, f"a dog {number}", Random(seed + number))
                claims.extend(await asyncio.wait_for(getattr(operations, kind)(), 600))
            except Exception as error:
                return f"{kind} {number}: {error!r}"

    wrong = await asyncio.gather(*(one(number, kind) for number, kind in enumerate(kinds)))
    assert not [it for it in wrong if it], "\n".join(it for it in wrong if it)
    return claims


def check(claims: list[Claim], folder: Path) -> None:
    """Every run that was asked for is in the log, whole, by itself; no other; and no error but the user's."""
    errors = re.findall(
        r"encountered an error in graph: <class '(.+?)'>", (folder / "server.log").read_text()
    )
    assert set(errors) <= {"emoloop.domain.UserError"}
    assert not (folder / "home" / "events.db-wal").exists(), "the log was not closed"
    with open_store(Settings(home=folder / "home"), read_only=True) as store:
        logs = {row.run_id: store.events(row.run_id) for row in store.runs()}
    assert sorted(logs) == sorted({claim.run_id for claim in claims})
    for claim in claims:
        events = logs[claim.run_id]
        fold = Fold(claim.run_id, events)
        assert [event.seq for event in events] == list(range(len(events)))
        [started] = [event for event in events if isinstance(event, RunStarted)]
        assert started.prompt == claim.prompt
        assert claim.parent is None or started.settings["parent"]["run_id"] == claim.parent
        for number in fold.numbers:
            painted = {e.prompt for e in events if isinstance(e, ImageGenerated) and e.round == number}
            wanted = claim.prompts.get(number) or fold.prompt(number)
            assert painted <= {wanted}, claim
            assert number or wanted == (claim.prompts.get(0) or claim.prompt)
        if claim.told is not None:
            assert [(it["run_id"], it["seq"]) for it in claim.told] == [(e.run_id, e.seq) for e in events]
        if claim.values is not None:
            assert fold.status is RunStatus(claim.values["status"]) is RunStatus.COMPLETED
            for number, round in enumerate(claim.values["rounds"]):
                made = [it.made.sha256 for _, it in sorted(fold.round(number).items()) if it.made]
                assert (round["prompt"], round["images"]) == (fold.prompt(number), made)
            assert fold.best and fold.tried[fold.best].made.sha256 == claim.values["best"]["sha256"]


async def test_operations_of_all_kinds_at_once(langgraph_dev, tmp_path):
    draw = Random(20)
    kinds = [*KINDS, *draw.choices(KINDS, k=COUNT - len(KINDS))]
    draw.shuffle(kinds)
    with langgraph_dev(str(HERE / "served.py") + ":graph") as url:
        claims = await carry_out(url, 20, kinds)
    check(claims, tmp_path)


async def test_the_embedded_models_from_the_first_requests_on(langgraph_dev, tmp_path):
    """The first requests arrive together, while the models are being loaded."""
    with langgraph_dev() as url:
        claims = await carry_out(url, 1, ["together", "streamed", "reviewed", "pictured"])
    check(claims, tmp_path)
