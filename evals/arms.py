"""Arms: the ways to answer a request that a suite compares.

An arm is an async function `(kit, request, seed, name) -> Delivery`. All arms of a suite get the same seed
for a request, and take their noise from the loop's own seeds, so that the loop's round 0 is the base arm's
images and best-of-N begins with them. Arms that do not select hand over all their images (the figure is the
mean, what one image is expected to be); arms that select hand over one, picked by the critic's reward.

The controls are what makes a gain mean something: best-of-N at the loop's image budget (is it selection?),
one rewrite without feedback (is it knowing the words?), both together (does feedback add anything?), and
the teacher (what of it could weights learn?).
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..domain import RunResult, RunStatus, UserError
from ..events import Critiqued, Rewritten
from ..tools.registry import resolve
from .cache import digest
from .kit import Kit, Take
from .records import Cost, Delivery, Revision, Shot
from .suites import Request

Answer = Callable[[Kit, Request, int, str], Awaitable[Delivery]]


async def base(kit: Kit, request: Request, seed: int, name: str = "base") -> Delivery:
    """The neutral prompt as it is (with an adapter in the kit: one pass that knows the target)."""
    take = Take(kit, name, request, seed)
    await take.round(request.prompt)
    return await take.all()


async def rewrite(kit: Kit, request: Request, seed: int, name: str = "rewrite") -> Delivery:
    """One rewrite without feedback."""
    take = Take(kit, name, request, seed)
    await take.round(await take.rewrite())
    return await take.all()


async def best_of_n(kit: Kit, request: Request, seed: int, name: str = "best_of_n") -> Delivery:
    """The critic's favourite among as many images of the neutral prompt as the loop may make."""
    take = Take(kit, name, request, seed)
    for number in range(kit.rounds):
        await take.round(request.prompt, number)
    return await take.best()


async def rewrite_best_of_n(
    kit: Kit, request: Request, seed: int, name: str = "rewrite_best_of_n"
) -> Delivery:
    """One rewrite without feedback, then the favourite among the loop's budget of images."""
    take = Take(kit, name, request, seed)
    prompt = await take.rewrite()
    for number in range(kit.rounds):
        await take.round(prompt, number)
    return await take.best()


async def loop(kit: Kit, request: Request, seed: int, name: str = "loop") -> Delivery:
    """The whole loop; its pick over all rounds."""
    run_id = Take(kit, name, request, seed).run_id
    result = await kit.loop.run(request.prompt, request.target, seed=seed, run_id=run_id)
    usages = [
        (event.usage, isinstance(event, Critiqued))
        for event in await kit.recorder.events(run_id)
        if isinstance(event, Critiqued | Rewritten)
    ]
    read = sum(critic for _, critic in usages)
    cost = Cost(
        critiques=read,
        rewrites=len(usages) - read,
        samples=kit.critic.samples,
        tokens=sum(usage.get("total_tokens", 0) for usage, _ in usages),
    )
    return _picked(name, request, result, cost, kit.images)


def _picked(name: str, request: Request, result: RunResult, cost: Cost, images: int) -> Delivery:
    shots: list[Shot] = []
    delivered: list[int] = []
    revisions: list[Revision] = []
    kept = set(Shot.model_fields)
    for number, round in enumerate(result.rounds):
        if number:
            revisions.append(
                Revision(round=number, prompt=round.prompt, changes=round.changes, why=round.why)
            )
        for candidate in round.candidates:
            if result.best and (candidate.round, candidate.index) == (result.best.round, result.best.index):
                delivered.append(len(shots))
            shots.append(Shot.model_validate(candidate.model_dump(include=kept)))
    failure = None
    if result.status is not RunStatus.COMPLETED or not delivered:
        # A run that broke off may have a best candidate, out of less than the other arms chose from.
        failure = result.warnings[-1] if result.warnings else f"{result.status}: {result.stop_reason}"
    return Delivery(
        arm=name,
        request=request.id,
        prompt=result.best.prompt if result.best and not failure else request.prompt,
        shots=shots,
        delivered=[] if failure else delivered,
        revisions=revisions,
        run_id=result.run_id,
        cost=cost.model_copy(update={"images": len(shots)}),
        failure=failure,
        complete=all(len(round.candidates) == images for round in result.rounds),
    )


