"""The policy on tiny pipelines of every class: its voices, and that the base stays the base to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F
from emoloop.domain import UserError
from emoloop.rl.objectives import load_objective
from emoloop.rl.objectives.base import no_target
from emoloop.rl.policy import PREVIOUS, Policy
from emoloop.tools.diffusion.adapter import load_artifact, save_artifact
from emoloop.tools.diffusion.conditioners import EmotionConditioner
from emoloop.tools.diffusion.families import Conditioning, family_of


def make(name: str, pipe: Any = None, **how: Any) -> Policy:
    pipe = pipe or tiny.build(name)
    network = family_of(pipe, tiny.DEFAULTS[name]["call"])
    tokens = how.pop("tokens", None) or EmotionConditioner.for_embeds(network.encode("a dog"))
    settings: dict[str, Any] = {"rank": 4, "alpha": 8, "steps": 3, "guidance": 3.0, "size": (32, 32)}
    return Policy(network, tokens, **(settings | how))


def stir(policy: Policy, seed: int = 0) -> None:
    """Give the student weights that do something."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.parameters().values():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))


def inputs(policy: Policy, n: int = 2) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(n, *policy.latent_shape, generator=generator)
    t = policy.process.draw(n, generator)
    told = policy.network.encode("a red house").expand(n)
    return x, t, told, torch.tensor([[2.0, -1.0], [float("nan"), 1.5]])[:n]


@pytest.mark.parametrize("name", tiny.NAMES)
def test_with_the_adapter_off_the_policy_is_the_base_to_the_bit(name: str) -> None:
    bare = family_of(tiny.build(name), tiny.DEFAULTS[name]["call"])
    policy = make(name)
    x, t, told, target = inputs(policy)
    with torch.no_grad():
        base = bare.denoise(bare.module, x, t, told, 3.0)
        # Training starts exactly at the base as well.
        assert torch.allclose(policy.student(x, t, told, target), base, atol=1e-6)
    stir(policy)
    policy.start_slow()
    student = policy.student(x, t, told, target)
    assert torch.equal(policy.reference(x, t, told, target), base)
    assert not torch.allclose(student, base, atol=1e-4)
    assert torch.equal(policy.slow(x, t, told, target), student.detach())
    # Speaking in another voice leaves the student and its gradients as they were.
    assert torch.equal(policy.student(x, t, told, target), student)
    policy.student(x, t, told, target).square().mean().backward()
    assert all(p.requires_grad for p in policy.parameters().values())
    moved = {n for n, p in policy.network.module.named_parameters() if p.grad is not None}
    assert moved and all(".student." in n for n in moved)


@pytest.mark.parametrize("name", tiny.NAMES)
def test_samples_are_the_pipelines_own(name: str) -> None:
    pipe, call = tiny.build(name), tiny.DEFAULTS[name]["call"]
    network = family_of(pipe, call)
    guided = network.guided(3.0)
    negative = network.encode(None) if guided else None
    expected = pipe(
        **network.arguments(network.encode("a dog"), negative),
        num_inference_steps=3,
        guidance_scale=3.0,
        height=32,
        width=32,
        generator=[torch.Generator().manual_seed(3)],
        output_type="np",
        **call,
    ).images[0]
    policy = make(name, pipe)
    image = policy.sample(policy.network.encode("a dog"), no_target(1), [3], voice="reference")[0]
    # Diffusion schedulers end a little before the clean image; a flow ends there.
    limit = 1 / 255 if name in ("sd3", "flux") else 5 / 255
    assert np.abs(np.asarray(image) / 255 - expected).max() <= limit + 1e-6


