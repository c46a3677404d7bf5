"""Direct reward: its gradient by finite differences, the critic's as well, and a training with the real critic."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import rl_log
import tiny
import tiny_lvlm
import torch
from emoloop.agents.prompt import load_prompt
from emoloop.domain import UserError
from emoloop.rl.config import load_config
from emoloop.rl.differentiable import CriticReward
from emoloop.rl.distill import distill
from emoloop.rl.objectives import load_objective
from emoloop.rl.objectives.direct import Direct
from emoloop.rl.policy import Policy
from emoloop.tools import presets
from emoloop.tools.diffusion.adapter import load_artifact
from emoloop.tools.diffusion.conditioners import EmotionConditioner
from emoloop.tools.diffusion.families import family_of
from emoloop.tools.images.pipelines import load_pipeline
from emoloop.tools.lvlm.chat import image_url
from emoloop.tools.lvlm.embedded import EmbeddedLVLM
from emoloop.tools.lvlm.gradient import GradientReader
from emoloop.tools.lvlm.scores import read_scores, score_only
from langchain_core.messages import HumanMessage
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

TEXT = ["a red house", "a dog"]


def redness(pictures: Tensor, prompts: Any, targets: Tensor) -> Tensor:
    """A reward with a gradient, by dotted path."""
    assert len(prompts) == len(pictures) == len(targets)
    return 10 * ((pictures[:, 0] - pictures[:, 2]).square() + pictures[:, 1]).mean((1, 2))


def direct(**knobs: Any) -> Any:
    return load_objective("direct", {"reward": f"{__name__}:redness", **knobs})


@pytest.fixture(scope="module")
def policy() -> Policy:
    """Stirred, so that nothing is zero; float64, for finite differences."""
    network = family_of(tiny.build("sd3").to(torch.float64), tiny.DEFAULTS["sd3"]["call"])
    tokens = EmotionConditioner.for_embeds(network.encode("a dog"))
    made = Policy(network, tokens, rank=4, alpha=8, steps=3, guidance=3.0, size=(32, 32))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in made.parameters().items():
            parameter.data = parameter.double()
            if name.startswith("denoiser."):
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    tokens.double()
    return made


def batch(policy: Policy) -> dict[str, Any]:
    told = policy.network.encode("a red house")
    shape = (2, *policy.latent_shape)
    return {
        "prompt": told.expand(2),
        "text": TEXT,
        "target": torch.tensor([[2.0, -1.0], [math.nan, 1.5]], dtype=torch.float64),
        "winner": torch.randn(shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64),
    }


def lora(policy: Policy) -> list[Tensor]:
    return [parameter for name, parameter in policy.parameters().items() if name.startswith("denoiser.")]


def slopes(policy: Policy, objective: Any) -> tuple[float, float]:
    """The loss's slope along its own gradient: by the gradient, and by central differences."""

    def loss() -> Tensor:
        return objective.loss(batch(policy), policy, torch.Generator().manual_seed(3))[0]

    parameters = lora(policy)
    gradient = torch.autograd.grad(loss(), parameters)
    norm = torch.stack([it.square().sum() for it in gradient]).sum().sqrt()
    ends = []
    for sign in (1, -2, 1):
        with torch.no_grad():
            for parameter, way in zip(parameters, gradient, strict=True):
                parameter.add_(sign * 1e-3 * way / norm)
            ends.append(loss().item())
    return norm.item(), (ends[0] - ends[1]) / 2e-3


@pytest.mark.parametrize(
    "knobs",
    [
        {"way": "draft", "trained": 3, "rollout_steps": 3},
        {"way": "draft", "trained": 3, "rollout_steps": 3, "guidance": 2.0, "crop": 0.8, "shift": 2.0},
        {"way": "direct_align", "rollout_steps": 4, "pixel_noise": 0.05, "latent_noise": 0.2},
        # One step alone has no chain: what DRTune leaves out is nothing.
        {"way": "drtune", "trained": 1, "rollout_steps": 1},
    ],
)
def test_the_gradient_by_finite_differences(knobs: dict[str, Any], policy: Policy) -> None:
    analytic, numeric = slopes(policy, direct(**knobs))
    # Pictures are of single precision.
    assert analytic > 1e-2 and numeric == pytest.approx(analytic, rel=5e-3)