async def teacher(kit: Kit, request: Request, seed: int, name: str = "teacher") -> Delivery:
    """Fresh images of the prompt that the loop found: its gain without its selection.

    Their noise is none that the loop has seen, because the prompt was chosen by what it did with that.
    """
    found = await deliver(ARMS["loop"], "loop", kit, request, seed)
    if found.failure:
        return found.model_copy(update={"arm": name})
    take = Take(kit, name, request, seed)
    take.revisions = [revision for revision in found.revisions if revision.prompt == found.prompt]
    await take.round(found.prompt, seeds=kit.seeds(seed, kit.rounds + 1000))
    made = await take.all()
    # To have the prompt one has to run the loop; the image comes on top.
    cost = found.cost.model_copy(update={"images": found.cost.images + 1})
    return made.model_copy(update={"cost": cost, "complete": made.complete and found.whole})


#: Arms by name.
ARMS: dict[str, Answer] = {
    "base": base,
    "rewrite": rewrite,
    "best_of_n": best_of_n,
    "rewrite_best_of_n": rewrite_best_of_n,
    "teacher": teacher,
    "loop": loop,
}


@dataclass(frozen=True)
class Arm:
    """An arm with its name and the weights it runs on.

    Attributes:
        name: In figures and tables.
        answer: The function.
        adapter: Distilled artifact that the generator carries; None is the base model.
        version: Tells versions of a user's arm apart, for the cache.
    """

    name: str
    answer: Answer
    adapter: Path | None = None
    version: str = "1"


def load_arm(spec: str, adapters: dict[str, Path]) -> Arm:
    """An arm from how it is written on the command line or in a suite.

    Args:
        spec: A name in `ARMS`; a name in `adapters` (one pass of the neutral prompt on those weights);
            `loop_on_NAME` (the loop on them); a dotted path to a function like those here; any of these may
            be given a name of its own, `mine=pkg.mod:arm`, and `mine=FOLDER` is an adapter.
        adapters: Name → artifact folder.

    Raises:
        UserError: None of these, or an adapter that is not there.
    """
    name, given, what = spec.partition("=")
    if not given:
        name, what = spec.rpartition(":")[2], spec
    if not re.fullmatch(r"[\w.+-]+", name):
        raise UserError(f"arm name {name!r}: letters, digits and . + - _ are allowed")
    on_adapter = what.removeprefix("loop_on_")
    if what in ARMS:
        return Arm(name, ARMS[what])
    if on_adapter in adapters:
        return Arm(name, base if on_adapter == what else loop, _there(adapters[on_adapter]))
    if on_adapter == "adapter":
        raise UserError(f"arm {what!r} needs an adapter: --adapter DIR")
    if given and ":" not in what:
        return Arm(name, base, _there(Path(what)))
    known = {**ARMS, **dict.fromkeys(adapters, base)}
    found: Any = resolve(what, known, "arm")
    if not inspect.iscoroutinefunction(found) and not inspect.iscoroutinefunction(type(found).__call__):
        raise UserError(f"arm {what!r} is not an async function (kit, request, seed, name) -> Delivery")
    return Arm(name, found, version=f"{what}@{getattr(found, 'version', 1)}")


def _there(folder: Path) -> Path:
    if not folder.exists():
        raise UserError(f"no adapter at {folder}")
    return folder


async def deliver(
    answer: Answer, name: str, kit: Kit, request: Request, seed: int, version: str = "1"
) -> Delivery:
    """What the arm hands over for the request, from the cache where it is known.

    Only what is whole is kept: a failure, or a delivery with an image unmade or unread, is tried again next
    time.
    """
    budget = [kit.images, kit.rounds]
    key = digest("delivery", name, version, request.model_dump(mode="json"), seed, budget, kit.identity)

    async def make() -> dict[str, Any]:
        made = await answer(replace(kit, version=version), request, seed, name)
        if not made.whole:
            raise _NotKept(made)
        return made.model_dump(mode="json")

    def images_are_there(document: Any) -> bool:
        return all(kit.generator.blobs.path(shot["sha256"]).exists() for shot in document["shots"])

    try:
        return Delivery.model_validate(await kit.cache.once(key, make, images_are_there))
    except _NotKept as error:
        return error.delivery


class _NotKept(Exception):
    def __init__(self, delivery: Delivery) -> None:
        super().__init__(delivery.failure)
        self.delivery = delivery