@pytest.mark.parametrize("name", tiny.NAMES)
def test_what_a_refined_prompt_adds_may_stand_at_the_end_of_the_padding(name: str) -> None:
    policy = make(name)
    network, (x, t, *_) = policy.network, inputs(policy)
    told = network.encode("a dog by sea").expand(2)
    rows = told.prompt.shape[1]
    order = network.added_last("a dog", "a dog by sea", rows)
    assert sorted(order) == list(range(rows)) != order
    start = 0
    for count, tokenizer in network.texts:
        end = rows if count is None else start + count
        ids = tokenizer("a dog by sea", padding="max_length", max_length=end - start).input_ids
        short = len(tokenizer("a dog").input_ids)
        moved = [ids[place - start] for place in order[start:end]]
        added = len(tokenizer("a dog by sea").input_ids) - short
        assert moved[: short - 1] == ids[: short - 1]
        assert moved[short - 1] == tokenizer("a dog").input_ids[-1]
        assert moved[-added:] == ids[short - 1 : short - 1 + added]
        start = end
    # The network hears the rows as a set, so nothing else changes.
    moved = Conditioning(told.prompt[:, order], told.pooled)
    stood, lies = (network.denoise(network.module, x, t, it, 3.0) for it in (told, moved))
    assert torch.allclose(stood, lies, atol=1e-5)
    assert network.added_last("a dog", "dog", rows) == list(range(rows))


def test_one_request_of_a_batch_equals_it_alone() -> None:
    policy = make("sd3")
    stir(policy)
    told = policy.network.encode("a boat").expand(3)
    target = torch.tensor([[1.0, 1.0], [-2.0, 0.0], [0.0, 2.0]])
    together = policy.sample(told, target, [5, 6, 7])
    alone = policy.sample(told[1:2], target[1:2], [6])[0]
    assert np.abs(np.asarray(together[1], np.int16) - np.asarray(alone, np.int16)).max() <= 2


def test_rollout_keeps_states_of_its_own_path() -> None:
    policy = make("sd3")
    stir(policy)
    told, target = policy.network.encode("a boat").expand(4), torch.ones(4, 2)

    def roll(seed: int, keep: int = 2, steps: int = 5, early: float = 1.0) -> Any:
        generator = torch.Generator().manual_seed(seed)
        return policy.rollout(
            told, target, steps=steps, guidance=None, generator=generator, keep=keep, early=early
        )

    x, t = roll(0)
    assert x.shape == (8, *policy.latent_shape) and t.shape == (8,)
    times = set(policy.process.schedule(5, 64)[:-1].tolist())
    assert set(t.tolist()) <= times
    pairs = t.reshape(2, 4)
    assert (pairs[0] != pairs[1]).all()
    assert torch.equal(x, roll(0)[0]) and not torch.equal(x, roll(1)[0])
    # Every state is kept when all are asked for, noise included.
    x, t = roll(0, keep=5)
    assert sorted(set(t.tolist())) == sorted(times)
    noise = torch.randn(4, *policy.latent_shape, generator=torch.Generator().manual_seed(0))
    for row in range(4):
        first = next(i for i in range(5) if t.reshape(5, 4)[i, row] == 1)
        assert torch.equal(x.reshape(5, 4, *policy.latent_shape)[first, row], noise[row])
    # Early states are the noisy ones, and no more than there are.
    x, t = roll(0, keep=4, early=0.4)
    assert x.shape == (8, *policy.latent_shape)
    assert set(t.tolist()) == set(sorted(times)[-2:])


