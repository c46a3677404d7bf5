"""The shipped models: they load with stock classes, read what they should, and say what they know."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from emoloop.agents.critic import Critic
from emoloop.domain import Critique, EmotionTarget
from emoloop.miniature import law, world
from emoloop.miniature.codec import PatchAutoencoder
from emoloop.miniature.judge import WEIGHTS, Guard, LawJudge, named
from emoloop.settings import GeneratorSettings, LVLMSettings
from emoloop.tools.images.base import ImageRequest
from emoloop.tools.images.load import load_generator
from emoloop.tools.lvlm.load import load_lvlm
from PIL import Image


def held_out(count: int, seed: int) -> tuple[list[world.Scene], list[np.ndarray]]:
    rng = np.random.default_rng(seed)
    scenes = [world.sample_scene(rng, world.FOLDS["test"]) for _ in range(count)]
    return scenes, [world.render(s) for s in scenes]


def test_weights_are_small() -> None:
    files = [f for f in WEIGHTS.rglob("*") if f.is_file()]
    assert sum(f.stat().st_size for f in files) < 40e6
    assert not [f for f in files if f.suffix in {".bin", ".pt", ".pkl"}]


def test_stock_pipeline_loads_the_folder() -> None:
    from diffusers import StableDiffusion3Pipeline

    pipeline = StableDiffusion3Pipeline.from_pretrained(
        WEIGHTS / "generator",
        torch_dtype=torch.float32,
        text_encoder_3=None,
        tokenizer_3=None,
        image_encoder=None,
        feature_extractor=None,
    )
    assert isinstance(pipeline.vae, PatchAutoencoder)
    picture = pipeline(
        "a dog by the sea", height=96, width=96, num_inference_steps=2, guidance_scale=3.0, max_sequence_length=0,
        generator=torch.Generator().manual_seed(0),
    ).images[0]  # fmt: skip
    assert picture.size == (96, 96)


def test_codec_is_faithful() -> None:
    codec = PatchAutoencoder.from_pretrained(WEIGHTS / "generator" / "vae")
    _, pixels = held_out(32, 3)
    x = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float() / 127.5 - 1
    z = codec.encode(x).latent_dist.mode()
    assert z.shape == (32, 16, 24, 24)
    assert 0.5 < z.std() < 2
    error = (codec.decode(z).sample.clamp(-1, 1) - x).square().mean()
    assert 10 * torch.log10(4 / error) > 30


@pytest.mark.parametrize("reader", [LawJudge, Guard])
def test_readers_read_held_out_renders(reader: type[LawJudge] | type[Guard]) -> None:
    scenes, pixels = held_out(64, 4)
    readings = reader().read([Image.fromarray(p) for p in pixels])
    truth = np.array([law.affect(s, p) for s, p in zip(scenes, pixels, strict=True)])
    found = np.array([(r.valence, r.arousal) for r in readings])
    assert (np.abs(found - truth).mean(0) < 0.25).all()
    assert np.mean([r.subject == s.subject for r, s in zip(readings, scenes, strict=True)]) > 0.95


async def test_generator_draws_what_it_is_told() -> None:
    generator = load_generator("miniature")
    judge = LawJudge()
    prompts = [
        "a dog by the sea with a sun",
        "a robot in the city with a skull",
        "a cat in a graveyard nothing else",
    ]
    made = await generator.generate([ImageRequest(prompt=p, seed=s) for p in prompts for s in range(4)])
    readings = judge.read([m.image for m in made])
    subjects = [world.parse(p).subject for p in prompts for _ in range(4)]
    assert np.mean([r.subject == s for r, s in zip(readings, subjects, strict=True)]) >= 0.75
    unknown = generator.unknown_words("an astronaut by the sea")
    assert [w.word for w in unknown] == ["astronaut"]
    await generator.aclose()


async def test_critic_reads_held_out_renders() -> None:
    lvlm = load_lvlm(LVLMSettings())
    critic = Critic(lvlm, prompt="critic-compact")
    scenes, pixels = held_out(24, 5)
    target = EmotionTarget(valence=1.0, arousal=0.0)
    found = [
        await critic.critique(Image.fromarray(p), f"a {world.SUBJECTS[s.subject].words[0]}", target)
        for s, p in zip(scenes, pixels, strict=True)
    ]
    assert all(isinstance(c, Critique) for c in found)
    truth = np.array([law.affect(s, p) for s, p in zip(scenes, pixels, strict=True)])
    read = np.array([(c.valence, c.arousal) for c in found if isinstance(c, Critique)])
    assert (np.median(np.abs(read - truth), axis=0) < 0.3).all()
    assert min(np.corrcoef(read[:, i], truth[:, i])[0, 1] for i in (0, 1)) > 0.95


@pytest.mark.parametrize(
    ("model", "steps", "batch"),
    [
        pytest.param("generator", 24, 8, marks=pytest.mark.training),
        pytest.param("lvlm-vision", 60, 12, marks=pytest.mark.training),
        pytest.param("lvlm", 24, 8, marks=pytest.mark.training),
        pytest.param("lvlm-rewriter", 24, 8, marks=pytest.mark.training),
        ("judge", 30, 16),
    ],
)
def test_recipes_start_from_nothing_and_learn(
    tmp_path, model: str, steps: int, batch: int, monkeypatch
) -> None:
    from emoloop.miniature.train.__main__ import main

    sizes = ["--steps", str(steps), "--batch", str(batch)]
    arguments = ["train", model, "--out", str(tmp_path), *sizes, "--device", "cpu"]
    monkeypatch.setattr("sys.argv", arguments)
    # The whole corpus takes longer than these steps.
    monkeypatch.setattr("emoloop.miniature.train.lvlm._CORPUS", 300)
    main()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["loss"] < 0.9 * lines[0]["loss"]
    assert (tmp_path / "model").is_dir()


@pytest.mark.training
@pytest.mark.parametrize("model", ["lvlm-vision", "lvlm"])
def test_the_lvlm_goes_on_with_painted_pictures(tmp_path, model: str, monkeypatch) -> None:
    from emoloop.miniature.critic_data import build_critic_data
    from emoloop.miniature.train.__main__ import main
    from emoloop.miniature.train.lvlm import SHIPPED

    build_critic_data(tmp_path / "pictures", count=32, held_out=16, processes=1)
    given = ["--init", str(SHIPPED), "--pictures", str(tmp_path / "pictures"), "--out", str(tmp_path / "out")]
    sizes = ["--steps", "11", "--batch", "8", "--lr", "3e-4", "--device", "cpu"]
    monkeypatch.setattr("sys.argv", ["train", model, *given, *sizes])
    main()
    first, last = (json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines())
    assert max(first["critic"], last["critic"]) < 1, "it knows how to answer, and does not forget it"
    same = [(at / "tokenizer.json").read_text() for at in (SHIPPED, tmp_path / "out" / "model")]
    assert same[0] == same[1]


def test_the_reward_for_what_is_named_has_a_gradient_towards_it() -> None:
    scenes = [it for it in held_out(24, 5)[0] if it.companions]
    pictures = torch.from_numpy(np.stack([world.render(it) for it in scenes])).permute(0, 3, 1, 2) / 255
    there = [f"a {it.subject} with a {it.companions[0].name}" for it in scenes]
    shown = {it.name for scene in scenes for it in scene.companions}
    absent = next(name for name in world.COMPANIONS if name not in shown)
    missing = [f"a {it.subject} with a {absent}" for it in scenes]
    nothing = torch.full((len(scenes), 2), torch.nan)
    assert named(pictures, there, nothing).mean() > -0.3
    before = named(pictures.requires_grad_(), missing, nothing)
    assert before.max() < -1
    (gradient,) = torch.autograd.grad(before.sum(), pictures)
    after = named((pictures + 0.02 * gradient.sign()).clamp(0, 1).detach(), missing, nothing)
    assert (after > before).all()
    assert named(pictures, ["nothing of this world"] * len(scenes), nothing).eq(0).all()


def test_a_picture_repainted_from_pure_noise_is_the_pipelines_own() -> None:
    from emoloop.miniature.critic_data import repaint

    generator: Any = load_generator("miniature")
    prompts = ["a dog by the sea", "an owl in the forest with a bat"]
    made = repaint(generator, [Image.new("RGB", (96, 96), "gray")] * 2, prompts, t=1.0, seed=3)
    latents = torch.randn((2, *generator.family.latent_shape(96, 96)), generator=torch.manual_seed(3))
    sizes = {"height": 96, "width": 96, "max_sequence_length": 0}
    steps = {"num_inference_steps": generator.steps, "guidance_scale": generator.guidance}
    theirs = generator.pipe(prompts, latents=latents, **sizes, **steps).images
    for ours, other in zip(made, theirs, strict=True):
        assert np.abs(np.asarray(ours).astype(int) - np.asarray(other)).max() <= 1


async def test_the_shipped_adapter_hears_the_target() -> None:
    """One pass of a subject that the collected runs never had; read by the guard, which gave no reward."""
    corners = [(1.8, -1.0), (1.8, 1.5), (-1.5, 1.5), (-1.5, -1.0)]
    targets = [EmotionTarget(valence=valence, arousal=arousal) for valence, arousal in corners]

    async def error(adapter: str | None) -> float:
        settings = GeneratorSettings(model="miniature", adapter=adapter)
        generator = load_generator(settings.model, settings)
        asked = [ImageRequest("a fox by the sea", seed, target=t) for t in targets for seed in range(2)]
        made = await generator.generate(asked)
        await generator.aclose()
        seen = Guard().read([image.image for image in made])
        off = [
            abs(read.valence - (request.target.valence or 0))
            + abs(read.arousal - (request.target.arousal or 0))
            for read, request in zip(seen, asked, strict=True)
            if request.target
        ]
        return float(np.mean(off))

    assert await error(str(WEIGHTS.parent / "adapters" / "opd")) < await error(None) - 0.8
