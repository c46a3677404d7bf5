"""The policy: one network, spoken to in several voices by switching adapters.

    student    base + LoRA in training + emotion tokens (+ visual prompts)
    reference  what made the traces: the base, or the base with the adapter of the round before
    slow       a moving average of the student, where an objective wants one

All share the base's weights in memory. Switching touches two attributes of each LoRA layer and nothing else
(peft's own switches also flip `requires_grad`, which disturbs a backward pass that is still to come). With
every adapter off, the network runs the base's own layers, so its output equals the base's to the bit.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice, pairwise
from typing import Any, NamedTuple

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from PIL.Image import Image
from torch import Tensor, nn

from ..domain import UserError, first_line
from ..tools.diffusion.adapter import Adapter
from ..tools.diffusion.conditioners import EmotionConditioner
from ..tools.diffusion.families import Conditioning, Family
from ..tools.diffusion.visual import VisualBridge, VisualConditioner

STUDENT, PREVIOUS, SLOW = "student", "previous", "slow"

#: Further voices of `Policy.sample`: what made the traces, and the student with its LoRA off.
REFERENCE, SWITCHED_OFF = "reference", "switched_off"


class Trained(nn.Module):
    """What the trainer hands to accelerate. Every voice goes through its forward, so wrappers see all calls."""

    def __init__(
        self, network: Family, tokens: EmotionConditioner, visual: VisualConditioner | None = None
    ) -> None:
        super().__init__()
        self.denoiser: nn.Module = network.module
        #: What accelerate splits among processes (`fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP`).
        self._no_split_modules = network.module._no_split_modules
        self.tokens, self.visual = tokens, visual
        self._network = network

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        prompt: Tensor,
        pooled: Tensor | None,
        target: Tensor | None,
        guidance: float,
    ) -> Tensor:
        """Prediction (B, C, H, W) of the adapter that is switched on, with the student's conditioners for a target.

        A `prompt` that carries a visual prompt already (`Conditioning.carrier`) is another voice's.
        """
        told = Conditioning(prompt, pooled)
        if target is not None:
            told = _condition(told, target, self.tokens, self.visual)
        return self._network.denoise(self.denoiser, x, t, told, guidance)


#: A state (B, C, H, W), its times (B,) and what the student predicts there.
State = tuple[Tensor, Tensor, Tensor]


class Graded(NamedTuple):
    """Which steps of a walk carry gradient; see `Policy.path`."""

    steps: Collection[int]
    detach: bool
    states: list[State]


#: Emotion tokens and visual prompts of a voice.
Conditioners = tuple[EmotionConditioner | None, VisualConditioner | None]


def _condition(
    told: Conditioning, target: Tensor, tokens: EmotionConditioner | None, visual: VisualConditioner | None
) -> Conditioning:
    """What a voice makes of prompt and target; visual prompts are found by the unchanged prompt, so first."""
    for module in (visual, tokens):
        told = told if module is None else module(told, {"target": target})
    return told


class Policy:
    """See the module's text.

    Args:
        network: The base, frozen by this constructor.
        tokens: The student's emotion tokens.
        rank: Rank of the LoRA.
        alpha: Its alpha; the update is scaled by alpha / rank.
        targets: Name endings of the layers to adapt; None takes the family's attention projections.
        dropout: Dropout in front of the LoRA.
        seed: Seed of the LoRA's first weights.
        steps: Sampler steps by default.
        guidance: Guidance by default.
        size: (height, width) in pixels.
        negative_prompt: Of the unconditional branch.
        previous: The adapter of the round before, bound to the pipeline under the name `PREVIOUS`; the
            student starts as its copy, and rank, alpha, targets and dropout are its own.
        visual: The student's visual prompts, where it has some.

    Raises:
        UserError: The LoRA binds no layer.
    """

    def __init__(
        self,
        network: Family,
        tokens: EmotionConditioner,
        *,
        rank: int,
        alpha: float,
        targets: Sequence[str] | None = None,
        dropout: float = 0.0,
        seed: int = 0,
        steps: int,
        guidance: float,
        size: tuple[int, int],
        negative_prompt: str | None = None,
        previous: Adapter | None = None,
        visual: VisualConditioner | None = None,
    ) -> None:
        self.network, self.tokens, self.visual = network, tokens, visual
        self.process = network.process()
        self.steps, self.guidance = steps, guidance
        self.latent_shape = network.latent_shape(*size)
        module = network.module
        for component in network.pipe.components.values():
            if isinstance(component, nn.Module):
                component.requires_grad_(False).eval()
        self.device = next(module.parameters()).device
        self.dtype = next(module.parameters()).dtype
        self.null = network.encode(negative_prompt)
        #: What `recall` remembers; part of a checkpoint, so that a resumed run computes the same.
        self.memory: dict[tuple[int, int], Tensor] = {}
        self._conditioners: dict[str | None, Conditioners] = {None: (None, None), STUDENT: (tokens, visual)}
        self._bridge = previous.bridge if previous is not None else None
        #: Hash of the adapter that the student started from.
        self.previous_id = previous.id if previous is not None else None
        if visual is not None:
            visual.to(self.device, torch.float32).requires_grad_(True)
            self._bridge = self._bridge or VisualBridge(network, visual)
        self._layers: list[Any] = []
        if previous is None:
            self._reference = None
            config = LoraConfig(
                r=rank,
                lora_alpha=alpha,  # type: ignore[arg-type]  # peft takes floats
                target_modules=list(targets or network.lora_targets),
                exclude_modules=list(network.lora_excluded) or None,
                lora_dropout=dropout,
                init_lora_weights="gaussian",
            )
        else:
            self._reference, config = PREVIOUS, module.peft_config[PREVIOUS]
            self._conditioners[PREVIOUS] = previous.emotion_tokens, previous.visual_prompts
            for module in filter(None, self._conditioners[PREVIOUS]):
                module.requires_grad_(False)
        self._add(STUDENT, config, seed)
        if previous is not None:
            for name, start in self._lora(PREVIOUS).items():
                self._lora(STUDENT)[name].data.copy_(start)
        self.tokens.to(self.device, torch.float32).requires_grad_(True)
        #: The module to train; the trainer may replace it by its wrapped form.
        self.trained: nn.Module = Trained(network, tokens, visual)
        self.config = config

    # Voices.

    def student(self, x: Tensor, t: Tensor, condition: Conditioning, target: Tensor) -> Tensor:
        """Prediction of the weights in training; carries gradient."""
        return self._predict(x, t, condition, target, self.guidance)

    @torch.no_grad()
    def reference(self, x: Tensor, t: Tensor, condition: Conditioning, target: Tensor) -> Tensor:
        """Prediction of what made the traces; the target matters only to a previous adapter with tokens."""
        with self.voice(self._reference):
            return self._predict(x, t, self._heard(condition, target, self._reference), None, self.guidance)

    @torch.no_grad()
    def switched_off(self, x: Tensor, t: Tensor, condition: Conditioning, target: Tensor) -> Tensor:
        """Prediction under the student's own conditioners with its LoRA off (that of the round before on): what it
        would say if the LoRA had learned nothing."""
        with self.voice(self._reference):
            return self._predict(x, t, condition, target, self.guidance)

    @torch.no_grad()
    def slow(self, x: Tensor, t: Tensor, condition: Conditioning, target: Tensor) -> Tensor:
        """Prediction of the student's moving average."""
        with self.voice(SLOW):
            return self._predict(x, t, self._heard(condition, target, SLOW), None, self.guidance)

    def recall(self, names: Sequence[tuple[int, int]], make: Callable[[Tensor], Tensor]) -> Tensor:
        """Rows of numbers that are computed once and remembered, for as long as the training lasts.

        Args:
            names: B names.
            make: Takes the places (in `names`) of those not known yet, returns (their number, W).

        Returns:
            (B, W) on the CPU.
        """
        missing = [place for place, name in enumerate(names) if name not in self.memory]
        if missing:
            for place, row in zip(missing, make(torch.tensor(missing)).cpu(), strict=True):
                self.memory[names[place]] = row
        return torch.stack([self.memory[name] for name in names])

    def _heard(self, condition: Conditioning, target: Tensor, voice: str | None) -> Conditioning:
        """What a voice with conditioners of its own (or none) is told; the student's stay out of it."""
        return _condition(condition, target, *self._conditioners[voice])

    def _predict(
        self, x: Tensor, t: Tensor, told: Conditioning, target: Tensor | None, guidance: float
    ) -> Tensor:
        return self.trained(x.to(self.dtype), t.to(x.device), told.carrier, told.pooled, target, guidance)

    # Sampling.

    @torch.no_grad()
    def rollout(
        self,
        condition: Conditioning,
        target: Tensor,
        *,
        steps: int | None = None,
        guidance: float | None = None,
        generator: torch.Generator,
        keep: int,
        early: float = 1.0,
        late: float = 1.0,
    ) -> tuple[Tensor, Tensor]:
        """States of the student's own guided sampling.

        Args:
            condition: (B) neutral prompts.
            target: (B, 2).
            steps: Sampler steps, None for the default.
            guidance: None for the default.
            generator: CPU generator of the noise and of the choice of states.
            keep: States a row, drawn without repetition and for each row by itself; at most as many as there are.
            early: Share of the steps, from the noisy end, whose states are drawn from; the rest is not walked.
            late: Share of the steps, from the clean end, likewise; one state at least is left of both.

        Returns:
            States (keep · B, C, H, W) and times (keep · B,), state-major.
        """
        steps, guidance = steps or self.steps, self.guidance if guidance is None else guidance
        n, walked = len(condition), max(1, round(early * steps))
        first = min(walked - 1, steps - max(1, round(late * steps)))
        noise = torch.randn(n, *self.latent_shape, generator=generator)
        chosen = first + torch.rand(n, walked - first, generator=generator).argsort(1)[:, :keep]
        with self.voice(STUDENT):
            # The last step leads to the clean image, which is no state to learn from: it is not taken.
            path = islice(self._walk(noise.to(self.device), condition, target, steps, guidance), walked)
            states, times = zip(*path, strict=True)
        kept = torch.stack(states)[chosen.T, torch.arange(n)].reshape(-1, *self.latent_shape)
        return kept, torch.stack(times)[chosen.T].reshape(-1).to(self.device)

    def path(
        self,
        noise: Tensor,
        condition: Conditioning,
        target: Tensor,
        trained: Collection[int],
        *,
        detach: bool,
        steps: int | None = None,
        guidance: float | None = None,
    ) -> tuple[Tensor, list[State]]:
        """The student's own sampling, with gradient.

        Args:
            noise: (B, C, H, W).
            condition: (B) neutral prompts.
            target: (B, 2).
            trained: Numbers of the steps whose predictions carry gradient.
            detach: Whether the denoiser takes each state without the gradient that led to it.
            steps: Sampler steps, None for the default.
            guidance: None for the default.

        Returns:
            Clean latents (B, C, H, W), and of each trained step the state, its times and the conditional prediction.
        """
        states: list[State] = []
        guidance = self.guidance if guidance is None else guidance
        walk = self._walk(
            noise, condition, target, steps or self.steps, guidance, Graded(trained, detach, states)
        )
        with self.voice(STUDENT):
            *_, (clean, _) = walk
        return clean, states

    @torch.no_grad()
    def sample(
        self,
        condition: Conditioning,
        target: Tensor,
        seeds: Sequence[int],
        *,
        voice: str = STUDENT,
        steps: int | None = None,
    ) -> list[Image]:
        """Images, each from its own seed, as the pipeline makes them.

        Args:
            condition: (B) prompts.
            target: (B, 2) targets; a base reference has no ear for them.
            seeds: B seeds.
            voice: `STUDENT`, `REFERENCE` or `SWITCHED_OFF`.
            steps: None for the default.
        """
        noise = torch.cat(
            [torch.randn(1, *self.latent_shape, generator=torch.Generator().manual_seed(s)) for s in seeds]
        ).to(self.device)
        told: tuple[Conditioning, Tensor | None] = (condition, target)
        if voice == REFERENCE:
            told = self._heard(condition, target, self._reference), None
        with self.voice(STUDENT if voice == STUDENT else self._reference):
            *_, (clean, _) = self._walk(noise, *told, steps or self.steps, self.guidance)
        return self.network.decode(clean)

    def _walk(
        self,
        x: Tensor,
        told: Conditioning,
        target: Tensor | None,
        steps: int,
        guidance: float,
        graded: Graded | None = None,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """States and times of guided sampling from noise x to the clean image."""
        times = self.process.schedule(steps, self.network.image_tokens(self.latent_shape))
        n, guided = len(x), self.network.guided(guidance)
        if guided:
            null = self.null.expand(n)
            if target is None:
                # Extra tokens and visual prompts of a previous adapter: the negative branch needs as many null ones.
                for module in filter(None, self._conditioners[self._reference]):
                    null = module.null(null)
            told = Conditioning.cat([null, told])
            target = None if target is None else torch.cat([torch.full_like(target, torch.nan), target])
        for number, (t, t_next) in enumerate(pairwise(times)):
            yield x, t
            learns = graded is not None and number in graded.steps
            state = x if graded is None or (learns and not graded.detach) else x.detach()
            both = state.repeat(2, 1, 1, 1) if guided else state
            with torch.set_grad_enabled(learns):
                out = self._predict(both, t.expand(len(both)), told, target, guidance)
            conditional = out[-n:]
            if guided:
                unconditional = out[:n]
                out = unconditional + guidance * (conditional - unconditional)
            if graded is not None and learns:
                graded.states.append((state.detach(), t.expand(n).to(x.device), conditional))
            x = self.process.step(x, out.to(x), t, t_next)
        yield x, times[-1]

    # Weights.

    def parameters(self) -> dict[str, nn.Parameter]:
        """What is trained, by name."""
        return self._lora(STUDENT) | _named(*self._conditioners[STUDENT])

    def start_slow(self) -> None:
        """Begin the moving average, equal to the student."""
        if SLOW not in self._conditioners:
            self._add(SLOW, self.config, 0)
            self._conditioners[SLOW] = copy.deepcopy(self._conditioners[STUDENT])
            for module in filter(None, self._conditioners[SLOW]):
                module.requires_grad_(False)
        self.update_slow(0.0)

    @torch.no_grad()
    def update_slow(self, decay: float) -> None:
        """slow ← decay · slow + (1 - decay) · student."""
        student = self.parameters()
        for name, value in self.slow_state().items():
            value.lerp_(student[name].detach(), 1 - decay)

    def slow_state(self) -> dict[str, Tensor]:
        """The moving average under the student's names (the live tensors); empty where there is none."""
        if SLOW not in self._conditioners:
            return {}
        return {name: p.data for name, p in (self._lora(SLOW) | _named(*self._conditioners[SLOW])).items()}

    # Adapters.

    def _add(self, name: str, config: Any, seed: int) -> None:
        """Bind a further adapter; the student's alone stays in training."""
        module = self.network.module
        try:
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                module.add_adapter(copy.deepcopy(config), adapter_name=name)
        except ValueError as error:
            raise UserError(
                f"the LoRA binds no layer of {type(module).__name__}: policy.targets "
                f"{sorted(config.target_modules)} name none ({first_line(error)[:120]})"
            ) from error
        self._layers = [layer for layer in module.modules() if isinstance(layer, LoraLayer)]
        # Adding an adapter makes peft train that one and freeze the others.
        for parameter_name, parameter in module.named_parameters():
            parameter.requires_grad_(f".{STUDENT}." in parameter_name)
            if f".{STUDENT}." in parameter_name or f".{SLOW}." in parameter_name:
                # Small updates vanish in half precision.
                parameter.data = parameter.data.float()
        self._speak(STUDENT, True)

    def _lora(self, name: str) -> dict[str, nn.Parameter]:
        """The parameters of an adapter, under the student's names."""
        named = self.network.module.named_parameters()
        return {
            f"denoiser.{key.replace(f'.{name}.', f'.{STUDENT}.')}": parameter
            for key, parameter in named
            if f".{name}." in key
        }

    def _speak(self, name: str | None, drops: bool) -> None:
        self._speaks = name, drops
        for layer in self._layers:
            layer._disable_adapters = name is None
            if name is not None:
                layer._active_adapter = [name]
            for adapter, dropout in layer.lora_dropout.items():
                dropout.train(drops and adapter == STUDENT)
        if self._bridge is not None and (visual := self._conditioners.get(name, (None, None))[1]) is not None:
            self._bridge.module = visual

    @contextmanager
    def voice(self, name: str | None) -> Iterator[None]:
        """Speak as somebody (None is the bare model), without dropout: only the student's forward for a loss has it."""
        before = self._speaks
        self._speak(name, False)
        try:
            yield
        finally:
            self._speak(*before)


def _named(tokens: EmotionConditioner | None, visual: VisualConditioner | None) -> dict[str, nn.Parameter]:
    """The parameters of a voice's conditioners, by the names that they have in `Trained`."""
    parts = {"tokens": tokens, "visual": visual}
    return {
        f"{part}.{name}": parameter
        for part, module in parts.items()
        if module is not None
        for name, parameter in module.named_parameters()
    }
