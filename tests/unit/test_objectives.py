"""Each loss against its closed form in float64, its gradient against finite differences, and the registry."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from emoloop.domain import UserError
from emoloop.rl.data.examples import source_for
from emoloop.rl.objectives import OBJECTIVES, load_objective
from emoloop.rl.objectives.base import Objective, no_target
from emoloop.rl.objectives.contrast import other
from emoloop.rl.objectives.dpo import DPO, dpo_loss, safeguarded
from emoloop.rl.objectives.nft import group_advantage, nft_loss
from emoloop.rl.objectives.opd import OPD, opd_loss
from emoloop.rl.objectives.rwr import reward_weights
from emoloop.rl.policy import Policy
from emoloop.tools.diffusion.families import Conditioning
from emoloop.tools.diffusion.process import Diffusion, Flow
from torch import Tensor

SHAPE = (2, 3, 3)


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class FakePolicy:
    """Linear voices in float64: prediction = x · a + mean of the embeddings + sum of the target."""

    def __init__(self, process: Any = None) -> None:
        from diffusers import FlowMatchEulerDiscreteScheduler

        self.process = process or Flow(FlowMatchEulerDiscreteScheduler())
        self.null = Conditioning(torch.zeros(1, 2, 4, dtype=torch.float64))
        self.weight = torch.tensor([0.3, -0.2], dtype=torch.float64, requires_grad=True)
        self.rollouts = 0

    def _voice(
        self, weight: Tensor, x: Tensor, t: Tensor, told: Conditioning, target: Tensor | None
    ) -> Tensor:
        push = told.prompt.mean((1, 2))
        if target is not None:
            push = push + weight[1] * target.nan_to_num().sum(1)
        return x * weight[0] + (push * (1 + t.double()))[:, None, None, None]

    def student(self, x: Tensor, t: Tensor, condition: Conditioning, target: Tensor) -> Tensor:
        return self._voice(self.weight, x, t, condition, target)

    def reference(self, x: Tensor, t: Tensor, condition: Conditioning, target: Tensor) -> Tensor:
        return self._voice(torch.tensor([0.1, 0.0], dtype=torch.float64), x, t, condition, None)

    def slow(self, x: Tensor, t: Tensor, condition: Conditioning, target: Tensor | None) -> Tensor:
        return self._voice(torch.tensor([0.2, 0.1], dtype=torch.float64), x, t, condition, target)

    def rollout(self, condition: Conditioning, target: Tensor, **how: Any) -> tuple[Tensor, Tensor]:
        self.rollouts += 1
        n = len(condition) * how["keep"]
        generator = how["generator"]
        return torch.randn(n, *SHAPE, generator=generator).double(), torch.rand(
            n, generator=generator
        ).double()


def batch(n: int = 4) -> dict[str, Any]:
    return {
        "prompt": Conditioning(rand(n, 2, 4, seed=1)),
        "refined": Conditioning(rand(n, 2, 4, seed=2)),
        "target": torch.tensor([[1.0, -1.0], [2.0, math.nan], [0.0, 1.0], [-2.0, 0.5]], dtype=torch.float64)[
            :n
        ],
        "advantage": torch.tensor([0.5, -0.2, 3.0, 0.1], dtype=torch.float64)[:n],
        "winner": rand(n, *SHAPE, seed=3),
        "loser": rand(n, *SHAPE, seed=4),
        "latents": rand(n, *SHAPE, seed=5),
        "reward": torch.tensor([0.5, 0.1, 0.9, 0.3], dtype=torch.float64)[:n],
        "rewards": torch.tensor(
            [[0.5, 0.2, 0.1], [0.1, 0.4, math.nan], [0.9, 0.8, 0.1], [0.3, 0.3, 0.3]]
        ).double()[:n],
    }


def test_opd_closed_form() -> None:
    student, teacher = rand(5, *SHAPE, seed=1), rand(5, *SHAPE, seed=2)
    advantage = torch.tensor([0.3, -1.0, 0.0, 2.5, 0.9], dtype=torch.float64)
    expected = 0.0
    for s, r, a in zip(student, teacher, advantage.tolist(), strict=True):
        mean_square = (
            sum((x - y) ** 2 for x, y in zip(s.flatten().tolist(), r.flatten().tolist(), strict=True)) / 18
        )
        expected += min(max(a, 0.0), 1.0) * mean_square / 5
    assert opd_loss(student, teacher, advantage, 1.0).item() == pytest.approx(expected, rel=1e-14)


def test_opd_gate_stops_the_gradient_of_a_revision_that_did_not_help() -> None:
    student = rand(2, *SHAPE).requires_grad_()
    opd_loss(student, rand(2, *SHAPE, seed=1), torch.tensor([-0.5, 0.5], dtype=torch.float64), 1.0).backward()
    assert student.grad is not None
    assert student.grad[0].abs().max() == 0
    assert student.grad[1].abs().min() > 0


def test_opd_sends_no_gradient_to_the_teacher() -> None:
    teacher = rand(2, *SHAPE).requires_grad_()
    student = rand(2, *SHAPE, seed=1).requires_grad_()
    opd_loss(student, teacher, torch.ones(2, dtype=torch.float64), 1.0).backward()
    assert teacher.grad is None


def test_dpo_closed_form() -> None:
    errors = [rand(6, seed=seed).abs() for seed in range(4)]
    mw, ml, rw, rl = (e.tolist() for e in errors)
    beta = 7.0
    expected = 0.0
    for a, b, c, d in zip(mw, ml, rw, rl, strict=True):
        logits = beta / 2 * ((c - d) - (a - b))
        expected += math.log1p(math.exp(-logits)) / 6
    assert dpo_loss(*errors, beta).item() == pytest.approx(expected, rel=1e-13)


def test_dpo_with_fixed_draws_asks_the_reference_once() -> None:
    class Counting(FakePolicy):
        asked = 0

        def __init__(self) -> None:
            super().__init__()
            self.memory: dict[tuple[int, int], Tensor] = {}

        def reference(self, x: Tensor, *rest: Any) -> Tensor:
            self.asked += len(x)
            return super().reference(x, *rest)

        recall = Policy.recall

    policy, objective = Counting(), load_objective("dpo", {"draws": 2})
    b = batch() | {"number": torch.tensor([7, 8, 9, 10])}
    losses = [objective.loss(b, policy, torch.Generator().manual_seed(seed))[0].item() for seed in range(12)]
    # Each of 4 pairs and 2 draws was met once, winner and loser.
    assert policy.asked == 4 * 2 * 2 and len(policy.memory) == 8
    assert len(set(losses)) > 1
    fresh = Counting()
    again = objective.loss(b, fresh, torch.Generator().manual_seed(11))[0].item()
    assert again == pytest.approx(losses[11], rel=1e-12)
    assert "number" in objective.required_keys and "number" not in load_objective("dpo").required_keys


def test_a_step_down_the_safeguarded_loss_never_raises_the_winners_error() -> None:
    wanted = rand(2, 5, *SHAPE, seed=1)
    # Losers that err as the winners do, only more: pushed away from them, the winner's error would rise.
    start = wanted + torch.stack([rand(5, *SHAPE, seed=2), 3 * rand(5, *SHAPE, seed=2)])

    def winners(margin: float | None) -> Tensor:
        """How the winners' errors change where winner and loser move together, as one network's do."""
        move = torch.zeros(5, *SHAPE, dtype=torch.float64, requires_grad=True)
        off = start + move - wanted
        mw, ml = off.square().flatten(2).mean(2)
        if margin is not None:
            assert torch.allclose(safeguarded(ml, *off, margin), ml, rtol=1e-12)
            ml = safeguarded(ml, *off, margin)
        (mw - ml).sum().backward()
        assert move.grad is not None
        after = (off[0] - 1e-3 * move.grad).square().flatten(1).mean(1)
        return (after - mw).detach()

    assert winners(None).min() > 0
    assert winners(0.0).max() < 1e-5
    assert winners(0.5).max() < 0
    plain, guarded = (DPO(safeguard=mu).loss(batch(), FakePolicy(), torch.Generator()) for mu in (None, 0.0))
    assert plain[0].item() == pytest.approx(guarded[0].item(), rel=1e-12)


def test_dpo_at_the_reference_is_log_2() -> None:
    errors = rand(3).abs()
    assert dpo_loss(errors, errors * 2, errors, errors * 2, 2000.0).item() == pytest.approx(math.log(2))


def test_nft_closed_form() -> None:
    plus, minus, clean = (rand(3, *SHAPE, seed=seed) for seed in range(3))
    advantage = torch.tensor([0.5, -4.0, 0.0], dtype=torch.float64)
    beta, clip = 0.5, 2.0
    expected = 0.0
    for p, m, x, a in zip(plus, minus, clean, advantage.tolist(), strict=True):
        r = 0.5 + 0.5 * min(max(a, -clip), clip) / clip
        terms = [((g - x) ** 2).mean().item() / (g - x).abs().mean().item() for g in (p, m)]
        expected += (r * terms[0] + (1 - r) * terms[1]) * clip / beta / 3
    assert nft_loss(plus, minus, clean, advantage, beta, clip).item() == pytest.approx(expected, rel=1e-13)


def test_nft_moves_towards_good_images_and_away_from_bad_ones() -> None:
    clean, old = rand(1, *SHAPE, seed=1), rand(1, *SHAPE, seed=2)

    def slope(advantage: float) -> float:
        step = torch.zeros((), dtype=torch.float64, requires_grad=True)
        student = old + step * (clean - old)
        plus, minus = student, 2 * old - student
        nft_loss(plus, minus, clean, torch.tensor([advantage], dtype=torch.float64), 1.0, 1.0).backward()
        assert step.grad is not None
        return step.grad.item()

    assert slope(1.0) < 0 < slope(-1.0)
    assert slope(0.0) == pytest.approx(0.0, abs=1e-12)


def test_group_advantage_ignores_padding_and_flat_groups() -> None:
    b = batch()
    advantage = group_advantage(b["reward"], b["rewards"])
    assert advantage[1].item() == pytest.approx((0.1 - 0.25) / 0.15, rel=1e-6)
    assert advantage[3].item() == 0


def test_nft_offline_has_a_fixed_point_and_its_average_only_where_images_are_sampled_again() -> None:
    class Where(FakePolicy):
        asked: list[str] = []  # noqa: RUF012

        def reference(self, *how: Any) -> Tensor:
            self.asked.append("reference")
            return super().reference(*how)

        def slow(self, *how: Any) -> Tensor:
            self.asked.append("slow")
            return super().slow(*how)

    fixed, moving = (
        load_objective("nft", {"kl_weight": 0, "hold_fraction": 0, "old": old})
        for old in ("reference", "slow")
    )
    for objective in (fixed, moving):
        objective.loss(batch(), Where(), torch.Generator().manual_seed(0))
    assert Where.asked == ["reference", "slow"]
    assert fixed.slow_decay(10) is None and moving.slow_decay(10) == pytest.approx(0.01)


def test_rwr_weights_are_a_softmax_that_averages_to_one() -> None:
    rewards = torch.tensor([[0.5, 0.2, -0.1, math.nan]], dtype=torch.float64).repeat(3, 1)
    weights = reward_weights(rewards[0, :3], rewards, 0.3)
    exponentials = [math.exp(r / 0.3) for r in (0.5, 0.2, -0.1)]
    assert weights.tolist() == pytest.approx([3 * e / sum(exponentials) for e in exponentials])
    assert weights.mean().item() == pytest.approx(1)


def test_nft_gradient_by_finite_differences() -> None:
    # The widths are constants to the gradient, so they are held fixed while differencing.
    clean, advantage = rand(2, *SHAPE, seed=9), torch.tensor([0.7, -0.4], dtype=torch.float64)
    guesses = [rand(2, *SHAPE, seed=seed).requires_grad_() for seed in (1, 2)]
    nft_loss(guesses[0], guesses[1], clean, advantage, 0.5, 2.0).backward()
    widths = [(g - clean).detach().abs().flatten(1).mean(1) for g in guesses]
    r = 0.5 + 0.5 * advantage / 2.0

    def frozen(moved: list[Tensor]) -> float:
        terms = [((g - clean) ** 2).flatten(1).mean(1) / w for g, w in zip(moved, widths, strict=True)]
        return ((r * terms[0] + (1 - r) * terms[1]) * 2.0 / 0.5).mean().item()

    for which in (0, 1):
        direction = rand(2, *SHAPE, seed=20 + which)
        ends = []
        for sign in (1, -1):
            moved = [g.detach().clone() for g in guesses]
            moved[which] += sign * 1e-6 * direction
            ends.append(frozen(moved))
        gradient = guesses[which].grad
        assert gradient is not None
        assert (ends[0] - ends[1]) / 2e-6 == pytest.approx((gradient * direction).sum().item(), rel=1e-6)


@pytest.mark.parametrize("name", sorted(set(OBJECTIVES) - {"nft", "direct", "flow-grpo"}))
def test_gradient_by_finite_differences(name: str) -> None:
    policy, objective = FakePolicy(), load_objective(name)

    def loss() -> Tensor:
        return objective.loss(batch(), policy, torch.Generator().manual_seed(3))[0]

    loss().backward()
    assert policy.weight.grad is not None
    analytic = policy.weight.grad.clone()
    for place in range(2):
        numeric = 0.0
        for sign in (1, -1):
            with torch.no_grad():
                policy.weight[place] += sign * 1e-6
                numeric += sign * loss().item() / 2e-6
                policy.weight[place] -= sign * 1e-6
        assert numeric == pytest.approx(analytic[place].item(), rel=2e-5, abs=1e-7)
    assert analytic.abs().min() > 0


@pytest.mark.parametrize("name", sorted(set(OBJECTIVES) - {"direct", "flow-grpo"}))
def test_same_generator_same_loss(name: str) -> None:
    values = {
        load_objective(name).loss(batch(), FakePolicy(), torch.Generator().manual_seed(5))[0].item()
        for _ in range(2)
    }
    assert len(values) == 1


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_dpo_serves_epsilon_and_v_models(prediction: str) -> None:
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler(prediction_type=prediction)
    policy = FakePolicy(Diffusion(scheduler))
    objective = load_objective("dpo", {"beta": 50.0})
    b = batch()
    loss, _ = objective.loss(b, policy, torch.Generator().manual_seed(1))
    # By hand, with diffusers' own scheduler and the same draws.
    generator = torch.Generator().manual_seed(1)
    t = torch.randint(1000, (4,), generator=generator)
    noise = torch.randn(b["winner"].shape, generator=generator).double()
    errors = {}
    for who, speak in (("model", policy.student), ("reference", policy.reference)):
        for which in ("winner", "loser"):
            x = scheduler.add_noise(b[which], noise, t)
            wanted = noise if prediction == "epsilon" else scheduler.get_velocity(b[which], noise, t)
            out = speak(x, t, b["prompt"], b["target"])
            errors[who, which] = ((out - wanted) ** 2).flatten(1).mean(1)
    logits = (errors["reference", "winner"] - errors["reference", "loser"]) - (
        errors["model", "winner"] - errors["model", "loser"]
    )
    assert loss.item() == pytest.approx(
        -torch.nn.functional.logsigmoid(25.0 * logits).mean().item(), rel=1e-9
    )


def test_contrast_closed_form_and_who_is_wrong() -> None:
    far = torch.tensor([[1.0, 1.0], [1.2, 1.0], [-1.0, math.nan], [math.nan, 1.0]], dtype=torch.float64)
    wrong, differs = other(far, 1.0)
    assert differs.tolist() == [True, True, True, False]
    assert wrong[:2].nan_to_num(9).tolist() == [[-1.0, 9.0]] * 2 and wrong[2].tolist() == [1.0, 1.0]
    policy, b, objective = (
        FakePolicy(),
        batch(),
        load_objective("contrast", {"beta": 7.0, "hold_fraction": 0.0}),
    )
    loss, metrics = objective.loss(b, policy, torch.Generator().manual_seed(1))
    x, t, noise = objective.draw_states(b, "winner", policy, torch.Generator().manual_seed(1))
    wanted = policy.process.regression_target(b["winner"], noise, t)
    wrong, differs = other(b["target"], 1.0)
    assert differs.all()
    plus, minus = (
        ((policy.student(x, t, b["prompt"], it) - wanted) ** 2).flatten(1).mean(1)
        for it in (b["target"], wrong)
    )
    expected = sum(
        math.log1p(math.exp(7.0 * (p - m))) for p, m in zip(plus.tolist(), minus.tolist(), strict=True)
    )
    assert loss.item() == pytest.approx(expected / 4 + plus.mean().item(), rel=1e-9)
    assert metrics["error"] == pytest.approx(plus.mean().item())


def test_npo_is_dpo_with_winner_and_loser_swapped_under_the_negative_prompt() -> None:
    policy, b, objective = FakePolicy(), batch(), load_objective("npo", {"beta": 7.0})
    loss, metrics = objective.loss(b, policy, torch.Generator().manual_seed(1))
    _, t, noise = objective.draw_states(b, "winner", policy, torch.Generator().manual_seed(1))
    null, errors = policy.null.expand(4), {}
    for who, speak in (("model", policy.student), ("reference", policy.reference)):
        for which in ("winner", "loser"):
            out = speak(policy.process.add_noise(b[which], noise, t), t, null, b["target"])
            off = out - policy.process.regression_target(b[which], noise, t)
            errors[who, which] = (off**2).flatten(1).mean(1)
    gained = {it: (errors["reference", it] - errors["model", it]).tolist() for it in ("winner", "loser")}
    expected = sum(
        math.log1p(math.exp(-3.5 * (lost - won)))
        for won, lost in zip(gained["winner"], gained["loser"], strict=True)
    )
    assert loss.item() == pytest.approx(expected / 4, rel=1e-9)
    assert metrics["hold"] == 0
    assert metrics["winner_error"] == pytest.approx(errors["model", "loser"].mean().item())


def test_flow_process_inverts_itself() -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    process = Flow(FlowMatchEulerDiscreteScheduler(shift=3.0))
    clean, noise = rand(4, *SHAPE), rand(4, *SHAPE, seed=1)
    t = process.draw(4, torch.Generator().manual_seed(0))
    assert ((t > 0) & (t < 1)).all()
    x = process.add_noise(clean, noise, t)
    assert torch.allclose(process.clean(x, process.regression_target(clean, noise, t), t), clean)
    times = process.schedule(5, 64)
    assert times[0] == 1 and times[-1] == 0 and len(times) == 6


def test_diffusion_step_reaches_the_clean_image_from_a_perfect_prediction() -> None:
    from diffusers import DDPMScheduler

    process = Diffusion(DDPMScheduler())
    clean, noise = rand(2, *SHAPE), rand(2, *SHAPE, seed=1)
    times = process.schedule(4, 0)
    x = process.add_noise(clean, noise, times[0].expand(2))
    for now, after in itertools.pairwise(times):
        x = process.step(x, noise, now, after)
    assert torch.allclose(x, clean, atol=1e-5)


def test_opd_mixes_logged_states_in_the_share_asked_for() -> None:
    policy = FakePolicy()
    objective = OPD(on_policy=0.5)
    generator = torch.Generator().manual_seed(0)
    for _ in range(40):
        objective.loss(batch(), policy, generator)
    assert 10 <= policy.rollouts <= 30
    assert "latents" in objective.required_keys
    assert "latents" not in OPD().required_keys


def test_hold_pulls_only_the_null_branch() -> None:
    policy, objective = FakePolicy(), OPD(hold_fraction=1.0)
    b = batch()
    b["advantage"] = torch.zeros(4, dtype=torch.float64)
    loss, metrics = objective.loss(b, policy, torch.Generator().manual_seed(0))
    assert loss.item() == pytest.approx(metrics["hold"])
    loss.backward()
    assert policy.weight.grad is not None
    assert policy.weight.grad[0] != 0 and policy.weight.grad[1] == 0


def test_no_target_is_not_a_number() -> None:
    assert no_target(3).isnan().all()


class NeedsLogProbabilities(Objective):
    """As a Flow-GRPO would declare itself."""

    @property
    def required_keys(self) -> frozenset[str]:
        return frozenset({"prompt", "latents", "sde_latents", "log_probs", "policy_version"})

    def loss(self, batch: Any, policy: Any, generator: torch.Generator) -> Any:
        raise NotImplementedError


def test_a_coupled_objective_is_refused_with_the_missing_keys() -> None:
    with pytest.raises(UserError, match=r"log_probs, policy_version, sde_latents.*coupled"):
        source_for(NeedsLogProbabilities().required_keys)


def test_registry_takes_dotted_paths_and_names_wrong_knobs() -> None:
    assert isinstance(load_objective("emoloop.rl.objectives.opd:OPD", {"a_max": 2}), OPD)
    with pytest.raises(UserError, match="did you mean 'opd'"):
        load_objective("odp")
    with pytest.raises(UserError, match=r"objective\.betta.*knobs of DPO: .*beta"):
        load_objective("dpo", {"betta": 1})
    with pytest.raises(UserError, match="no subclass"):
        load_objective("emoloop.domain:EmotionTarget")
