"""The training loop: objective × policy × dataset, on one CPU or many GPUs, resumable to the bit.

Nothing in a step depends on what ran before it except the tensors of the checkpoint: data order, choices and
noise are functions of (seed, step, micro-batch, rank). So a killed run that goes on from its last checkpoint
walks the same path as one that was never disturbed.
"""

from __future__ import annotations

import contextlib
import copy
import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from ..domain import UserError
from ..tools.diffusion.conditioners import points
from . import checkpoint
from .config import DistillConfig
from .data.cache import Cache
from .data.dataset import Example, Examples
from .guards import Guards
from .objectives.base import Batch, Objective
from .policy import Policy
from .warm_start import BATCH, warm_start

_STATE = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)


class DistillError(RuntimeError):
    """Training cannot go on; the message says why and what is left."""


@dataclass
class Outcome:
    """How a training ended.

    Attributes:
        steps: Optimizer steps done.
        reason: "finished", "guard", "held_out_loss" (early stop) or "interrupted".
        seconds: Time spent, over all resumptions.
        loss: Loss of the last step.
        first_look: Guard figures at the start.
        last_look: Guard figures at the end.
        flags: Guards that fell while the reward rose, as "step N: names".
        yardstick: Guard figures of base and teacher.
    """

    steps: int
    reason: str = "finished"
    seconds: float = 0.0
    loss: float = math.nan
    first_look: dict[str, float] = field(default_factory=dict)
    last_look: dict[str, float] = field(default_factory=dict)
    flags: list[str] = field(default_factory=list)
    yardstick: dict[str, dict[str, float]] = field(default_factory=dict)


#: (step, steps, figures) after every step; for progress bars.
Watcher = Callable[[int, int, dict[str, float]], None]


