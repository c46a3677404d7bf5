"""Pictures of an online sampler, judged and logged as the loop's are, while the next ones are sampled.

A group is a run of one round in the log: started, images, critiques, rewards, finished, each image with the policy that
made it. Names are functions of training, collection and group, so that a resumed training finds what it had logged and
asks nothing twice. A picture that the critic cannot read is missing; a critic that answers nobody is waited for.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

from PIL import Image

from ...agents.ask import one_line
from ...agents.critic import Critic, Reading, valued
from ...domain import Critique, Failure, RunStatus, StopReason
from ...events import Critiqued, ImageGenerated, Rewarded, RunFinished, RunStarted
from ...tools.images.diffusers import DiffusersGenerator
from ...tools.reward import Reward, Value
from ...traces.fold import Tried
from ...traces.recorder import StoreRecorder
from ..rollouts import Request, Rollout

logger = logging.getLogger(__name__)

#: Seconds between two questions to a critic that is away.
PAUSE = 5.0


class Made(NamedTuple):
    """Pictures of one group, and who made them.

    Attributes:
        request: What was asked for; its `run_id` is the group's name in the log.
        seeds: Of each picture.
        images: The pictures.
        adapter: Hash of the weights in training.
        policy: Their version in words.
    """

    request: Request
    seeds: Sequence[int]
    images: Sequence[Image.Image]
    adapter: str
    policy: str


class Judging:
    """Asks one critic.

    Args:
        critic: Reads the pictures.
        reward: Values the readings.
        recorder: The log.
        about: What the generator says of itself.
        sampling: Knobs of the sampler, for the log.
        patience: Seconds that a critic may be away.
    """

    def __init__(
        self,
        critic: Critic,
        reward: Reward,
        recorder: StoreRecorder,
        about: DiffusersGenerator,
        sampling: dict[str, Any],
        patience: float,
    ) -> None:
        self.critic, self.reward, self._recorder = critic, reward, recorder
        self._about, self._sampling, self._patience = about.describe(), sampling, patience
        self._answered: tuple[bytes, Request] | None = None
        self._turn = asyncio.Lock()

    async def group(self, made: Made) -> list[Rollout]:
        """Log and judge one group; what the log has already stands.

        Raises:
            Failure: The critic stayed away, or the log cannot be written.
        """
        request, settings = made.request, {"loop": {"reward": self.reward.name}, "online": self._sampling}
        record = self._recorder.record
        fold = await self._recorder.fold(request.run_id)
        await record(
            RunStarted(
                run_id=request.run_id, prompt=request.prompt, target=request.target, seed=made.seeds[0],
                settings=settings,
            )
        )  # fmt: skip
        known = {index for (_, index), tried in fold.tried.items() if tried.rewarded is not None}
        await asyncio.gather(
            *(self._one(made, index) for index in range(len(made.images)) if index not in known)
        )
        fold = await self._recorder.fold(request.run_id, fresh=False)
        best = None if fold.best is None else fold.tried[fold.best].made
        await record(
            RunFinished(
                run_id=request.run_id, status=RunStatus.COMPLETED,
                stop_reason=StopReason.NO_REWARD if best is None else StopReason.ROUNDS_USED,
                best=best and best.sha256, best_round=best and 0,
            )
        )  # fmt: skip
        return [_rollout(request, index, tried) for (_, index), tried in sorted(fold.tried.items())]

    async def _one(self, made: Made, index: int) -> None:
        request, about, image = made.request, self._about, made.images[index]
        try:
            sha256 = await self._recorder.put_image(image)
        except OSError as error:
            raise Failure(
                f"cannot keep a picture of {request.run_id}: {error.strerror or error}; make room and use --resume"
            ) from error
        place: dict[str, Any] = {"run_id": request.run_id, "index": index, "sha256": sha256}
        await self._recorder.record(
            ImageGenerated(
                **place, prompt=request.prompt, seed=made.seeds[index], model=about["model"],
                revision=about["revision"], adapter=made.adapter, steps=self._sampling["steps"], guidance=1.0,
                height=image.height, width=image.width, versions={**about["versions"], "policy": made.policy},
            )
        )  # fmt: skip
        png = await self._recorder.get_png(sha256)
        reading = await self._read(png, request, made.seeds[index])
        values = await valued(self.reward, reading.critique, request.target, request.prompt, png)
        await self._recorder.record(
            Critiqued(
                **place, critique=reading.critique, model=self.critic.model, usage=reading.usage,
                prompt_version=self.critic.prompt.id, seconds=round(reading.seconds, 4),
            ),
            *(self._rewarded(place, it) for it in values),
        )  # fmt: skip

    @staticmethod
    def _rewarded(place: dict[str, Any], value: Value) -> Rewarded:
        fields: dict[str, Any] = {**place, **asdict(value)}
        return Rewarded(**fields, node="reward" if value.weight is None else f"reward:{value.name}")

    async def _read(self, png: bytes, request: Request, seed: int) -> Reading:
        reading = await self.critic.read(png, request.prompt, request.target, seed=seed)
        if reading.error is not None:
            # The picture's fault, or is nobody there? Whom it answered before, it answers again.
            async with self._turn:
                await self._wait(reading.error)
            reading = await self.critic.read(png, request.prompt, request.target, seed=seed)
        if reading.error is None:
            self._answered = png, request
        return reading

    async def _wait(self, error: Exception) -> None:
        if self._answered is None:
            raise Failure(f"the critic {self.critic.model} does not answer: {one_line(error)}")
        png, request = self._answered
        began = None
        while (probe := await self.critic.read(png, request.prompt, request.target)).error is not None:
            if began is None:
                began = time.monotonic()
                logger.warning(
                    "the critic does not answer (%s): training waits for it", one_line(probe.error)
                )
            if time.monotonic() - began >= self._patience:
                raise Failure(
                    f"the critic {self.critic.model} has not answered for {self._patience:.0f} s "
                    f"({one_line(probe.error)}): bring it back and use --resume"
                )
            await asyncio.sleep(PAUSE)
        if began is not None:
            logger.warning("the critic answers again: training goes on")


def _rollout(request: Request, index: int, tried: Tried) -> Rollout:
    read = tried.critique if isinstance(tried.critique, Critique) else None
    made = tried.made
    assert made is not None
    rollout = Rollout(
        request, 0, index, request.prompt, made.seed, made.sha256, None, None, None, None, tried.spread, tried.reward,
        version=made.adapter,
    )  # fmt: skip
    if read is None:
        return rollout
    return rollout._replace(
        valence=read.valence, arousal=read.arousal, alignment=read.alignment, category=read.category
    )
