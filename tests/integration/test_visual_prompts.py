"""Visual prompts on tiny pipelines of every class: start at the base, leave no trace, guide by their own scale."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import emoloop
import numpy as np
import pytest
import rl_log
import tiny
import torch
import visual
from emoloop.domain import Emotion, EmotionTarget, UserError
from emoloop.rl.config import load_config
from emoloop.rl.distill import distill
from emoloop.rl.objectives import load_objective
from emoloop.rl.policy import PREVIOUS, Policy
from emoloop.settings import GeneratorSettings
from emoloop.tools.diffusion.adapter import LORA_FILE, VISUAL_FILE, load_artifact, save_artifact
from emoloop.tools.diffusion.conditioners import EmotionConditioner
from emoloop.tools.diffusion.families import Conditioning, Family, family_of
from emoloop.tools.diffusion.visual import VisualBridge, VisualConditioner
from emoloop.tools.images.base import ImageRequest
from emoloop.tools.images.diffusers import DiffusersGenerator
from emoloop.tools.images.pipelines import open_model
from peft import LoraConfig

GLAD, TENSE = EmotionTarget(valence=2.2, arousal=2.0), EmotionTarget(category=Emotion.SADNESS)
WANTED = {"target": torch.tensor([[2.2, 2.0]])}


def family(name: str) -> Family:
    return family_of(tiny.build(name), tiny.DEFAULTS[name]["call"])


def state(it: Family) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(2, *it.latent_shape(32, 32), generator=torch.Generator().manual_seed(1))
    return x, it.process().draw(2, torch.Generator().manual_seed(2))


def artifact(name: str, folder: Path, tokens: int = 0, seed: int = 1) -> Path:
    pipe = tiny.build(name)
    network = family_of(pipe, tiny.DEFAULTS[name]["call"])
    module = visual.stirred(network)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network.module.add_adapter(
            LoraConfig(r=4, lora_alpha=8, target_modules=["to_q", "to_v"], init_lora_weights=False)
        )
        emotion = EmotionConditioner.for_embeds(network.encode(""), tokens=tokens)
        for parameter in emotion.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    return save_artifact(folder, pipe, emotion_tokens=emotion, visual_prompts=module, call=network.call)


def draw(
    name: str, target: EmotionTarget | None = GLAD, call: dict | None = None, **settings: Any
) -> np.ndarray:
    defaults = tiny.DEFAULTS[name] | {"call": tiny.DEFAULTS[name]["call"] | (call or {})}
    source = DiffusersGenerator(
        tiny.build(name), GeneratorSettings(micro_batch=1, **settings), defaults=defaults
    )
    made = source._run([ImageRequest("a dog by the sea", 7, target)])[0]
    assert not isinstance(made, Exception), made
    return np.asarray(made.image).astype(int)


def stock(pipe: Any, name: str, **more: Any) -> np.ndarray:
    how = {"num_inference_steps": 2, "guidance_scale": 3.0, "height": tiny.SIZE, "width": tiny.SIZE}
    noise = torch.Generator("cpu").manual_seed(7)
    how |= tiny.DEFAULTS[name]["call"] | more
    return np.asarray(pipe("a dog by the sea", generator=noise, **how).images[0]).astype(int)


@pytest.mark.parametrize("name", tiny.NAMES)
def test_an_untrained_module_is_the_base_to_the_bit_and_gets_a_gradient(name: str) -> None:
    it = family(name)
    x, t = state(it)
    told = it.encode("a dog").expand(2)
    base = it.denoise(it.module, x, t, told, 3.0)
    module = VisualConditioner.of_bank(visual.bank(it), it, k=2, width=8)
    bridge = VisualBridge(it, module)
    assert torch.equal(it.denoise(it.module, x, t, told, 3.0), base)
    seen = module(told, {"target": torch.tensor([[2.2, 2.0], [-1.8, -1.4]])})
    out = it.denoise(it.module, x, t, seen, 3.0)
    assert torch.equal(out, base)
    out.square().mean().backward()
    assert all(layer.out.weight.grad.abs().sum() > 0 for layer in module.layers)
    bridge.remove()


@pytest.mark.parametrize("name", tiny.NAMES)
def test_silent_rows_and_strength_zero_are_the_base_and_removal_leaves_nothing(name: str) -> None:
    it = family(name)
    x, t = state(it)
    told = it.encode("a dog").expand(2)
    before = {key: id(value) for key, value in it.module.attn_processors.items()}
    hooks = len(it.module._forward_pre_hooks), len(it.module._forward_hooks)
    parameters = [key for key, _ in it.module.named_parameters()]
    with torch.no_grad():
        base = it.denoise(it.module, x, t, told, 3.0)
        module = visual.stirred(it)
        bridge = VisualBridge(it, module)
        assert module(told, WANTED, 0.0) is told
        mixed = module(told, {"target": torch.tensor([[2.2, 2.0], [torch.nan, torch.nan]])})
        out = it.denoise(it.module, x, t, mixed, 3.0)
        assert not torch.allclose(out[0], base[0], atol=1e-3)
        assert torch.equal(out[1], base[1])
        assert torch.equal(it.denoise(it.module, x, t, module.null(told), 3.0), base)
        # Small strengths stay near the base, and more is further from it.
        far = [(it.denoise(it.module, x[:1], t[:1], module(told[[0]], WANTED, s), 3.0) - base[:1]).norm()
               for s in (0.01, 0.1, 1.0)]  # fmt: skip
        assert far[0] < far[1] < far[2] and far[0] < 0.05 * far[2]
        assert [key for key, _ in it.module.named_parameters()] == parameters
        bridge.remove()
        assert torch.equal(it.denoise(it.module, x, t, told, 3.0), base)
    assert {key: id(value) for key, value in it.module.attn_processors.items()} == before
    assert (len(it.module._forward_pre_hooks), len(it.module._forward_hooks)) == hooks


def test_the_attention_is_the_formula() -> None:
    it = family("sd15")
    module = visual.stirred(it)
    layer, attention = module.layers[0], next(m for n, m in it.module.named_modules() if n.endswith("attn2"))
    hidden = torch.randn(1, 5, attention.query_dim, generator=torch.Generator().manual_seed(0))
    tokens = torch.randn(1, 2, 8, generator=torch.Generator().manual_seed(1))
    seen = layer(attention, hidden, torch.cat([tokens, torch.full((1, 2, 1), 0.5)], -1))
    heads = attention.heads
    query, key, value = (
        it.unflatten(-1, (heads, -1)).transpose(1, 2)
        for it in (attention.to_q(hidden), layer.to_k(tokens), layer.to_v(tokens))
    )
    weights = (query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5).softmax(-1)
    expected = 0.5 * (weights @ value).transpose(1, 2).flatten(2) @ layer.out.weight.T
    assert torch.allclose(seen, expected, atol=1e-6)


@pytest.mark.parametrize("name", tiny.NAMES)
def test_guidance_has_a_scale_of_its_own(name: str) -> None:
    """n + g (p₀ - n) + g r (p - p₀), with p₀ the text alone, n the negative branch, r the ratio of the two scales."""
    it = family(name)
    x, t = state(it)
    text, nothing = it.encode("a dog"), it.encode(None)
    module, g, r = visual.stirred(it), 4.0, 2.5
    bridge = VisualBridge(it, module)
    with torch.no_grad():
        both = Conditioning.cat([module.null(nothing), module(text, WANTED)])
        n, p = it.denoise(it.module, x[:1].repeat(2, 1, 1, 1), t[:1].repeat(2), both, 3.0).chunk(2)
        p0 = it.denoise(it.module, x[:1], t[:1], text, 3.0)
        bridge.guidance = r
        n_, p_ = it.denoise(it.module, x[:1].repeat(2, 1, 1, 1), t[:1].repeat(2), both, 3.0).chunk(2)
        guided = n_ + g * (p_ - n_)
        assert torch.allclose(guided, n + g * (p0 - n) + g * r * (p - p0), atol=1e-4)
        # 0 is the text alone.
        bridge.guidance = 0.0
        _, p_ = it.denoise(it.module, x[:1].repeat(2, 1, 1, 1), t[:1].repeat(2), both, 3.0).chunk(2)
        assert torch.allclose(p_, p0, atol=1e-5)


def test_retrieval_takes_the_emotions_nearest_entries() -> None:
    it = family("sd3")
    made = visual.bank(it)
    module = VisualConditioner.of_bank(made, it, k=2, width=8)
    text = it.encode("a dog")
    query = text.pooled[0].numpy()
    for target in (GLAD, TENSE, EmotionTarget(valence=-2.9, arousal=2.0)):
        wanted = torch.tensor([target.point])
        found = module.retrieve(text, wanted)[0].tolist()
        assert found == [entry for entry, _ in made.retrieve(query, target, 2)]
    # An emotion with one entry alone repeats it.
    few = replace(made, emotion=np.where(np.arange(len(made.emotion)) == 0, 0, np.maximum(made.emotion, 1)))
    module = VisualConditioner.of_bank(few, it, k=2, width=8)
    assert module.retrieve(text, torch.tensor([[2.0, 0.8]])).tolist() == [[0, 0]]


@pytest.mark.parametrize("name", tiny.NAMES)
def test_an_artifact_draws_the_same_in_a_run_and_in_a_stock_pipeline(name: str, tmp_path: Path) -> None:
    path = artifact(name, tmp_path / "a", tokens=2)
    base, glad = draw(name), draw(name, adapter=str(path))
    tense, none = draw(name, TENSE, adapter=str(path)), draw(name, None, adapter=str(path))
    assert len({it.tobytes() for it in (base, glad, tense, none)}) == 4
    assert np.array_equal(draw(name, adapter=str(path), adapter_scale=0), base)
    unseen = draw(name, adapter=str(path), visual_scale=0)
    assert not np.array_equal(unseen, glad)
    (tmp_path / "b").mkdir()
    for file in path.glob("*"):
        if file.name != VISUAL_FILE:
            (tmp_path / "b" / file.name).write_bytes(file.read_bytes())
    # At strength 0 the rest of the artifact is what it is without visual prompts.
    assert np.array_equal(draw(name, adapter=str(tmp_path / "b")), unseen)
    guided = draw(name, adapter=str(path), visual_guidance=2)
    assert not np.array_equal(guided, glad)

    pipe = tiny.build(name)
    plain, kind, attributes = stock(pipe, name), type(pipe), set(pipe.__dict__)
    processors = dict(family_of(pipe).module.attn_processors)
    with emoloop.apply(pipe, path, GLAD) as applied:
        assert np.array_equal(stock(pipe, name), glad)
        applied.target = None
        assert np.array_equal(stock(pipe, name), none)
        with pytest.raises(UserError, match="has an adapter with visual prompts already"):
            emoloop.apply(pipe, path, TENSE)
        assert np.array_equal(stock(pipe, name), none)
    with emoloop.apply(pipe, path, GLAD, visual_guidance=2):
        assert np.array_equal(stock(pipe, name), guided)
    with emoloop.apply(pipe, path, GLAD, visual_scale=0):
        assert np.array_equal(stock(pipe, name), unseen)
    assert np.array_equal(stock(pipe, name), plain)
    assert type(pipe) is kind and set(pipe.__dict__) == attributes
    assert family_of(pipe).module.attn_processors == processors


def test_the_negative_branch_may_get_the_wrong_emotions_visual_prompt(tmp_path: Path) -> None:
    for name, call in (("sd3", {}), ("flux", {"true_cfg_scale": 3.0})):
        path = artifact(name, tmp_path / name)
        plain, against = (
            draw(name, call=call, adapter=str(path), **more) for more in ({}, {"visual_negative": "anger"})
        )
        assert not np.array_equal(plain, against)
        pipe = tiny.build(name)
        anger = EmotionTarget(category=Emotion.ANGER)
        more = {"negative_prompt": "", **call} if call else {}
        with emoloop.apply(pipe, path, GLAD, visual_negative=anger):
            assert np.array_equal(stock(pipe, name, **more), against)


def test_the_record_says_how_visual_prompts_were_used(tmp_path: Path) -> None:
    path = artifact("sd3", tmp_path / "a")
    pipe = tiny.build("sd3")
    with emoloop.apply(pipe, path, GLAD) as plain:
        assert plain.adapter.id == plain.adapter.sha256
    with emoloop.apply(pipe, path, GLAD, scale=0.5, visual_guidance=2) as other:
        assert other.adapter.id == f"{plain.adapter.sha256}@0.5[visual guidance=2]"
    alone = load_artifact(tiny.build("sd3"), path / LORA_FILE, call={"max_sequence_length": 0})
    assert alone.visual_prompts is None and alone.id == alone.sha256 != plain.adapter.sha256


def test_what_does_not_fit_is_refused_and_leaves_the_pipeline_alone(tmp_path: Path) -> None:
    path = artifact("sd3", tmp_path / "a")
    it = family("sd15")
    visual.stirred(it).save(path / VISUAL_FILE)
    pipe = tiny.build("sd3")
    with pytest.raises(UserError, match="visual prompts are made for another model"):
        load_artifact(pipe, path, call={"max_sequence_length": 0})
    assert not getattr(pipe.transformer, "peft_config", {})
    (path / VISUAL_FILE).write_bytes((path / LORA_FILE).read_bytes())
    with pytest.raises(UserError, match="holds no visual prompts of version 1"):
        load_artifact(pipe, path, call={"max_sequence_length": 0})
    made = visual.bank(it)
    foreign = replace(made, head=made.head.model_copy(update={"text_encoder": "clip=other"}))
    with pytest.raises(UserError, match="emoloop bank build --text generator=MODEL"):
        VisualConditioner.of_bank(foreign, it)


def policy(name: str, pipe: Any = None, **how: Any) -> Policy:
    network = family_of(pipe or tiny.build(name), tiny.DEFAULTS[name]["call"])
    tokens = EmotionConditioner.for_embeds(network.encode("a dog"))
    settings: dict[str, Any] = {"rank": 4, "alpha": 8, "steps": 3, "guidance": 3.0, "size": (32, 32)}
    return Policy(network, tokens, **(settings | how))


def latent(it: Policy, seed: int) -> torch.Tensor:
    return torch.randn(3, *it.latent_shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", ["sd3", "sd15"])
@pytest.mark.parametrize("objective", ["opd", "dpo", "nft", "rwr", "sft"])
@pytest.mark.parametrize("again", [False, True], ids=["kept", "recomputed"])
def test_every_objective_moves_every_weight(name: str, objective: str, again: bool) -> None:
    network = family(name)
    it = policy(name, network.pipe, visual=visual.stirred(network))
    if again:
        it.network.module.enable_gradient_checkpointing()
        it.network.module.train()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in it.parameters().values():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    it.start_slow()
    batch = {
        "prompt": it.network.encode("a dog").expand(3),
        "refined": it.network.encode("a red dog").expand(3),
        "target": torch.tensor([[1.0, 1.0], [-2.0, 0.5], [0.5, -2.0]]),
        "advantage": torch.tensor([0.5, 1.0, 0.2]),
        "winner": latent(it, 1), "loser": latent(it, 2), "latents": latent(it, 3),
        "reward": torch.tensor([0.5, 0.9, 0.1]),
        "rewards": torch.tensor([[0.5, 0.3], [0.2, 0.9], [0.1, 0.8]]),
    }  # fmt: skip
    loss, _ = load_objective(objective).loss(batch, it, torch.Generator().manual_seed(0))
    loss.backward()
    still = [n for n, p in it.parameters().items() if p.grad is None or not p.grad.abs().any()]
    assert not still
    assert any(n.startswith("visual.looks") for n in it.parameters())


@pytest.mark.parametrize("name", tiny.NAMES)
def test_the_reference_of_round_two_reads_its_own_visual_prompts(name: str, tmp_path: Path) -> None:
    network = family(name)
    first = policy(name, network.pipe, visual=visual.stirred(network))
    with torch.no_grad():
        for number, parameter in enumerate(first.parameters().values()):
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
            parameter.add_(0.1 * noise)
    x, t = latent(first, 4), first.process.draw(3, torch.Generator().manual_seed(1))
    told, target = first.network.encode("a dog").expand(3), torch.tensor([[1.0, 1.0], [-2, 0], [0, 2.0]])
    with first.voice("student"), torch.no_grad():
        taught = first.student(x, t, told, target)
        images = first.sample(told, target, [1, 2, 3])
    save_artifact(
        tmp_path / "one", network.pipe, adapter_name="student", emotion_tokens=first.tokens,
        visual_prompts=first.visual, call=network.call,
    )  # fmt: skip
    pipe = tiny.build(name)
    previous = load_artifact(pipe, tmp_path / "one", name=PREVIOUS, call=network.call)
    own = VisualConditioner.load(tmp_path / "one" / VISUAL_FILE)
    second = policy(name, pipe, previous=previous, visual=own)
    with torch.no_grad():
        for parameter in second.parameters().values():
            parameter.add_(0.1)
        assert torch.allclose(second.reference(x, t, told, target), taught, atol=1e-5)
        assert not torch.allclose(second.student(x, t, told, target), taught, atol=1e-3)
        assert torch.allclose(second.reference(x, t, told, target), taught, atol=1e-5)
        again = second.sample(told, target, [1, 2, 3], voice="reference")
    for one, other in zip(images, again, strict=True):
        assert np.abs(np.asarray(one).astype(int) - np.asarray(other).astype(int)).max() <= 1


QUICK = (
    "train.steps=2", "train.batch_size=2", "train.checkpoint_every=1", "train.tensorboard=false", "train.device=cpu",
    "train.lr=0.05", "guard.every=0", "policy.rank=4", "policy.alpha=8", "data.held_out=0", "policy.visual_width=8",
    "policy.visual_tokens=2", "train.warmup=0", "objective.hold_fraction=0.5",
)  # fmt: skip


@pytest.mark.parametrize("name", tiny.NAMES)
@pytest.mark.parametrize("objective", ["opd", "dpo", "sft"])
def test_a_distillation_saves_what_it_trained(name: str, objective: str, tmp_path: Path) -> None:
    folder = tiny.save(name, tmp_path / "model")
    made = visual.bank(family(name))
    made.save(tmp_path / "bank.safetensors")
    settings = rl_log.write_log(tmp_path / "home", 6, model=str(folder), revision=None)
    sets = [*QUICK, f"policy.visual_bank={tmp_path / 'bank.safetensors'}"]
    first = load_config(objective, sets=[*sets, "train.visual_lr=0.2"])
    result = distill(settings, first, tmp_path / "out")
    assert result.outcome.steps == 2
    module = VisualConditioner.load(tmp_path / "out" / VISUAL_FILE)
    assert module.config["bank"] == made.sha256
    assert all(layer.out.weight.abs().max() > 0 for layer in module.layers)
    whole, unseen = (draw(name, adapter=str(tmp_path / "out"), visual_scale=scale) for scale in (1, 0))
    assert not np.array_equal(whole, unseen)
    assert np.array_equal(whole, draw(name, adapter=str(tmp_path / "out")))
    distill(settings, first, tmp_path / "again")
    assert (tmp_path / "again" / VISUAL_FILE).read_bytes() == (tmp_path / "out" / VISUAL_FILE).read_bytes()
    other = replace(made, visual=made.visual + 1)
    other.save(tmp_path / "bank.safetensors")
    with pytest.raises(UserError, match="visual prompts, those of another bank"):
        distill(settings, first, tmp_path / "out", resume=True)


def test_visual_prompts_may_be_all_that_is_trained(tmp_path: Path) -> None:
    folder = tiny.save("sd3", tmp_path / "model")
    visual.bank(family("sd3")).save(tmp_path / "bank.safetensors")
    settings = rl_log.write_log(tmp_path / "home", 6, model=str(folder), revision=None)
    bank = f"policy.visual_bank={tmp_path / 'bank.safetensors'}"
    rates = ("train.lr=0", "train.emotion_lr=0", "train.visual_lr=0.2")
    distill(settings, load_config("sft", sets=[*QUICK, bank, *rates]), tmp_path / "out")
    base = draw("sd3")
    assert not np.array_equal(draw("sd3", adapter=str(tmp_path / "out")), base)
    for off in ("visual_scale", "adapter_scale"):
        assert np.array_equal(draw("sd3", adapter=str(tmp_path / "out"), **{off: 0}), base)
    # Without them the artifact has nothing to say.
    (tmp_path / "out" / VISUAL_FILE).unlink()
    with pytest.raises(UserError, match="changes nothing"):
        load_artifact(tiny.build("sd3"), tmp_path / "out", call=tiny.DEFAULTS["sd3"]["call"])


@pytest.mark.slow
def test_the_embedded_generator_trains_and_draws_what_was_saved(tmp_path: Path) -> None:
    source = open_model(GeneratorSettings(model="miniature", device="cpu"))
    visual.bank(source.family).save(tmp_path / "bank.safetensors")
    base = source._run([ImageRequest("a dog", 7, GLAD)])[0]
    settings = rl_log.write_log(tmp_path / "home", 4, model="miniature", revision=None)
    sets = [*QUICK, f"policy.visual_bank={tmp_path / 'bank.safetensors'}"]
    # A rate at which a tiny pipeline moves would leave nothing of this one's pictures.
    sets += ["train.lr=1e-4", "train.visual_lr=0.02"]
    distill(settings, load_config("sft", sets=sets), tmp_path / "out")

    def loaded(**how: Any) -> Any:
        settings = GeneratorSettings(model="miniature", device="cpu", adapter=str(tmp_path / "out"), **how)
        return open_model(settings)._run([ImageRequest("a dog", 7, GLAD)])[0]

    one, two, unseen, off = loaded(), loaded(), loaded(visual_scale=0.0), loaded(adapter_scale=0.0)
    pixels = [np.asarray(it.image) for it in (base, one, two, unseen, off)]
    assert np.array_equal(pixels[1], pixels[2]) and np.array_equal(pixels[0], pixels[4])
    assert not np.array_equal(pixels[1], pixels[3])