class Order:
    """An endless shuffled order over n examples: epoch after epoch, each by its own permutation."""

    def __init__(self, n: int, seed: int) -> None:
        self._n, self._seed = n, seed
        self._epochs: dict[int, np.ndarray] = {}

    def take(self, start: int, count: int) -> list[int]:
        """Examples at positions start … start + count of the endless order."""
        return [int(self._epoch(place // self._n)[place % self._n]) for place in range(start, start + count)]

    def _epoch(self, number: int) -> np.ndarray:
        if number not in self._epochs:
            if len(self._epochs) > 1:
                self._epochs.pop(min(self._epochs))
            self._epochs[number] = np.random.default_rng([self._seed, 0, number]).permutation(self._n)
        return self._epochs[number]


class Loader:
    """Turns examples into the batch that an objective asks for."""

    def __init__(self, keys: frozenset[str], cache: Cache, device: torch.device) -> None:
        self._keys, self._cache, self._device = keys, cache, device

    def __call__(self, examples: Sequence[Example]) -> Batch:
        """One batch on the device; see `objectives.base` for the keys."""
        makers: dict[str, Callable[[], Any]] = {
            "prompt": lambda: self._cache.embeds([it.prompt for it in examples]),
            "refined": lambda: self._cache.embeds([it.refined for it in examples]),
            "added": lambda: self._cache.added([(it.prompt, str(it.refined)) for it in examples]),
            "target": lambda: points([it.target for it in examples]),
            "advantage": lambda: torch.tensor([it.advantage for it in examples]),
            "phrase": lambda: torch.tensor([it.phrase for it in examples]),
            "winner": lambda: self._cache.latents([str(it.winner) for it in examples]),
            "loser": lambda: self._cache.latents([str(it.loser) for it in examples]),
            "latents": lambda: self._cache.latents([str(it.image) for it in examples]),
            "reward": lambda: torch.tensor([it.reward for it in examples]),
            "rewards": lambda: _padded([it.rewards for it in examples]),
            "number": lambda: torch.tensor([it.number for it in examples]),
        }
        return {key: makers[key]().to(self._device) for key in sorted(self._keys)}


def _padded(rows: Sequence[Sequence[float]]) -> Tensor:
    width = max(map(len, rows))
    return torch.tensor([[*row, *[math.nan] * (width - len(row))] for row in rows])


class Trainer:
    """See the module's text.

    Args:
        config: Everything.
        objective: The loss.
        policy: What is trained.
        train: Training examples.
        held_out: Held-out examples, for the held-out loss; may be empty.
        cache: Encodings.
        guards: What is watched, or None.
        folder: Checkpoints, metrics and sheets go here.
        data_hash: A run does not go on with other data.
        accelerator: Made by `make_accelerator`.
    """

    def __init__(
        self,
        config: DistillConfig,
        objective: Objective,
        policy: Policy,
        train: Examples,
        held_out: Examples | None,
        cache: Cache,
        guards: Guards | None,
        folder: Path,
        data_hash: str,
        accelerator: Any,
    ) -> None:
        self.config, self.objective, self.policy = config, objective, policy
        self._train, self._held_out = train, held_out if held_out is not None and len(held_out) else None
        self._guards, self._folder, self._data_hash = guards, folder, data_hash
        self._accelerator = accelerator
        self._order = Order(len(train), config.train.seed)
        self._load = Loader(objective.required_keys, cache, policy.device)
        if config.train.text_steps and "refined" not in objective.required_keys:
            raise UserError(
                f"train.text_steps teaches what a refined prompt says, and {config.objective['name']} has none: "
                "set train.text_steps=0"
            )
        if config.train.text_steps and policy.tokens.tokens:
            raise UserError(
                "train.text_steps teaches the rows that a prompt has, and extra tokens are further ones: "
                "set train.text_steps=0 or policy.extra_tokens=0"
            )
        self._about_tokens = policy.tokens.about
        #: Before they are wrapped, since the wrapper may split them among processes.
        self._plain_tokens = copy.deepcopy(policy.tokens) if config.train.text_steps else None
        keys = {"prompt", "added", "target"}
        # A previous adapter's tokens chose among another log's phrases.
        if config.data.phrases and config.policy.previous is None:
            keys.add("phrase")
        self._load_text = Loader(frozenset(keys), cache, policy.device)
        self._optimizer = self._make_optimizer()
        policy.null = policy.null.to(policy.device)
        policy.trained, self._optimizer = accelerator.prepare(policy.trained, self._optimizer)
        if objective.slow_decay(0) is not None:
            policy.start_slow()
        self._ema = (
            {name: p.detach().clone() for name, p in policy.parameters().items()} if config.train.ema else {}
        )
        self._steps_done = 0
        self._outcome = Outcome(steps=0)
        self._began = time.perf_counter()
        self._best_held_out: tuple[float, int] = (math.inf, 0)
        self._board: Any = None
        self._lines: Any = None
        #: Why training stopped early, so that a resumed one does not run on.
        self._stopped: str | None = None

    # The loop.

    def run(self, resume: bool = False, watch: Watcher | None = None) -> Outcome:
        """Train until the end, an early stop, or Ctrl-C or SIGTERM (which let the step end and save).

        Raises:
            DistillError: The loss is not a number, or the disk does not take a checkpoint.
            UserError: `resume` with other data.
        """
        outcome, knobs = self._outcome, self.config.train
        self._began = time.perf_counter()
        begun = resume and self._restore()
        stop: str | None = self._stopped
        with _listening() as asked, self._metrics(begun):
            if not begun:
                self._look()
                stop = None if self._warm_start(asked) else "interrupted"
            while self._steps_done < knobs.steps and stop is None:
                figures = self._step(self._steps_done)
                self._steps_done += 1
                done = self._steps_done
                outcome.loss = figures["loss"]
                if done % knobs.log_every == 0 or done == knobs.steps:
                    self._log(done, figures)
                if self._looks_at(done):
                    stop = self._stopped = self._look()
                if self._anywhere(bool(asked)) and done < knobs.steps:
                    stop = "interrupted"
                if done % knobs.checkpoint_every == 0 or done == knobs.steps or stop:
                    self._save()
                if watch is not None:
                    watch(done, knobs.steps, figures)
        outcome.reason = stop or "finished"
        outcome.steps = self._steps_done
        outcome.seconds += time.perf_counter() - self._began
        return outcome

    def _warm_start(self, asked: list[int]) -> bool:
        """Teach the emotion tokens on text alone, the same in all processes; False if asked to stop meanwhile."""
        knobs = self.config.train
        if self._plain_tokens is None:
            return True

        def batch(step: int) -> Batch:
            chosen = self._order.take(step * BATCH, BATCH)
            return self._load_text(self._train.fetch(chosen, np.random.default_rng([6, knobs.seed, step])))

        done = warm_start(self._plain_tokens, batch, knobs.text_steps, lambda: self._anywhere(bool(asked)))
        if done is None:
            return False
        taught, loss = done
        self._check("text loss", loss, 0)
        self._set_weights(
            {f"tokens.{name}": value for name, value in taught.state_dict().items()}, whole=False
        )
        # The averages begin where the student does.
        self.policy.update_slow(0.0)
        if self._ema:
            for name, parameter in self.policy.parameters().items():
                self._ema[name].copy_(parameter.detach())
        self._log(0, {"text_loss": loss})
        self._save()
        return True

    def _anywhere(self, asked: bool) -> bool:
        """Whether any process was asked to stop: one that stops alone leaves the others waiting for it."""
        if self._accelerator.num_processes == 1:
            return asked
        mine = torch.tensor([asked], device=self._accelerator.device, dtype=torch.float32)
        return bool(self._accelerator.reduce(mine, "sum") > 0)

    def _step(self, step: int) -> dict[str, float]:
        """One optimizer step; a function of the step's number and the tensors that a checkpoint holds."""
        began, knobs, accelerator = time.perf_counter(), self.config.train, self._accelerator
        rates = self._set_rates(step)
        totals: dict[str, float] = {}
        for micro in range(knobs.accumulation):
            last = micro == knobs.accumulation - 1
            seeds = [knobs.seed, step, micro, accelerator.process_index]
            batch = self._batch(step, micro, seeds)
            generator = torch.Generator().manual_seed(_mix(1, *seeds))
            torch.manual_seed(_mix(2, *seeds))
            quiet = contextlib.nullcontext() if last else accelerator.no_sync(self.policy.trained)
            with quiet:
                loss, figures = self.objective.loss(batch, self.policy, generator)
                self._check("loss", loss.item(), step)
                accelerator.backward(loss / knobs.accumulation)
            for name, value in {"loss": loss.item(), **figures}.items():
                totals[name] = totals.get(name, 0.0) + value / knobs.accumulation
        norm = self._clip(step)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self._update_averages(step)
        return totals | {"grad_norm": norm, "lr": rates, "seconds": time.perf_counter() - began}

    def _batch(self, step: int, micro: int, seeds: list[int]) -> Batch:
        knobs, accelerator = self.config.train, self._accelerator
        number = (step * knobs.accumulation + micro) * accelerator.num_processes + accelerator.process_index
        chosen = self._order.take(number * knobs.batch_size, knobs.batch_size)
        return self._load(self._train.fetch(chosen, np.random.default_rng([3, *seeds])))

    def _check(self, what: str, value: float, step: int) -> None:
        if not math.isfinite(value):
            raise DistillError(
                f"the {what} became {value} at step {step}; {self._last_good()}: lower train.lr, "
                "set train.max_grad_norm, or use train.precision fp32 or bf16"
            )

    def _last_good(self) -> str:
        found = sorted((self._folder / "checkpoints").glob("step-*"))
        return f"the last good checkpoint is {found[-1].name}" if found else "there is no checkpoint yet"

    # Optimizer.

    def _make_optimizer(self) -> torch.optim.Optimizer:
        knobs, named = self.config.train, self.policy.parameters()
        lora = [p for name, p in named.items() if name.startswith("denoiser.")]
        tokens = [p for name, p in named.items() if name.startswith("tokens.")]
        groups = [
            {"params": lora, "lr": knobs.lr, "base": knobs.lr},
            {"params": tokens, "lr": knobs.emotion_lr or knobs.lr, "base": knobs.emotion_lr or knobs.lr},
        ]
        return torch.optim.AdamW(groups, betas=knobs.betas, weight_decay=knobs.weight_decay)

    def _set_rates(self, step: int) -> float:
        """Learning rate by step alone, so that there is no scheduler to save."""
        knobs = self.config.train
        factor = min(1.0, (step + 1) / (knobs.warmup + 1))
        progress = min(1.0, max(0, step - knobs.warmup) / max(1, knobs.steps - knobs.warmup))
        if knobs.schedule == "cosine":
            factor *= 0.5 * (1 + math.cos(math.pi * progress))
        elif knobs.schedule == "linear":
            factor *= 1 - progress
        for group in self._optimizer.param_groups:
            group["lr"] = group["base"] * factor
        return knobs.lr * factor

    def _clip(self, step: int) -> float:
        parameters = list(self.policy.parameters().values())
        limit = self.config.train.max_grad_norm or math.inf
        norm = self._accelerator.clip_grad_norm_(parameters, limit)
        if norm is None:
            return math.nan
        # A scaler leaves such a step out by itself, and lowers its scale.
        if self._accelerator.scaler is None:
            self._check("gradients' norm", float(norm), step)
        return float(norm)

    @torch.no_grad()
    def _update_averages(self, step: int) -> None:
        decay = self.objective.slow_decay(step)
        if decay is not None:
            self.policy.update_slow(decay)
        if self._ema:
            # Early on the average must not remember the start.
            decay = min(self.config.train.ema, (1 + step) / (10 + step))
            for name, parameter in self.policy.parameters().items():
                self._ema[name].lerp_(parameter.detach(), 1 - decay)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside, the policy speaks with the averaged weights (with its own where there is no average)."""
        own = {name: p.detach().clone() for name, p in self.policy.parameters().items()} if self._ema else {}
        self._assign(self._ema)
        try:
            yield
        finally:
            self._assign(own)

    @torch.no_grad()
    def _assign(self, values: dict[str, Tensor]) -> None:
        named = self.policy.parameters()
        for name, value in values.items():
            named[name].copy_(value)

    # Looking.

    def _looks_at(self, step: int) -> bool:
        every = self.config.guard.every
        return every > 0 and (step % every == 0 or step == self.config.train.steps)

    def _look(self) -> str | None:
        """Guards, held-out loss and sample sheet; the reason to stop, if there is one."""
        config, outcome, step = self.config.guard, self._outcome, self._steps_done
        if config.every == 0:
            return None
        figures: dict[str, float] = {}
        stop = None
        with self.averaged():
            if self._held_out is not None:
                loss = self._held_out_loss()
                figures["held_out_loss"] = loss
                if loss < self._best_held_out[0]:
                    self._best_held_out = (loss, step)
                elif config.patience and step - self._best_held_out[1] >= config.patience * config.every:
                    stop = "held_out_loss"
            if self._guards is not None and self._guards.requests:
                if not self._guards.yardstick:
                    self._guards.yardstick = outcome.yardstick
                if not self._guards.yardstick:
                    self._guards.measure_yardstick()
                    outcome.yardstick = self._guards.yardstick
                seen, images = self._guards.look()
                outcome.first_look = outcome.first_look or seen
                outcome.last_look = seen
                figures |= {f"guard/{name}": value for name, value in seen.items()}
                fallen = self._guards.fallen(seen, outcome.first_look)
                if fallen:
                    outcome.flags.append(f"step {step}: {', '.join(fallen)}")
                    stop = "guard" if config.action == "stop" else stop
                if config.sheet_every and (step % config.sheet_every == 0 or step == self.config.train.steps):
                    self._sheet(images, step)
        self._log(step, figures, look=True)
        return stop

    @torch.no_grad()
    def _held_out_loss(self) -> float:
        assert self._held_out is not None
        knobs = self.config.train
        count = min(len(self._held_out), 2 * knobs.batch_size)
        batch = self._load(self._held_out.fetch(range(count), np.random.default_rng([4, knobs.seed])))
        generator = torch.Generator().manual_seed(_mix(5, knobs.seed))
        return self.objective.loss(batch, self.policy, generator)[0].item()

    def _sheet(self, images: list[list[Any]], step: int) -> None:
        if not self._accelerator.is_main_process:
            return
        from PIL import Image

        width, height = images[0][0].size
        sheet = Image.new("RGB", (width * len(images[0]), height * len(images)))
        for row, pictures in enumerate(images):
            for column, picture in enumerate(pictures):
                sheet.paste(picture, (column * width, row * height))
        folder = self._folder / "samples"
        folder.mkdir(exist_ok=True)
        sheet.save(folder / f"step-{step:07d}.png", compress_level=1)

    # Checkpoints.

    def _save(self) -> None:
        accelerator = self._accelerator
        state = {
            "weights": get_model_state_dict(self.policy.trained, options=_STATE),
            "optimizer": get_optimizer_state_dict(
                self.policy.trained, _bare(self._optimizer), options=_STATE
            ),
            "ema": {name: tensor.cpu() for name, tensor in self._ema.items()},
            "slow": {name: tensor.cpu() for name, tensor in self.policy.slow_state().items()},
            "memory": _packed(self.policy.memory),
            "scaler": accelerator.scaler.state_dict() if accelerator.scaler is not None else None,
            "tokens": self._about_tokens,
            "data_hash": self._data_hash,
            "best_held_out": list(self._best_held_out),
            "stopped": self._stopped,
            "loss": self._outcome.loss,
            "first_look": self._outcome.first_look,
            "last_look": self._outcome.last_look,
            "flags": self._outcome.flags,
            "yardstick": self._outcome.yardstick,
            "seconds": self._outcome.seconds + time.perf_counter() - self._began,
        }
        if accelerator.is_main_process:
            folder = self._folder / "checkpoints"
            try:
                checkpoint.save(folder, self._steps_done, state, self.config.train.keep_checkpoints)
            except OSError as error:
                raise DistillError(
                    f"cannot save the checkpoint of step {self._steps_done} in {folder}: "
                    f"{error.strerror or error}; {self._last_good()}; make room and use --resume"
                ) from error
        accelerator.wait_for_everyone()

    def _restore(self) -> bool:
        """Take the newest checkpoint; False where there is none."""
        state = checkpoint.load_latest(self._folder / "checkpoints")
        if state is None:
            return False
        if state["data_hash"] != self._data_hash:
            raise UserError(
                "the log has changed since this run began (runs were added or judged again): narrow --from to "
                "the runs of then, or start anew with another --out"
            )
        if state.get("tokens") != self._about_tokens:
            raise UserError(
                "this training was begun with other emotion tokens, those of another version of emoloop or of another "
                "previous adapter: start anew with another --out"
            )
        self._set_weights(state["weights"])
        set_optimizer_state_dict(
            self.policy.trained, _bare(self._optimizer), state["optimizer"], options=_STATE
        )
        for name, tensor in state["ema"].items():
            self._ema[name].copy_(tensor)
        slow = self.policy.slow_state()
        for name, tensor in state["slow"].items():
            slow[name].copy_(tensor)
        self.policy.memory = _unpacked(state["memory"])
        if state["scaler"] is not None and self._accelerator.scaler is not None:
            self._accelerator.scaler.load_state_dict(state["scaler"])
        self._steps_done = state["step"]
        self._best_held_out = tuple(state["best_held_out"])  # type: ignore[assignment]
        outcome = self._outcome
        outcome.first_look, outcome.last_look = state["first_look"], state["last_look"]
        outcome.flags, outcome.yardstick = state["flags"], state["yardstick"]
        outcome.seconds, outcome.loss = state["seconds"], state["loss"]
        self._stopped = state["stopped"]
        return True

    def _set_weights(self, weights: dict[str, Any], whole: bool = True) -> None:
        options = StateDictOptions(full_state_dict=True, strict=False)
        outcome = set_model_state_dict(self.policy.trained, weights, options=options)
        # The call above fills what is missing with what is there, and does not say so.
        missing = (
            set(get_model_state_dict(self.policy.trained, options=_STATE)) - set(weights) if whole else set()
        )
        lost = sorted(missing) + sorted(outcome.unexpected_keys)
        if lost:
            raise UserError(f"the checkpoint is of another policy: {lost[0]} has no place in it")

    # Metrics.

    @contextmanager
    def _metrics(self, begun: bool) -> Iterator[None]:
        """Open files for the metrics; lines beyond the checkpoint go, since they will be written again."""
        if not self._accelerator.is_main_process:
            yield
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / "metrics.jsonl"
        kept = []
        if path.exists() and begun:
            kept = [line for line in path.read_text().splitlines() if _step_of(line) <= self._steps_done]
        path.write_text("".join(line + "\n" for line in kept))
        self._lines = path.open("a")
        if self.config.train.tensorboard:
            with contextlib.suppress(ImportError):
                from torch.utils.tensorboard import SummaryWriter

                self._board = SummaryWriter(self._folder / "tensorboard", purge_step=self._steps_done + 1)
        try:
            yield
        finally:
            for writer in (self._lines, self._board):
                if writer is not None:
                    writer.close()

    def _log(self, step: int, figures: dict[str, float], look: bool = False) -> None:
        if self._lines is None or not figures:
            return
        rounded = {name: float(f"{value:.6g}") for name, value in figures.items()}
        self._lines.write(json.dumps({"step": step, **({"look": True} if look else {}), **rounded}) + "\n")
        self._lines.flush()
        if self._board is not None:
            for name, value in figures.items():
                self._board.add_scalar(name if "/" in name else f"train/{name}", value, step)


def make_accelerator(config: DistillConfig) -> Any:
    """One process, or all that `accelerate launch` started.

    Raises:
        UserError: The wanted device is not there, or precision does not go with it.
    """
    from accelerate import Accelerator

    knobs = config.train
    precision = {"fp32": "no", "fp16": "fp16", "bf16": "bf16"}[knobs.precision]
    try:
        return Accelerator(mixed_precision=precision, cpu=knobs.device == "cpu")
    except (ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"train.precision {knobs.precision} on this device: {reason}") from error


@contextmanager
def _listening() -> Iterator[list[int]]:
    """Gather the first Ctrl-C or SIGTERM instead of dying of it: half an optimizer step cannot be resumed."""
    heard: list[int] = []

    def hear(number: int, frame: Any) -> None:
        heard.append(number)
        if len(heard) > 1:
            raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield heard
        return
    before = {number: signal.signal(number, hear) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield heard
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _bare(optimizer: Any) -> torch.optim.Optimizer:
    return getattr(optimizer, "optimizer", optimizer)


def _mix(*numbers: int) -> int:
    """One seed from several numbers, far apart for neighbours."""
    high, low = np.random.SeedSequence(list(numbers)).generate_state(2, np.uint32)
    return (int(high) << 31) ^ int(low)


def _packed(memory: dict[tuple[int, int], Tensor]) -> dict[str, Tensor]:
    if not memory:
        return {}
    return {"names": torch.tensor(list(memory)), "rows": torch.stack(list(memory.values()))}


def _unpacked(state: dict[str, Tensor]) -> dict[tuple[int, int], Tensor]:
    if not state:
        return {}
    names = [(int(one), int(other)) for one, other in state["names"].tolist()]
    return dict(zip(names, state["rows"].unbind(), strict=True))


def _step_of(line: str) -> int:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError):
        return 2**62
