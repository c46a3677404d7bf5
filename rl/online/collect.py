"""Collections: every so many optimizer steps the policy samples groups, the critic reads them, and rows are made.

A collection is a function of its number and the weights: prompts, seeds and window come from (seed, number). So a
training that is resumed between two collections, where checkpoints lie, samples the same pictures again, finds their
rewards in the log, and walks the same path.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

import numpy as np
import torch
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor

from ...domain import EmotionTarget, Failure
from ...tools.diffusion.conditioners import points
from ...tools.reward import Reward
from ..data.cache import Cache
from ..data.loader import Loader, Order
from ..launch import whole
from ..policy import Policy
from ..rollouts import Base, Request, Rollout, RolloutSource
from .judging import Judging, Made
from .objective import FlowGRPO, advantages
from .sample import Drawn, sample_group

#: Largest |r - 1| of rows whose policy has not changed since they were drawn.
TOLERANCE = {"fp32": 1e-5, "fp16": 1e-3, "bf16": 1e-2}


@dataclass(frozen=True)
class Taken:
    """A row: one picture's step that was drawn with noise. Tensors lie on the CPU.

    Attributes:
        prompt: The neutral prompt.
        target: The wanted emotion.
        step: Number of the step.
        state: (C, H, W) before it.
        after: After it.
        mean: Of the Gaussian that it was drawn from.
        log_probability: Of the step, 0-dim.
        advantage: Of the picture.
    """

    prompt: str
    target: EmotionTarget
    step: int
    state: Tensor
    after: Tensor
    mean: Tensor
    log_probability: Tensor
    advantage: float


class Collector(RolloutSource):
    """Rollouts that are sampled now: those of the last collection.

    Args:
        objective: Its knobs.
        policy: Who samples.
        cache: Encodes the prompts.
        requests: Prompts and targets to draw from.
        reward: Values what the critic reads.
        judging: Reads and logs the pictures of all processes; None in those that are not the first.
        submit: Starts a coroutine function beside this thread (`anyio`'s `BlockingPortal.start_task_soon`).
        accelerator: Of all processes that sample, each its share of the groups.
        name: The training's name, of which its runs have theirs.
        base: What the adapter is trained on.
        seed: Of everything drawn.

    Attributes:
        rows: What there is to train on.
    """

    def __init__(
        self,
        objective: FlowGRPO,
        policy: Policy,
        cache: Cache,
        requests: Sequence[tuple[str, EmotionTarget]],
        reward: Reward,
        judging: Judging | None,
        submit: Callable[..., Future[Any]],
        accelerator: Any,
        *,
        name: str,
        base: Base,
        seed: int,
    ) -> None:
        self.base, self.reward, self._reward = base, (reward.name, reward.version), reward
        self._objective, self._policy, self._cache = objective, policy, cache
        self._requests, self._judging, self._submit = requests, judging, submit
        self._accelerator = accelerator
        self._name, self._seed = name, seed
        self._order, self._sde = Order(len(requests), seed), objective.sde(policy)
        self._groups: list[tuple[Request, list[Rollout]]] = []
        self.rows: list[Taken] = []

    def __iter__(self) -> Iterator[tuple[Request, list[Rollout]]]:
        """The groups of the last collection."""
        return iter(self._groups)

    def fetch(self, run_ids: Sequence[str]) -> dict[str, list[Rollout]]:
        """Those of some groups."""
        return {request.run_id: every for request, every in self._groups if request.run_id in run_ids}

    def rescore(self, run_id: str) -> Reward:
        """The reward."""
        return self._reward

    def critics(self) -> list[str]:
        """The critic."""
        return [self._judging.critic.model] if self._judging else []

    def collect(self, number: int) -> dict[str, float]:
        """Sample, judge and log collection `number`; its figures."""
        knobs, policy = self._objective, self._policy
        draw = np.random.default_rng([self._seed, 7, number])
        start = int(draw.integers(0, knobs.last - knobs.window + 1))
        window = range(start, start + knobs.window)
        adapter, version = version_of(policy), f"step {number * knobs.updates}"
        asked: list[tuple[Request, list[int]]] = []
        for group, place in enumerate(self._order.take(number * knobs.groups, knobs.groups)):
            request = Request(f"{self._name}-{number:05d}-{group:02d}", *self._requests[place])
            asked.append((request, draw.integers(0, 2**31, knobs.group).tolist()))
        processes, index = self._accelerator.num_processes, self._accelerator.process_index
        sampled: dict[int, list[Drawn]] = {}
        judged: list[Future[list[Rollout]]] = []
        # In turns, a group for each process, so that the critic reads one turn while the next is sampled.
        for group in range(index, knobs.groups, processes):
            clean, sampled[group] = self._sample(*asked[group], window, version)
            made = gather_object([Made(*asked[group], policy.network.decode(clean), adapter, version)])
            if self._judging is not None:
                judged += [self._submit(self._judging.group, it) for it in made]
        told = broadcast_object_list([[it.result() for it in judged]])[0]
        self._groups = [(request, every) for (request, _), every in zip(asked, told, strict=True)]
        rewards = [[it.reward for it in every] for _, every in self._groups]
        normal = advantages(rewards, knobs.scale)
        mine = [
            (group, [_row(asked[group][0], *one) for one in _learned(drawn, normal[group])])
            for group, drawn in sampled.items()
        ]
        self.rows = [row for _, rows in sorted(gather_object(mine), key=itemgetter(0)) for row in rows]
        known = [it for row in rewards for it in row if it is not None]
        if not self.rows:
            raise Failure(
                f"collection {number}: nothing to learn from {len(known)} rewards of {len(rewards) * knobs.group} "
                f"pictures: in each of the {len(rewards)} groups they are missing or all equal "
                "(more pictures by objective.group, more noise by objective.noise_level, or another reward)"
            )
        learned = [value for values in normal for value in values if value == value]
        spreads = [np.std(some) for row in rewards if len(some := [it for it in row if it is not None]) > 1]
        return {
            "reward": float(np.mean(known)),
            "reward_spread": float(np.mean(spreads)) if spreads else 0.0,
            "advantage_largest": float(np.abs(learned).max()),
            "groups_dropped": float(sum(not any(v == v for v in values) for values in normal)),
            "missing": float(len(rewards) * knobs.group - len(known)),
            "window": float(start),
        }

    def _sample(
        self, request: Request, seeds: list[int], window: range, version: str
    ) -> tuple[Tensor, list[Drawn]]:
        policy = self._policy
        told = self._cache.embeds([request.prompt]).to(policy.device)
        target = points([request.target], policy.device)
        clean, drawn = sample_group(policy, self._sde, told, target, seeds, window, self._objective.shared)
        if not torch.isfinite(clean).all():
            raise Failure(f"the policy of {version} samples pictures that are no numbers: lower train.lr")
        return clean, drawn


class Rows:
    """The rows of the last collection as `trainer.Trainer` takes data; it collects when one is due.

    Args:
        collector: Makes them.
        objective: Says how often, and checks the first of them.
        policy: Who is trained.
        load: Makes batches of rows.
        batch_size: Rows at once in that check.
        tolerance: Largest |r - 1| in it.
    """

    def __init__(
        self,
        collector: Collector,
        objective: FlowGRPO,
        policy: Policy,
        load: Loader,
        batch_size: int,
        tolerance: float,
    ) -> None:
        self.every = objective.updates
        self._collector, self._objective, self._policy, self._load = collector, objective, policy, load
        self._batch_size, self._tolerance, self._checked = batch_size, tolerance, False

    def __len__(self) -> int:
        return self._objective.rows

    def fetch(self, numbers: Sequence[int], rng: np.random.Generator | None = None) -> list[Taken]:
        """Rows by number; where some were dropped, others come twice."""
        rows = self._collector.rows
        return [rows[number % len(rows)] for number in numbers]

    def begin(self, step: int) -> dict[str, float]:
        """Collect, where a collection is due.

        Raises:
            Failure: Nothing to learn from, the critic stayed away, or the policy that trains is not the one that
                sampled.
        """
        if step % self.every:
            return {}
        began = time.perf_counter()
        figures = self._collector.collect(step // self.every)
        if not self._checked:
            self._check_ratio()
        return {**figures, "collect_seconds": time.perf_counter() - began}

    def _check_ratio(self) -> None:
        """Nothing is trained before the policy that trains gives the densities of the one that sampled."""
        batch = self._load(self._collector.rows[: self._batch_size])
        with torch.no_grad():
            apart = self._objective.loss(batch, self._policy, torch.Generator())[1]["ratio_apart"]
        if not apart <= self._tolerance:
            raise Failure(
                f"before the first step the ratio of the policies differs from 1 by {apart:.2g} "
                f"(at most {self._tolerance:g}): sampling and training do not compute the same"
            )
        self._checked = True


def version_of(policy: Policy) -> str:
    """SHA-256 of the weights in training."""
    digest = hashlib.sha256()
    for name, value in sorted(policy.parameters().items()):
        digest.update(name.encode() + whole(value.detach()).float().cpu().numpy().tobytes())
    return digest.hexdigest()


def _learned(drawn: list[Drawn], values: list[float]) -> Iterator[tuple[Drawn, int, float]]:
    """Each step of the pictures of a group that have an advantage, their places and it."""
    return ((one, place, value) for one in drawn for place, value in enumerate(values) if value == value)


def _row(request: Request, one: Drawn, place: int, advantage: float) -> Taken:
    state, after, mean, density = (
        it[place].cpu().clone() for it in (one.state, one.made.after, one.made.mean, one.made.log_prob)
    )
    return Taken(request.prompt, request.target, one.step, state, after, mean, density, advantage)
