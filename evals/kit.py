"""What arms work with: one generator, critic, rewriter and loop, with everything made kept by content.

The kit stands between arms and models so that equal work is done once, whoever asks: images by (weights,
prompt, seed, target where the weights know targets), critiques by (critic, image, prompt, target), rewrites
by (rewriter, prompt, target). Base images thus serve as the loop's round 0 and as the first third of
best-of-N, and a second evaluation makes only what is new.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..agents.critic import valued
from ..domain import Critique, EmotionTarget, Missing, RunStatus, StopReason
from ..events import Critiqued, Event, ImageGenerated, Rewarded, Rewritten, RunFinished, RunStarted
from ..graph.state import candidate_seed
from ..settings import Settings
from ..tools.images.base import GeneratedImage, GenerationError, ImageRequest
from .cache import Cache, digest
from .records import Cost, Delivery, Revision, Shot
from .suites import Request

if TYPE_CHECKING:
    from ..agents.critic import Critic
    from ..agents.rewriter import Rewriter
    from ..graph.loop import Loop
    from ..tools.images.base import Generator, UnknownWord
    from ..tools.reward import Reward
    from ..traces.blobs import BlobStore
    from ..traces.recorder import StoreRecorder

#: What decides the bits of an image, out of `Generator.describe()`; versions and device are left out on
#: purpose. An adapter's id says its scale.
_DECISIVE = (
    "model",
    "revision",
    "adapter",
    "pipeline",
    "dtype",
    "steps",
    "guidance",
    "height",
    "width",
    "negative_prompt",
    "call",
)


@dataclass(frozen=True)
class Made:
    """An image in the blob store and how it came about."""

    sha256: str
    provenance: dict[str, Any]


class CachedGenerator:
    """A generator that remembers. It is one itself, so the loop runs on it unchanged.

    Args:
        inner: Makes what is new.
        cache: Remembers addresses.
        blobs: Holds the pictures.
    """

    def __init__(self, inner: Generator, cache: Cache, blobs: BlobStore) -> None:
        self.inner, self.cache, self.blobs = inner, cache, blobs
        self.identity = {key: value for key, value in inner.describe().items() if key in _DECISIVE}
        self.fresh = 0

    async def made(self, requests: Sequence[ImageRequest]) -> list[Made | BaseException]:
        """Addresses in the order of the requests; an exception stands where an image could not be made."""
        return await asyncio.gather(*(self._one(request) for request in requests), return_exceptions=True)

    async def _one(self, request: ImageRequest) -> Made:
        target = request.target if self.identity.get("adapter") else None
        key = digest(
            "image",
            self.identity,
            request.prompt,
            request.seed,
            request.negative_prompt,
            target and target.model_dump(mode="json"),
        )

        async def make() -> dict[str, Any]:
            [image] = await self.inner.generate([request])
            self.fresh += 1
            sha256 = await asyncio.to_thread(self.blobs.put_image, image.image)
            return {"sha256": sha256, "provenance": image.provenance}

        return Made(**await self.cache.once(key, make, lambda kept: self.blobs.path(kept["sha256"]).exists()))

    async def generate(self, requests: Sequence[ImageRequest]) -> list[GeneratedImage]:
        """See `tools.generator.Generator`."""

        async def opened(made: Made | BaseException, request: ImageRequest) -> GeneratedImage | BaseException:
            if isinstance(made, BaseException):
                return made
            image = await asyncio.to_thread(self.blobs.get_image, made.sha256)
            return GeneratedImage(image, request, made.provenance)

        results = await asyncio.gather(*map(opened, await self.made(requests), requests))
        good = [result for result in results if isinstance(result, GeneratedImage)]
        if len(good) < len(results):
            raise GenerationError(results)
        return good

    def unknown_words(self, prompt: str) -> list[UnknownWord]:
        """See `tools.generator.Generator`."""
        return self.inner.unknown_words(prompt)

    def describe(self) -> dict[str, Any]:
        """See `tools.generator.Generator`."""
        return self.inner.describe()

    async def aclose(self) -> None:
        """Release the inner generator."""
        await self.inner.aclose()


@dataclass
class Kit:
    """Everything that an arm may use.

    Attributes:
        settings: In force.
        images: Images in a round.
        rounds: Rounds of the loop; `images * rounds` is the budget of arms that select.
        generator: With or without an adapter, as the arm's group wants it.
        critic: Reads images.
        rewriter: Writes prompts.
        reward: Values readings.
        recorder: The evaluation's log.
        loop: Over the same parts.
        cache: Remembers.
        identity: What decides an outcome besides arm, request and seed; part of every key.
        version: That of the arm at work.
    """

    settings: Settings
    images: int
    rounds: int
    generator: CachedGenerator
    critic: Critic
    rewriter: Rewriter
    reward: Reward
    recorder: StoreRecorder
    loop: Loop
    cache: Cache
    identity: dict[str, Any] = field(default_factory=dict)
    version: str = "1"

    def seeds(self, seed: int, round: int) -> list[int]:
        """The loop's own seeds of a round, so that round 0 is the same images in every arm."""
        return [candidate_seed(seed, round, index) for index in range(self.images)]

    async def look(
        self, sha256: str, request: Request, seed: int
    ) -> tuple[Critique | Missing, dict[str, int]]:
        """The critic's reading of an image, and its tokens. A missing one is asked for again next time."""
        key = digest("critique", self.identity["lvlm"], sha256, request.prompt, _plain(request.target))

        async def make() -> dict[str, Any]:
            image = await self.recorder.get_image(sha256)
            reading = await self.critic.read(image, request.prompt, request.target, seed=seed)
            if isinstance(reading.critique, Missing):
                raise _NotRead(reading.critique)
            return {"critique": reading.critique.model_dump(mode="json"), "usage": reading.usage}

        try:
            document = await self.cache.once(key, make)
        except _NotRead as error:
            return error.missing, {}
        return Critique.model_validate(document["critique"]), document["usage"]

    async def rewrite(self, request: Request, seed: int) -> tuple[Revision, dict[str, int]]:
        """A rewrite without any feedback, and its tokens.

        Raises:
            RuntimeError: The rewriter gave nothing that can be used.
        """
        key = digest("rewrite", self.identity["lvlm"], request.prompt, _plain(request.target))

        async def make() -> dict[str, Any]:
            made = await self.rewriter.rewrite(request.prompt, request.target, (), seed=seed)
            if made.refused is not None:
                raise RuntimeError(f"no rewrite: {made.refused}")
            revision = Revision(round=0, prompt=made.prompt, changes=made.changes, why=made.why)
            return {"revision": revision.model_dump(), "usage": made.usage}

        document = await self.cache.once(key, make)
        return Revision.model_validate(document["revision"]), document["usage"]


