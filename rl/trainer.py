"""The training loop: objective × policy × dataset, on one CPU or many GPUs, resumable to the bit.

Nothing in a step depends on what ran before it except the tensors of the checkpoint: data order, choices and
noise are functions of (seed, step, micro-batch). So a killed run that goes on from its last checkpoint walks the same
path as one that was never disturbed. Micro-batches have one global order, of which each process takes its share: two
processes that accumulate once do what one does that accumulates twice.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from diffusers.utils import make_image_grid
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from ..domain import Failure, UserError
from . import checkpoint
from .config import DistillConfig
from .data.cache import Cache
from .data.loader import Loader, Order
from .guards import Guards
from .launch import listening, whole
from .metrics import Metrics
from .objectives.base import Batch, Objective
from .policy import STUDENT, Policy
from .warm_start import BATCH, warm_start

_STATE = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)

#: What of an outcome a checkpoint holds.
_OUTCOME = ("loss", "first_look", "last_look", "flags", "yardstick", "seconds")


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


class Data(Protocol):
    """What is trained on: logged examples, or rows that are collected meanwhile."""

    #: Optimizer steps after which the data change, and between which no checkpoint lies.
    every: int

    def __len__(self) -> int: ...

    def fetch(self, numbers: Sequence[int], rng: np.random.Generator | None = None) -> Sequence[Any]:
        """Examples by number, in that order."""
        ...

    def begin(self, step: int) -> dict[str, float]:
        """Called before each optimizer step; figures that are logged with it."""
        ...


#: (step, steps, figures) after every step; for progress bars.
Watcher = Callable[[int, int, dict[str, float]], None]


class Trainer:
    """See the module's text.

    Args:
        config: Everything.
        objective: The loss.
        policy: What is trained.
        train: Training examples.
        held_out: Held-out examples, for the held-out loss; None or empty where there are none.
        text: What the start on text is taught, with refined prompts; None where there is none.
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
        train: Data,
        held_out: Data | None,
        text: Data | None,
        cache: Cache,
        guards: Guards | None,
        folder: Path,
        data_hash: str,
        accelerator: Any,
    ) -> None:
        self.config, self.objective, self.policy = config, objective, policy
        self._train, self._held_out, self._text, self._guards = train, held_out, text, guards
        self._folder, self._data_hash, self._accelerator = folder, data_hash, accelerator
        self._order = Order(len(train), config.train.seed)
        self._load = Loader(objective.required_keys, cache, policy.device)
        if text is not None and policy.tokens.tokens:
            raise UserError(
                "train.text_steps teaches the rows that a prompt has, and extra tokens are further ones: "
                "set train.text_steps=0 or policy.extra_tokens=0"
            )
        self._about_tokens = policy.tokens.about
        if policy.visual is not None:
            self._about_tokens = {**self._about_tokens, "visual": policy.visual.about}
        if accelerator.is_fsdp2 and (config.train.ema or objective.slow_decay(0) is not None):
            raise UserError(
                "FSDP splits the weights, and averages of them are kept whole: set train.ema=0, take an objective "
                "without a slow average, or leave FSDP out"
            )
        #: Before they are wrapped, since the wrapper may split them among processes.
        self._plain_tokens = copy.deepcopy(policy.tokens)
        self._plain_visual = copy.deepcopy(policy.visual) if accelerator.is_fsdp2 else None
        # A previous adapter's tokens chose among another log's phrases.
        own = config.policy.previous is None and config.policy.emotion_choices is None
        chosen = {"phrase"} if config.data.phrases and own else set()
        self._load_text = Loader(frozenset({"prompt", "added", "target"} | chosen), cache, policy.device)
        policy.null = policy.null.to(policy.device)
        self._adamw = self._make_optimizer()
        policy.trained, self._optimizer = accelerator.prepare(policy.trained, self._adamw)
        if objective.slow_decay(0) is not None:
            policy.start_slow()
        self._ema = EMAModel(self._parameters(), decay=config.train.ema) if config.train.ema else None
        self._outcome = Outcome(steps=0)
        self._best_held_out: tuple[float, int] = (math.inf, 0)
        self._metrics = Metrics(accelerator, folder)
        #: Why training stopped early, so that a resumed one does not run on.
        self._stopped: str | None = None
        #: A start on text that broke off.
        self._begun_text: dict[str, Any] | None = None

    # The loop.

    def run(self, resume: bool = False, watch: Watcher | None = None) -> Outcome:
        """Train until the end, an early stop, or Ctrl-C or SIGTERM (which let the step end and save).

        Raises:
            Failure: The loss is not a number, or the disk does not take a checkpoint.
            UserError: `resume` with other data.
        """
        outcome, knobs = self._outcome, self.config.train
        self._began = time.perf_counter()
        begun = resume and self._restore()
        stop = self._stopped
        with listening() as asked, self._metrics.open(outcome.steps if begun else -1):
            if not begun:
                self._look()
            if self._text is not None and (not begun or self._begun_text) and not self._warm_start(asked):
                stop = "interrupted"
            while outcome.steps < knobs.steps and stop is None:
                figures = self._step(outcome.steps)
                outcome.steps += 1
                outcome.loss = figures["loss"]
                if self._due(knobs.log_every):
                    self._metrics.log(outcome.steps, figures)
                if self._due(self.config.guard.every):
                    stop = self._stopped = self._look()
                # What is collected anew is not kept: a resumed training begins with a collection.
                between = outcome.steps % self._train.every == 0
                if between and self._anywhere(asked) and outcome.steps < knobs.steps:
                    stop = "interrupted"
                if (between and self._due(knobs.checkpoint_every)) or stop:
                    self._save()
                if watch is not None and self.is_main:
                    watch(outcome.steps, knobs.steps, figures)
        outcome.reason = stop or "finished"
        outcome.seconds += time.perf_counter() - self._began
        return outcome

    @property
    def is_main(self) -> bool:
        """Whether this process writes."""
        return self._accelerator.is_main_process

    def _due(self, every: int) -> bool:
        """Whether something that is done so often, and at the end, is due; 0 is never."""
        step = self._outcome.steps
        return every > 0 and (step % every == 0 or step == self.config.train.steps)

    def _warm_start(self, asked: list[int]) -> bool:
        """Teach the emotion tokens on text alone, the same in all processes; False if asked to stop meanwhile."""
        knobs, text = self.config.train, self._text
        assert text is not None
        order = Order(len(text), knobs.seed)

        def batch(step: int) -> Batch:
            chosen = order.take(step * BATCH, BATCH)
            return self._load_text(text.fetch(chosen, np.random.default_rng([6, knobs.seed, step])))

        taught, loss, self._begun_text = warm_start(
            self._plain_tokens, batch, knobs.text_steps, lambda: self._anywhere(asked), self._begun_text
        )
        if self._begun_text is not None:
            self._save()
            return False
        self._check("text loss", loss, 0)
        taught_state = {f"tokens.{name}": value for name, value in taught.state_dict().items()}
        self._set_weights(taught_state, whole=False)
        if self._ema is not None:
            self._ema = EMAModel(self._parameters(), decay=knobs.ema)
        if self.objective.slow_decay(0) is not None:
            self.policy.update_slow(0.0)
        self._metrics.log(0, {"text_loss": loss})
        self._save()
        return True

    def _anywhere(self, asked: list[int]) -> bool:
        """Whether any process was asked to stop: one that stops alone leaves the others waiting for it."""
        if asked:
            self._accelerator.set_trigger()
        return self._accelerator.check_trigger()

    def _step(self, step: int) -> dict[str, float]:
        """One optimizer step; a function of the step's number and the tensors that a checkpoint holds."""
        began, knobs, accelerator = time.perf_counter(), self.config.train, self._accelerator
        rates = self._set_rates(step)
        told = self._train.begin(step)
        totals: dict[str, float] = {}
        for micro in range(knobs.accumulation):
            # The share of this process in the step's micro-batches, which have one order whoever takes them.
            part = micro * accelerator.num_processes + accelerator.process_index
            seeds = [knobs.seed, step, part, 0]
            number = step * knobs.accumulation * accelerator.num_processes + part
            chosen = self._order.take(number * knobs.batch_size, knobs.batch_size)
            batch = self._load(self._train.fetch(chosen, np.random.default_rng([3, *seeds])))
            generator = torch.Generator().manual_seed(_mix(1, *seeds))
            torch.manual_seed(_mix(2, *seeds))
            last = micro == knobs.accumulation - 1
            with nullcontext() if last else accelerator.no_sync(self.policy.trained):
                loss, figures = self.objective.loss(batch, self.policy, generator)
                self._check("loss", loss.item(), step)
                accelerator.backward(loss / knobs.accumulation)
            for name, value in {"loss": loss.item(), **figures}.items():
                totals[name] = totals.get(name, 0.0) + value / knobs.accumulation
        if accelerator.num_processes > 1:
            mine = torch.tensor(list(totals.values()), device=accelerator.device)
            totals = dict(zip(totals, accelerator.reduce(mine, "mean").tolist(), strict=True))
        norm = self._clip(step)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        decay = self.objective.slow_decay(step)
        if decay is not None:
            self.policy.update_slow(decay)
        if self._ema is not None:
            self._ema.step(self._parameters())
        return totals | told | {"grad_norm": norm, "lr": rates, "seconds": time.perf_counter() - began}

    def _check(self, what: str, value: float, step: int) -> None:
        if not math.isfinite(value):
            raise Failure(
                f"the {what} became {value} at step {step}; {self._last_good()}: lower train.lr, "
                "set train.max_grad_norm, or use train.precision fp32 or bf16"
            )

    def _last_good(self) -> str:
        found = checkpoint.found(self._folder / "checkpoints")
        return f"the last good checkpoint is {found[-1].name}" if found else "there is no checkpoint yet"

    # Optimizer.

    def _make_optimizer(self) -> torch.optim.Optimizer:
        knobs, named = self.config.train, self.policy.parameters()
        rates = {
            "denoiser.": knobs.lr,
            "tokens.": knobs.lr if knobs.emotion_lr is None else knobs.emotion_lr,
            "visual.": knobs.lr if knobs.visual_lr is None else knobs.visual_lr,
        }
        groups = [
            {"params": params, "lr": rate}
            for part, rate in rates.items()
            if (params := [p for name, p in named.items() if name.startswith(part)])
        ]
        optimizer = torch.optim.AdamW(groups, betas=knobs.betas, weight_decay=knobs.weight_decay)
        # One step further than diffusers counts, so that the first step has a rate too.
        name = "constant_with_warmup" if knobs.schedule == "constant" else knobs.schedule
        self._schedule = get_scheduler(
            name, optimizer, num_warmup_steps=knobs.warmup + 1, num_training_steps=knobs.steps + 1
        ).lr_lambdas[0]
        return optimizer

    def _set_rates(self, step: int) -> float:
        """Learning rate by step alone, so that there is no scheduler to save."""
        factor = self._schedule(step + 1)
        for group in self._optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
        return self.config.train.lr * factor

    def _clip(self, step: int) -> float:
        limit = self.config.train.max_grad_norm or math.inf
        norm = whole(self._accelerator.clip_grad_norm_(self._parameters(), limit)).item()
        # A scaler leaves such a step out by itself, and lowers its scale.
        if self._accelerator.scaler is None:
            self._check("gradients' norm", norm, step)
        return norm

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside, the policy speaks with the averaged weights (with its own where there is no average)."""
        if self._ema is None:
            yield
            return
        self._ema.store(self._parameters())
        self._ema.copy_to(self._parameters())
        try:
            yield
        finally:
            self._ema.restore(self._parameters())

    def _parameters(self) -> list[nn.Parameter]:
        return list(self.policy.parameters().values())

    def parts(self) -> dict[str, Any]:
        """The student as `save_artifact` takes it, in one piece: where FSDP has split it, all processes have to ask."""
        policy = self.policy
        if not self._accelerator.is_fsdp2:
            return {"emotion_tokens": policy.tokens, "visual_prompts": policy.visual}
        state = get_model_state_dict(policy.trained, options=_STATE)
        for name, module in (("tokens", self._plain_tokens), ("visual", self._plain_visual)):
            if module is not None:
                module.load_state_dict(_below(name, state), strict=False)
        lora = {
            f"{policy.network.denoiser}.{key.replace(f'.{STUDENT}.', '.')}": value
            for key, value in _below("denoiser", state).items()
            if f".{STUDENT}." in key
        }
        return {"emotion_tokens": self._plain_tokens, "visual_prompts": self._plain_visual, "weights": lora}

    # Looking.

    def _look(self) -> str | None:
        """Guards, held-out loss and sample sheet; the reason to stop, if there is one."""
        config, outcome, step = self.config.guard, self._outcome, self._outcome.steps
        if config.every == 0:
            return None
        figures: dict[str, float] = {}
        stop = None
        with self.averaged():
            if self._held_out:
                figures["held_out_loss"] = loss = self._held_out_loss()
                if loss < self._best_held_out[0]:
                    self._best_held_out = (loss, step)
                elif config.patience and step - self._best_held_out[1] >= config.patience * config.every:
                    stop = "held_out_loss"
            if self._guards is not None:
                outcome.yardstick = outcome.yardstick or self._guards.yardstick()
                outcome.last_look, images = self._guards.look()
                outcome.first_look = outcome.first_look or outcome.last_look
                figures |= {f"guard/{name}": value for name, value in outcome.last_look.items()}
                if fallen := self._guards.fallen(outcome.last_look, outcome.first_look, outcome.yardstick):
                    outcome.flags.append(f"step {step}: {', '.join(fallen)}")
                    stop = "guard" if config.action == "stop" else stop
                if self._due(config.sheet_every) and self._accelerator.is_main_process:
                    sheet = self._folder / "samples" / f"step-{step:07d}.png"
                    sheet.parent.mkdir(exist_ok=True)
                    # The teacher's first: what is wrong with it the student learns too.
                    rows = [[*one, *other] for one, other in zip(self._guards.teacher, images, strict=True)]
                    grid = make_image_grid([it for row in rows for it in row], len(rows), len(rows[0]))
                    grid.save(sheet, compress_level=1)
        self._metrics.log(step, figures, look=True)
        return stop

    @torch.no_grad()
    def _held_out_loss(self) -> float:
        knobs = self.config.train
        assert self._held_out is not None
        count = min(len(self._held_out), 2 * knobs.batch_size)
        batch = self._load(self._held_out.fetch(range(count), np.random.default_rng([4, knobs.seed])))
        generator = torch.Generator().manual_seed(_mix(5, knobs.seed))
        with self.policy.voice(STUDENT):
            return self.objective.loss(batch, self.policy, generator)[0].item()

    # Checkpoints.

    def _save(self) -> None:
        accelerator, memory = self._accelerator, self.policy.memory
        state = {
            "weights": get_model_state_dict(self.policy.trained, options=_STATE),
            "optimizer": get_optimizer_state_dict(self.policy.trained, self._adamw, options=_STATE),
            "ema": self._ema and dict(zip(self.policy.parameters(), self._ema.shadow_params, strict=True)),
            "slow": {name: tensor.cpu() for name, tensor in self.policy.slow_state().items()},
            "memory": memory
            and {"names": torch.tensor(list(memory)), "rows": torch.stack(list(memory.values()))},
            "scaler": accelerator.scaler and accelerator.scaler.state_dict(),
            "tokens": self._about_tokens,
            "text": self._begun_text,
            "data_hash": self._data_hash,
            "best_held_out": list(self._best_held_out),
            "stopped": self._stopped,
            **{name: getattr(self._outcome, name) for name in _OUTCOME},
            "seconds": self._outcome.seconds + time.perf_counter() - self._began,
        }
        if accelerator.is_main_process:
            folder = self._folder / "checkpoints"
            try:
                checkpoint.save(folder, self._outcome.steps, state, self.config.train.keep_checkpoints)
            except OSError as error:
                raise Failure(
                    f"cannot save the checkpoint of step {self._outcome.steps} in {folder}: "
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
                "this training was begun with other emotion tokens or visual prompts, those of another bank, another "
                "version of emoloop or another previous adapter: start anew with another --out"
            )
        self._set_weights(state["weights"])
        set_optimizer_state_dict(self.policy.trained, self._adamw, state["optimizer"], options=_STATE)
        if self._ema is not None:
            self._ema.optimization_step = state["step"]
            for name, tensor in zip(self.policy.parameters(), self._ema.shadow_params, strict=True):
                tensor.copy_(state["ema"][name])
        slow = self.policy.slow_state()
        for name, tensor in state["slow"].items():
            slow[name].copy_(tensor)
        if packed := state["memory"]:
            names = [(int(one), int(other)) for one, other in packed["names"].tolist()]
            self.policy.memory = dict(zip(names, packed["rows"], strict=True))
        if self._accelerator.scaler is not None:
            self._accelerator.scaler.load_state_dict(state["scaler"])
        for name in _OUTCOME:
            setattr(self._outcome, name, state[name])
        one, other = state["best_held_out"]
        self._best_held_out = one, other
        self._outcome.steps, self._stopped = state["step"], state["stopped"]
        self._begun_text = state.get("text")
        return True

    def _set_weights(self, weights: dict[str, Any], whole: bool = True) -> None:
        options = StateDictOptions(full_state_dict=True, strict=False)
        # The call renames keys of its dictionary for several processes, and fills what is missing with what is there.
        outcome = set_model_state_dict(self.policy.trained, dict(weights), options=options)
        missing = get_model_state_dict(self.policy.trained, options=_STATE).keys() - weights if whole else ()
        lost = sorted(missing) + sorted(outcome.unexpected_keys)
        if lost:
            raise UserError(f"the checkpoint is of another policy: {lost[0]} has no place in it")


def _below(part: str, state: dict[str, Any]) -> dict[str, Any]:
    """The entries of a part, by their names in it."""
    return {key.removeprefix(f"{part}."): it for key, it in state.items() if key.startswith(f"{part}.")}


def _mix(*numbers: int) -> int:
    """One seed from several numbers, far apart for neighbours."""
    high, low = np.random.SeedSequence(list(numbers)).generate_state(2, np.uint32)
    return (int(high) << 31) ^ int(low)