def test_drtune_adds_each_steps_own_part_and_no_chain(policy: Policy) -> None:
    told, target = batch(policy)["prompt"], batch(policy)["target"]
    noise = torch.randn(2, *policy.latent_shape, generator=torch.Generator().manual_seed(1)).double()
    clean, states = policy.path(noise, told, target, {0, 2}, detach=True, steps=4, guidance=1.0)
    assert [float(t[0]) for _, t, _ in states] == [float(policy.process.schedule(4, 64)[it]) for it in (0, 2)]
    way = torch.randn(clean.shape, generator=torch.Generator().manual_seed(2)).double()
    ours = torch.autograd.grad((clean * way).sum(), lora(policy))
    # By hand: x_0 = x_1 + Σ (t' - t) v, and only the two steps' velocities move.
    lengths = [float(b - a) for a, b in pairwise(policy.process.schedule(4, 64))]
    with policy.voice("student"):
        parts = [
            lengths[place] * policy.student(x, t, told, target)
            for place, (x, t, _) in zip((0, 2), states, strict=True)
        ]
    byhand = torch.autograd.grad((sum(parts) * way).sum(), lora(policy))
    for one, other in zip(ours, byhand, strict=True):
        assert torch.allclose(one, other, rtol=1e-6, atol=1e-9)
    chained, _ = policy.path(noise, told, target, {0, 2}, detach=False, steps=4, guidance=1.0)
    assert torch.equal(chained, clean)
    other = torch.autograd.grad((chained * way).sum(), lora(policy))
    assert not all(torch.allclose(one, two, rtol=1e-3) for one, two in zip(ours, other, strict=True))


def test_direct_align_gives_a_logged_picture_back_where_the_student_knows_the_noise(policy: Policy) -> None:
    class Perfect:
        process, network, latent_shape, steps = policy.process, policy.network, policy.latent_shape, 5

        def student(self, x: Tensor, t: Tensor, *_: Any) -> Tensor:
            # The velocity towards the only picture there is.
            return (x - clean) / t[:, None, None, None]

    at = batch(policy)
    clean = at["winner"]
    for seed in range(4):
        found, states = direct(way="direct_align")._restored(
            at, Perfect(), torch.Generator().manual_seed(seed)
        )
        assert torch.allclose(found, clean, atol=1e-6) and len(states) == 1


def test_the_kl_counts_what_the_lora_says_and_no_more(policy: Policy) -> None:
    at = batch(policy)
    _, stirred = direct().loss(at, policy, torch.Generator().manual_seed(0))
    assert stirred["kl"] > 1e-6
    untrained = Policy(
        family_of(tiny.build("sd3"), tiny.DEFAULTS["sd3"]["call"]),
        EmotionConditioner.for_embeds(policy.null.to(torch.float32)), rank=4, alpha=8, steps=3, guidance=3.0,
        size=(32, 32),
    )  # fmt: skip
    with torch.no_grad():
        untrained.tokens.up.weight.add_(0.3)
    plain = {key: it.float() if isinstance(it, Tensor) else it for key, it in at.items()}
    plain["prompt"] = at["prompt"].to(torch.float32)
    assert direct().loss(plain, untrained, torch.Generator().manual_seed(0))[1]["kl"] == 0


def test_pictures_are_moved_before_the_critic_sees_them() -> None:
    pictures = torch.rand(3, 3, 32, 32)
    still = Direct(reward="m:r")._moved(pictures, torch.Generator().manual_seed(0))
    assert torch.equal(still, pictures)
    moved = Direct(reward="m:r", shift=4.0)._moved(pictures, torch.Generator().manual_seed(0))
    assert not torch.allclose(moved, pictures, atol=0.1)
    assert moved.min() >= 0 and moved.max() <= 1
    with pytest.raises(UserError, match=r"objective\.critics"):
        assert load_objective("direct").required_keys


@pytest.fixture(scope="module")
def lvlm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_lvlm.build(tmp_path_factory.mktemp("lvlm") / "model")


def chat(text: str, image: Image.Image) -> list[Any]:
    picture = {"type": "image_url", "image_url": {"url": image_url(image)}}
    return [HumanMessage([{"type": "text", "text": text}, picture, {"type": "text", "text": "score:"}])]


def noise(n: int, size: int = 96) -> Tensor:
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def images(pictures: Tensor) -> list[Image.Image]:
    return [Image.fromarray((it.permute(1, 2, 0) * 255).round().byte().numpy()) for it in pictures]