class _NotRead(Exception):
    def __init__(self, missing: Missing) -> None:
        super().__init__(missing.reason)
        self.missing = missing


def _plain(target: EmotionTarget) -> dict[str, Any]:
    return target.model_dump(mode="json")


class Take:
    """One arm at work on one request: makes, looks, logs, counts.

    Args:
        kit: What it works with.
        arm: The arm's name.
        request: The request.
        seed: The request's run seed.
    """

    def __init__(self, kit: Kit, arm: str, request: Request, seed: int) -> None:
        self.kit, self.arm, self.request, self.seed = kit, arm, request, seed
        made_by = digest(kit.identity, arm, kit.version, request.id, seed, kit.images, kit.rounds)
        self.run_id = f"eval-{arm}-{made_by[:12]}"
        self.shots: list[Shot] = []
        self.revisions: list[Revision] = []
        self.tokens = {"critic": 0, "rewriter": 0}
        self.events: list[Event] = [
            RunStarted(
                run_id=self.run_id,
                prompt=request.prompt,
                target=request.target,
                seed=seed,
                settings={"arm": arm, "images": kit.images, "rounds": kit.rounds},
            )
        ]
        self.problems: list[str] = []

    async def rewrite(self) -> str:
        """One rewrite without feedback; the prompt."""
        revision, usage = await self.kit.rewrite(self.request, self.seed)
        self.revisions.append(revision)
        self.tokens["rewriter"] += usage.get("total_tokens", 0)
        self.events.append(
            Rewritten(
                run_id=self.run_id,
                prompt=revision.prompt,
                changes=revision.changes,
                why=revision.why,
                model=self.kit.rewriter.model,
                prompt_version=self.kit.rewriter.prompt.id,
                usage=usage,
            )
        )
        return revision.prompt

    async def round(self, prompt: str, round: int = 0, seeds: Sequence[int] | None = None) -> list[Shot]:
        """One round of images of a prompt, each read by the critic.

        Args:
            prompt: What to paint.
            round: Whose seeds to take, and the number in the log.
            seeds: Other seeds.

        Returns:
            The shots that could be made.
        """
        seeds = self.kit.seeds(self.seed, round) if seeds is None else seeds
        requests = [ImageRequest(prompt, seed, self.request.target) for seed in seeds]
        made = await self.kit.generator.made(requests)
        shots = await asyncio.gather(
            *(
                self._shot(image, request, round, index)
                for index, (image, request) in enumerate(zip(made, requests, strict=True))
                if isinstance(image, Made)
            )
        )
        self.problems += [str(image) for image in made if isinstance(image, BaseException)]
        self.shots += shots
        return list(shots)

    async def _shot(self, made: Made, request: ImageRequest, round: int, index: int) -> Shot:
        kit, place = self.kit, {"run_id": self.run_id, "round": round, "index": index}
        critique, usage = await kit.look(made.sha256, self.request, request.seed)
        self.tokens["critic"] += usage.get("total_tokens", 0)
        value, reason = valued(kit.reward, critique, self.request.target)
        known = {key: made.provenance[key] for key in ImageGenerated.model_fields if key in made.provenance}
        self.events += [
            ImageGenerated(
                **place, **{**known, "prompt": request.prompt, "seed": request.seed}, sha256=made.sha256
            ),
            Critiqued(
                **place,
                sha256=made.sha256,
                critique=critique,
                model=kit.critic.model,
                prompt_version=kit.critic.prompt.id,
                usage=usage,
            ),
            Rewarded(
                **place,
                sha256=made.sha256,
                name=kit.reward.name,
                version=kit.reward.version,
                value=value,
                reason=reason,
            ),
        ]
        return Shot(
            sha256=made.sha256,
            prompt=request.prompt,
            seed=request.seed,
            round=round,
            index=index,
            reward=value,
            critique=critique,
        )

    async def all(self) -> Delivery:
        """Hand over every shot: the figure is what one of them is expected to be."""
        cost = Cost(images=1, rewrites=len(self.revisions), tokens=self.tokens["rewriter"])
        return await self._deliver(list(range(len(self.shots))), cost)

    async def best(self) -> Delivery:
        """Hand over the shot that the critic likes best."""
        rated = [(shot.reward, -place) for place, shot in enumerate(self.shots) if shot.reward is not None]
        cost = Cost(
            images=len(self.shots),
            critiques=len(self.shots),
            rewrites=len(self.revisions),
            samples=self.kit.critic.samples,
            tokens=sum(self.tokens.values()),
        )
        return await self._deliver([-max(rated)[1]] if rated else [], cost)

    async def _deliver(self, delivered: list[int], cost: Cost) -> Delivery:
        failure = None
        if not delivered:
            reasons = self.problems or [
                event.reason for event in self.events if isinstance(event, Rewarded) and event.reason
            ]
            failure = reasons[0] if reasons else "nothing was made"
        best = self.shots[delivered[0]] if len(delivered) == 1 else None
        self.events.append(
            RunFinished(
                run_id=self.run_id,
                status=RunStatus.FAILED if failure else RunStatus.COMPLETED,
                stop_reason=StopReason.NO_CRITIQUE if failure else StopReason.ROUNDS_USED,
                best=best and best.sha256,
                best_round=best and best.round,
                warnings=self.problems,
            )
        )
        await self._log()
        return Delivery(
            arm=self.arm,
            request=self.request.id,
            prompt=self.shots[delivered[0]].prompt if delivered else self.request.prompt,
            shots=self.shots,
            delivered=delivered,
            revisions=self.revisions,
            run_id=self.run_id,
            cost=cost,
            failure=failure,
            complete=not self.problems,
        )

    async def _log(self) -> None:
        """Commit the events.

        What an earlier attempt logged stands. What it lacked goes under another name, since the log skips what
        it knows.
        """
        known = await self.kit.recorder.events(self.run_id)
        attempts = sum(isinstance(event, RunFinished) for event in known)
        there = {(event.type, event.round, event.index) for event in known if not _lacking(event)}
        events = [event for event in self.events if (event.type, event.round, event.index) not in there]
        if attempts:
            events = [event.model_copy(update={"node": f"{event.node}.{attempts + 1}"}) for event in events]
        await self.kit.recorder.record(*events)


def _lacking(event: Event) -> bool:
    return (
        isinstance(event, RunFinished)
        or (isinstance(event, Critiqued) and isinstance(event.critique, Missing))
        or (isinstance(event, Rewarded) and event.value is None)
    )
