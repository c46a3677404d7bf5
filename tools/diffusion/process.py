"""Noise processes: how a clean latent becomes a noisy one, and what the network is asked to say about it.

Two are enough for the pipelines we take: the straight line of rectified flow (SD3, FLUX) and the
variance-preserving diffusion of SD1.5 and SDXL. An objective speaks only to this interface, so one loss
serves all of them. Shapes: latents are (B, C, H, W), times (B,).
"""

from __future__ import annotations

from copy import deepcopy
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

TimeSampling = Literal["logit_normal", "uniform", "steps"]


def _like(t: Tensor, x: Tensor) -> Tensor:
    return t.to(x).reshape(-1, *(1,) * (x.ndim - 1))


class Process(Protocol):
    """Common interface; `t` is whatever the process calls time, and runs from noisy to clean."""

    #: What the network predicts: "velocity", "epsilon" or "v_prediction".
    prediction: str

    def draw(self, n: int, generator: torch.Generator, how: TimeSampling = "logit_normal") -> Tensor:
        """Draw n training times on the CPU, so that a seed means the same on every device."""
        ...

    def add_noise(self, clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """The state at time t on the way from `clean` to `noise`."""
        ...

    def regression_target(self, clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What a perfect network would predict at that state."""
        ...

    def clean(self, x: Tensor, prediction: Tensor, t: Tensor) -> Tensor:
        """The clean latent that a prediction at state x stands for."""
        ...

    def schedule(self, steps: int, image_tokens: int) -> Tensor:
        """The steps + 1 times of a sampler, from pure noise to clean, float32 on the CPU."""
        ...

    def step(self, x: Tensor, prediction: Tensor, t: Tensor, t_next: Tensor) -> Tensor:
        """One deterministic sampler step from t to t_next (both 0-dim)."""
        ...


class Flow(Process):
    """Rectified flow: x_t = (1 - t) x_0 + t ε, velocity ε - x_0, t = sigma in [0, 1].

    Args:
        scheduler: A `FlowMatchEulerDiscreteScheduler`; its shift is used for sampling and for training times.
        even_sigmas: Sample at evenly spaced sigmas, as FLUX's pipeline tells its scheduler to.
    """

    prediction = "velocity"

    def __init__(self, scheduler: Any, even_sigmas: bool = False) -> None:
        self._scheduler = deepcopy(scheduler)
        self._even = even_sigmas

    def draw(self, n: int, generator: torch.Generator, how: TimeSampling = "logit_normal") -> Tensor:
        """Logit-normal (Esser et al. 2024) or uniform, then moved by the scheduler's shift as sampling is."""
        if how == "steps":
            times = self.schedule(28, 256)[:-1]
            return times[torch.randint(len(times), (n,), generator=generator)]
        if how == "uniform":
            t = torch.rand(n, generator=generator)
        else:
            t = torch.sigmoid(torch.randn(n, generator=generator))
        shift = float(self._scheduler.config.get("shift") or 1.0)
        return shift * t / (1 + (shift - 1) * t)

    def add_noise(self, clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """(1 - t) x_0 + t ε."""
        t = _like(t, clean)
        return (1 - t) * clean + t * noise

    def regression_target(self, clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """ε - x_0."""
        return noise - clean

    def clean(self, x: Tensor, prediction: Tensor, t: Tensor) -> Tensor:
        """x_t - t v."""
        return x - _like(t, x) * prediction

    def schedule(self, steps: int, image_tokens: int) -> Tensor:
        """The scheduler's own sigmas, shifted by resolution where that is configured."""
        config = self._scheduler.config
        how: dict[str, Any] = {"num_inference_steps": steps}
        if self._even:
            how = {"sigmas": torch.linspace(1, 1 / steps, steps).tolist()}
        if config.get("use_dynamic_shifting"):
            from diffusers.pipelines.flux.pipeline_flux import calculate_shift

            names = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
            how["mu"] = calculate_shift(image_tokens, *(config[name] for name in names))
        self._scheduler.set_timesteps(**how)
        return self._scheduler.sigmas.float().cpu().clone()

    def step(self, x: Tensor, prediction: Tensor, t: Tensor, t_next: Tensor) -> Tensor:
        """Euler: x + (t' - t) v."""
        return x + (t_next - t).to(x) * prediction


class Diffusion(Process):
    """Variance-preserving diffusion over integer timesteps, predicting epsilon or v (Salimans & Ho 2022).

    Args:
        scheduler: Any discrete scheduler with `alphas_cumprod` and a `prediction_type`.
    """

    def __init__(self, scheduler: Any) -> None:
        self.prediction = scheduler.config.prediction_type
        self._scheduler = deepcopy(scheduler)
        self._alphas: Tensor = scheduler.alphas_cumprod.float().cpu()

    def _coefficients(self, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        alpha = self._alphas.to(x.device)[t.long().to(x.device)]
        # The square roots are taken in the latents' own precision, as diffusers' schedulers do.
        alpha = alpha.to(x.dtype)
        return _like(alpha**0.5, x), _like((1 - alpha) ** 0.5, x)

    def draw(self, n: int, generator: torch.Generator, how: TimeSampling = "uniform") -> Tensor:
        """Uniform integer timesteps, whatever was asked: nothing else is customary here."""
        return torch.randint(len(self._alphas), (n,), generator=generator)

    def add_noise(self, clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """√ᾱ x_0 + √(1 - ᾱ) ε."""
        a, s = self._coefficients(t, clean)
        return a * clean + s * noise

    def regression_target(self, clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """ε, or v = √ᾱ ε - √(1 - ᾱ) x_0."""
        if self.prediction == "epsilon":
            return noise
        a, s = self._coefficients(t, clean)
        return a * noise - s * clean

    def clean(self, x: Tensor, prediction: Tensor, t: Tensor) -> Tensor:
        """(x - √(1-ᾱ) ε) / √ᾱ, or √ᾱ x - √(1-ᾱ) v."""
        a, s = self._coefficients(t, x)
        return (x - s * prediction) / a if self.prediction == "epsilon" else a * x - s * prediction

    def schedule(self, steps: int, image_tokens: int) -> Tensor:
        """The scheduler's own timesteps; -1 at the end stands for clean."""
        self._scheduler.set_timesteps(steps)
        times = self._scheduler.timesteps.float().cpu().unique().flip(0)
        return torch.cat([times, torch.tensor([-1.0])])

    def step(self, x: Tensor, prediction: Tensor, t: Tensor, t_next: Tensor) -> Tensor:
        """DDIM with η = 0 (Song et al. 2021)."""
        t = t.expand(len(x))
        clean = self.clean(x, prediction, t)
        if t_next < 0:
            return clean
        a, s = self._coefficients(t, x)
        noise = (x - a * clean) / s
        return self.add_noise(clean, noise, t_next.expand(len(x)))