def test_the_readers_numbers_are_those_of_score_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the shipped critic, which keeps to the format; prompts of different lengths, so that one is padded."""
    monkeypatch.setattr("emoloop.tools.lvlm.scores.TOP", 1000)
    model = EmbeddedLVLM(model=str(presets.resolve("miniature", "lvlm")))
    pictures = (noise(2).float() * 255).round() / 255
    prompt, shown = load_prompt("score-compact"), images(pictures)
    asked = [
        prompt.messages((image_url(image),), prompt=text, target="valence +1.0 arousal -1.0")
        for text, image in zip(("a dog", "a red house by the sea with a gift"), shown, strict=True)
    ]
    found = GradientReader(model)(pictures, asked)
    for row, answer in zip(found.tolist(), score_only(model).batch(asked), strict=True):
        said = read_scores(answer)
        assert row == pytest.approx([said[axis].expected for axis in ("valence", "arousal")], abs=1e-3)


def test_the_critics_gradient_by_finite_differences(lvlm: Path) -> None:
    reader = GradientReader(EmbeddedLVLM(model=str(lvlm), dtype="float64"))
    pictures = noise(2).requires_grad_()
    asked = [chat(text, image) for text, image in zip(TEXT, images(pictures.detach()), strict=True)]
    weights = torch.tensor([[1.0, -0.5], [0.3, 2.0]])
    (gradient,) = torch.autograd.grad((reader(pictures, asked) * weights).sum(), pictures)
    way = gradient / gradient.norm()
    ends = [float((reader(pictures.detach() + sign * 1e-4 * way, asked) * weights).sum()) for sign in (1, -1)]
    assert gradient.norm() > 0
    assert (ends[0] - ends[1]) / 2e-4 == pytest.approx(gradient.norm().item(), rel=1e-3)


def test_a_size_that_the_processor_would_change_is_refused(lvlm: Path) -> None:
    reader = GradientReader(EmbeddedLVLM(model=str(lvlm)))
    pictures = noise(1, 120).float()
    with pytest.raises(UserError, match=r"resamples pictures of 120 × 120.*objective\.size"):
        reader(pictures, [chat("a dog", images(pictures)[0])])


def test_the_critics_reward_falls_with_the_distance_and_ignores_what_is_not_wanted() -> None:
    class Fixed(CriticReward):
        def __init__(self) -> None: ...

        def read(self, pictures: Tensor, prompts: Any, targets: Tensor) -> Tensor:
            return torch.tensor([[1.0, -1.0], [1.0, -1.0], [1.0, -1.0]])

    wanted = torch.tensor([[1.0, -1.0], [3.0, -1.0], [3.0, math.nan]])
    assert Fixed()(torch.zeros(3, 3, 2, 2), ["a"] * 3, wanted).tolist() == pytest.approx([0.0, -1.75, -1.75])


QUICK = (
    "train.steps=2", "train.batch_size=2", "train.checkpoint_every=1", "train.tensorboard=false",
    "train.device=cpu", "guard.every=0", "policy.rank=4", "policy.alpha=4", "data.held_out=0.3", "data.phrases=2",
    "train.text_steps=3", "objective.rollout_steps=2", "objective.trained=1",
)  # fmt: skip


@pytest.mark.parametrize("way", ["drtune", "direct_align"])
def test_a_distillation_by_direct_reward(way: str, tmp_path: Path) -> None:
    folder = tiny.save("sd3", tmp_path / "model")
    settings = rl_log.write_log(
        tmp_path / "home",
        10,
        model=str(folder),
        revision=None,
        reading=lambda r, i: (0.4 * r + 0.1 * i, -0.3 * r),
    )
    reward = f"objective.reward={__name__}:redness"
    config = load_config("direct", sets=[*QUICK, reward, f"objective.way={way}", "train.emotion_lr=0"])
    result = distill(settings, config, tmp_path / "out")
    assert result.outcome.reason == "finished"
    record = json.loads((tmp_path / "out/training.json").read_text())
    assert f"{__name__}:redness" in record["critics"]
    assert record["source"] == ("bests" if way == "direct_align" else "phrases")
    load_artifact(load_pipeline(folder, torch.float32), tmp_path / "out", call=tiny.DEFAULTS["sd3"]["call"])

    previous = [f"policy.previous={tmp_path / 'out'}", "train.text_steps=0"]
    config = load_config("direct", sets=[*QUICK, reward, f"objective.way={way}", *previous])
    if way == "direct_align":
        with pytest.raises(UserError, match="made without an adapter"):
            distill(settings, config, tmp_path / "two")
    else:
        assert distill(settings, config, tmp_path / "two").outcome.reason == "finished"


@pytest.mark.training
def test_two_steps_of_the_real_thing(tmp_path: Path) -> None:
    """The miniature's generator, its critic's score and full critique, every guard against hacking."""
    settings = rl_log.write_log(
        tmp_path / "home", 10, model="miniature", revision=None,
        reading=lambda r, i: (0.4 * r + 0.1 * i, -0.3 * r),
    )  # fmt: skip
    config = load_config("direct", preset="miniature", sets=[*QUICK, "train.text_steps=20"])
    result = distill(settings, config, tmp_path / "out")
    lines = [json.loads(it) for it in (tmp_path / "out/training/metrics.jsonl").read_text().splitlines()]
    rewards = [line["reward"] for line in lines if "reward" in line]
    assert len(rewards) == 2 and all(-12 <= it < 0 for it in rewards)
    assert result.outcome.steps == 2
    before = load_file(tmp_path / "out/pytorch_lora_weights.safetensors")
    assert any(it.abs().max() > 0 for name, it in before.items() if "lora_B" in name)