def test_dpo_on_a_unet_equals_the_formula_of_diffusers() -> None:
    policy = make("sd15")
    stir(policy)
    objective = load_objective("dpo", {"beta": 50.0})
    told = policy.network.encode("a dog").expand(2)
    generator = torch.Generator().manual_seed(9)
    winner, loser = (torch.randn(2, *policy.latent_shape, generator=generator) for _ in range(2))
    batch = {"prompt": told, "target": no_target(2), "winner": winner, "loser": loser}
    loss, figures = objective.loss(batch, policy, torch.Generator().manual_seed(1))

    # The same draws through diffusers' scheduler and peft's own switch, written as the script's maths says.
    pipe, unet = policy.network.pipe, policy.network.module
    draws = torch.Generator().manual_seed(1)
    t = torch.randint(1000, (2,), generator=draws).repeat(2)
    noise = torch.randn(winner.shape, generator=draws).repeat(2, 1, 1, 1)
    noisy = pipe.scheduler.add_noise(torch.cat([winner, loser]), noise, t)

    def errors() -> torch.Tensor:
        with torch.no_grad():
            out = unet(noisy, t, told.prompt.repeat(2, 1, 1)).sample
        return F.mse_loss(out, noise, reduction="none").mean((1, 2, 3))

    model_winner, model_loser = errors().chunk(2)
    unet.disable_adapters()
    reference_winner, reference_loser = errors().chunk(2)
    unet.enable_adapters()
    inside = (reference_winner - reference_loser) - (model_winner - model_loser)
    expected = -F.logsigmoid(25.0 * inside).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert figures["winner_error"] == pytest.approx(model_winner.mean().item(), rel=1e-5)


def test_the_reference_of_round_two_is_the_adapter_of_round_one(tmp_path: Path) -> None:
    first = make("sd3")
    stir(first)
    x, t, told, target = inputs(first)
    taught = first.student(x, t, told, target).detach()
    save_artifact(
        tmp_path / "one", first.network.pipe, adapter_name="student", emotion_tokens=first.tokens,
        call=first.network.call,
    )  # fmt: skip

    pipe = tiny.build("sd3")
    call = tiny.DEFAULTS["sd3"]["call"]
    previous = load_artifact(pipe, tmp_path / "one", name=PREVIOUS, call=call)
    assert previous.emotion_tokens is not None
    tokens = EmotionConditioner(**previous.emotion_tokens.config)
    tokens.load_state_dict(previous.emotion_tokens.state_dict())
    second = make("sd3", pipe, previous=previous, tokens=tokens)
    assert torch.allclose(second.reference(x, t, told, target), taught, atol=1e-6)
    assert torch.allclose(second.student(x, t, told, target), taught, atol=1e-6)
    stir(second, 1)
    assert torch.allclose(second.reference(x, t, told, target), taught, atol=1e-6)
    assert not torch.allclose(second.student(x, t, told, target), taught, atol=1e-3)


def test_a_lora_that_binds_nothing_is_refused() -> None:
    with pytest.raises(UserError, match=r"binds no layer of SD3Transformer2DModel.*nowhere"):
        make("sd3", targets=["nowhere"])


@pytest.mark.parametrize("name", ["sd3", "sd15"])
@pytest.mark.parametrize("objective", ["opd", "dpo", "nft", "rwr", "sft"])
def test_every_objective_moves_every_weight(name: str, objective: str) -> None:
    policy = make(name)
    stir(policy)
    policy.start_slow()
    generator = torch.Generator().manual_seed(2)

    def latent() -> torch.Tensor:
        return torch.randn(3, *policy.latent_shape, generator=generator)

    batch = {
        "prompt": policy.network.encode("a dog").expand(3),
        "refined": policy.network.encode("a red dog").expand(3),
        "target": torch.tensor([[1.0, 1.0], [-2.0, 0.5], [0.5, -2.0]]),
        "advantage": torch.tensor([0.5, 1.0, 0.2]),
        "winner": latent(),
        "loser": latent(),
        "latents": latent(),
        "reward": torch.tensor([0.5, 0.9, 0.1]),
        "rewards": torch.tensor([[0.5, 0.3], [0.2, 0.9], [0.1, 0.8]]),
    }
    loss, _ = load_objective(objective).loss(batch, policy, torch.Generator().manual_seed(0))
    loss.backward()
    still = [n for n, p in policy.parameters().items() if p.grad is None or not p.grad.abs().any()]
    # Weights that never move would stall distributed training.
    assert not still
