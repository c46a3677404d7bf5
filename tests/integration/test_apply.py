"""`emoloop.apply` on stock pipelines: the pictures are those of a run, and removing leaves nothing behind."""

import asyncio
from pathlib import Path
from typing import Any

import diffusers
import emoloop
import numpy as np
import pytest
import tiny
import torch
from emoloop.domain import EmotionTarget, UserError
from emoloop.miniature import codec
from emoloop.settings import GeneratorSettings
from emoloop.tools.diffusion.adapter import LORA_FILE, adapters_on, save_artifact
from emoloop.tools.diffusion.conditioners import EmotionConditioner
from emoloop.tools.diffusion.families import family_of
from emoloop.tools.images.base import ImageRequest
from emoloop.tools.images.diffusers import DiffusersGenerator
from emoloop.tools.images.load import load_generator
from peft import LoraConfig

ROOT = Path(__file__).parents[2]
GLAD, TENSE = EmotionTarget(valence=2.5, arousal=-1.5), EmotionTarget(valence=-2, arousal=2)


def save(name: str, folder: Path, seed: int = 1, tokens: int = 0) -> Path:
    pipe = tiny.build(name)
    torch.manual_seed(seed)
    family = family_of(pipe, tiny.DEFAULTS[name]["call"])
    family.module.add_adapter(
        LoraConfig(r=4, lora_alpha=8, target_modules=["to_q", "to_v"], init_lora_weights=False)
    )
    module = EmotionConditioner.for_embeds(family.encode(""), tokens=tokens)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return save_artifact(folder, pipe, emotion_tokens=module, call=family.call)


@pytest.fixture(scope="module", params=tiny.NAMES)
def name(request) -> str:
    return request.param


@pytest.fixture(scope="module", params=[0, 3], ids=["residual", "extra tokens"])
def artifact(name: str, request, tmp_path_factory) -> Path:
    return save(name, tmp_path_factory.mktemp(name) / "a", tokens=request.param)


def stock(pipe: Any, name: str, prompt: Any = "a dog by the sea", seed: int = 7, **more: Any) -> np.ndarray:
    how = {"num_inference_steps": 2, "guidance_scale": 3.0, "height": tiny.SIZE, "width": tiny.SIZE}
    how |= tiny.DEFAULTS[name]["call"] | {"output_type": "pil"} | more
    return np.stack([np.asarray(it) for it in pipe(prompt, generator=_noise(seed), **how).images])


def _noise(seed: int) -> torch.Generator:
    return torch.Generator("cpu").manual_seed(seed)


def ours(name: str, artifact: Path, target: EmotionTarget | None, call: dict | None = None) -> np.ndarray:
    defaults = tiny.DEFAULTS[name] | {"call": tiny.DEFAULTS[name]["call"] | (call or {})}
    settings = GeneratorSettings(adapter=str(artifact), micro_batch=1)
    source = DiffusersGenerator(tiny.build(name), settings, defaults=defaults)
    made = source._run([ImageRequest("a dog by the sea", 7, target)])[0]
    assert not isinstance(made, Exception)
    return np.asarray(made.image)[None]


def test_a_stock_pipeline_draws_what_a_run_draws_and_then_is_the_base(name: str, artifact: Path):
    pipe = tiny.build(name)
    base = stock(pipe, name)
    kind, attributes = type(pipe), set(pipe.__dict__)
    emotion = emoloop.apply(pipe, artifact, GLAD)
    assert np.array_equal(stock(pipe, name), ours(name, artifact, GLAD))
    emotion.target = TENSE
    assert np.array_equal(stock(pipe, name), ours(name, artifact, TENSE))
    emotion.target = None
    assert np.array_equal(stock(pipe, name), ours(name, artifact, None))
    emotion.remove()
    emotion.remove()
    assert np.array_equal(stock(pipe, name), base)
    assert type(pipe) is kind and set(pipe.__dict__) == attributes
    assert not getattr(family_of(pipe).module, "peft_config", {})
    assert not [it for it in family_of(pipe).module.modules() if hasattr(it, "lora_A")]


def test_the_calls_own_arguments_keep_their_meaning(name: str, artifact: Path):
    pipe = tiny.build(name)
    with emoloop.apply(pipe, artifact, GLAD):
        one = stock(pipe, name)
        several = stock(pipe, name, ["a dog by the sea", "a cat"], num_images_per_prompt=2)
        assert len(several) == 4
        known = family_of(pipe, tiny.DEFAULTS[name]["call"]).encode("a dog by the sea")
        embeds = family_of(pipe).arguments(known, None)
        assert np.array_equal(stock(pipe, name, None, **embeds), one)
        assert type(pipe).__name__ in ("StableDiffusion3Pipeline", "FluxPipeline") or name.startswith("sd")
    assert not np.array_equal(stock(pipe, name), one)


def test_the_negative_branch_of_flux_stays_without_emotion(tmp_path: Path):
    path, call = save("flux", tmp_path / "a", tokens=2), {"true_cfg_scale": 3.0}
    pipe = tiny.build("flux")
    with emoloop.apply(pipe, path, GLAD):
        assert np.array_equal(stock(pipe, "flux", negative_prompt="", **call), ours("flux", path, GLAD, call))


def test_several_adapters_stand_beside_each_other_and_go_in_any_order(name: str, tmp_path: Path):
    one, two = save(name, tmp_path / "1", seed=1), save(name, tmp_path / "2", seed=2)
    pipe = tiny.build(name)
    base = stock(pipe, name)
    first = emoloop.apply(pipe, one, GLAD)
    alone = stock(pipe, name)
    second = emoloop.apply(pipe, two, TENSE, scale=0.5)
    assert first.adapter.name != second.adapter.name
    assert not np.array_equal(stock(pipe, name), alone)
    second.remove()
    assert np.array_equal(stock(pipe, name), alone)
    third = emoloop.apply(pipe, two, TENSE)
    first.remove()
    assert np.array_equal(stock(pipe, name), ours(name, two, TENSE))
    # Its name is another's by now.
    fourth = emoloop.apply(pipe, one, GLAD)
    first.remove()
    assert len(pipe.get_active_adapters()) == 2
    third.remove()
    fourth.remove()
    assert np.array_equal(stock(pipe, name), base)


def test_a_lora_of_the_users_own_stays_and_all_that_is_bound_is_logged(tmp_path: Path):
    pipe = tiny.build("sd3")
    pipe.load_lora_weights(str(save("sd3", tmp_path / "1") / LORA_FILE), adapter_name="emoloop")
    pipe.set_adapters("emoloop", 0.7)
    theirs = stock(pipe, "sd3")
    emotion = emoloop.apply(pipe, save("sd3", tmp_path / "2", seed=2), GLAD)
    source = load_generator(pipe, GeneratorSettings(steps=2, height=32, width=32, micro_batch=1))
    user, bound = source.describe()["adapter"].split("+", 1)
    assert (
        user.startswith("emoloop:") and bound == f'{emotion.adapter.sha256}{{"valence":2.5,"arousal":-1.5}}'
    )
    emotion.remove()
    assert pipe.get_active_adapters() == ["emoloop"]
    assert np.array_equal(stock(pipe, "sd3"), theirs)


def test_diffusers_own_switches_move_lora_and_target_together(name: str, artifact: Path):
    pipe = tiny.build(name)
    base = stock(pipe, name)
    emotion = emoloop.apply(pipe, artifact, GLAD)
    bound, glad = adapters_on(pipe), stock(pipe, name)
    pipe.set_adapters(emotion.adapter.name, 0.7)
    weaker = stock(pipe, name)
    assert adapters_on(pipe) == bound.replace("{", "@0.7{")
    pipe.set_adapters(emotion.adapter.name, 0.0)
    assert np.array_equal(stock(pipe, name), base) and adapters_on(pipe) is None
    pipe.set_adapters(emotion.adapter.name)
    pipe.disable_lora()
    assert np.array_equal(stock(pipe, name), base) and adapters_on(pipe) is None
    pipe.enable_lora()
    assert np.array_equal(stock(pipe, name), glad) and adapters_on(pipe) == bound
    pipe.unload_lora_weights()
    assert np.array_equal(stock(pipe, name), base) and adapters_on(pipe) is None
    own = save(name, artifact.parent / "own", seed=3) / LORA_FILE
    pipe.load_lora_weights(str(own), adapter_name="own")
    theirs = stock(pipe, name)
    emotion.remove()
    assert np.array_equal(stock(pipe, name), theirs) and pipe.get_active_adapters() == ["own"]
    pipe.unload_lora_weights()
    with emoloop.apply(pipe, artifact, GLAD, scale=0.7):
        assert np.array_equal(stock(pipe, name), weaker)
    assert np.array_equal(stock(pipe, name), base)
    emoloop.apply(pipe, artifact, GLAD)
    pipe.fuse_lora()
    # Only nearly: weights are rounded when a LoRA is added to them.
    assert np.abs(stock(pipe, name).astype(int) - glad).max() <= 1


def test_a_loop_over_such_a_pipeline_draws_what_the_pipeline_draws(name: str, artifact: Path):
    pipe = tiny.build(name)
    with emoloop.apply(pipe, artifact, GLAD):
        source = DiffusersGenerator(pipe, GeneratorSettings(micro_batch=1), defaults=tiny.DEFAULTS[name])
        [made] = asyncio.run(source.generate([ImageRequest("a dog by the sea", 7)]))
        assert np.array_equal(np.asarray(made.image)[None], stock(pipe, name))
        asyncio.run(source.aclose())


def test_what_does_not_fit_leaves_the_pipeline_alone(tmp_path: Path):
    pipe = tiny.build("sd15")
    stock(pipe, "sd15")
    kind, attributes = type(pipe), set(pipe.__dict__)
    with pytest.raises(UserError, match=r"no adapter at owner/name: .*snapshot_download"):
        emoloop.apply(pipe, "owner/name", GLAD)
    with pytest.raises(UserError, match="another model than this StableDiffusionPipeline"):
        emoloop.apply(pipe, save("sd3", tmp_path / "3"), GLAD)
    shipped = ROOT / "miniature/adapters/opd"
    with pytest.raises(UserError, match=r"another model, miniature \(StableDiffusion3Pipeline\), than this"):
        emoloop.apply(pipe, shipped, GLAD)
    with pytest.raises(UserError, match="its scale is a number, not nan"):
        emoloop.apply(pipe, save("sd15", tmp_path / "1"), GLAD, scale=float("nan"))
    with emoloop.apply(pipe, save("sd15", tmp_path / "1"), GLAD, scale=0):
        assert type(pipe) is kind
    assert type(pipe) is kind and set(pipe.__dict__) == attributes


def test_an_applied_pipeline_is_what_it_was_and_is_saved_without_the_adapter_alone(tmp_path: Path):
    pipe = tiny.build("sd15")
    base = stock(pipe, "sd15")
    with emoloop.apply(pipe, save("sd15", tmp_path / "a"), GLAD) as applied:
        assert isinstance(pipe, diffusers.StableDiffusionPipeline)
        assert type(pipe).__name__ == "StableDiffusionPipeline"
        assert repr(applied).startswith(
            f"Applied({tmp_path / 'a'} on StableDiffusionPipeline, EmotionTarget("
        )
        with pytest.raises(UserError, match="remove it first"):
            pipe.save_pretrained(tmp_path / "saved")
    pipe.save_pretrained(tmp_path / "saved")
    loaded = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "saved")
    loaded.set_progress_bar_config(disable=True)
    assert np.array_equal(stock(loaded, "sd15"), base)


def test_a_pipeline_stays_what_it_is_to_its_user(name: str, artifact: Path):
    """Another scheduler, callbacks, no guidance, a negative prompt, half precision, weights offloaded."""
    pipe = tiny.build(name)
    emotion = emoloop.apply(pipe, artifact, dict(valence=2.5, arousal=-1.5))
    glad = stock(pipe, name)
    seen: list[str] = []

    def look(_: Any, step: int, time: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        seen.extend(tensors)
        return {}

    watched = {"callback_on_step_end": look, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
    assert np.array_equal(stock(pipe, name, **watched), glad) and seen == ["prompt_embeds"] * 2
    for how in ({"guidance_scale": 1.0}, {"negative_prompt": "dark", "true_cfg_scale": 2.0}):
        if name != "flux":
            how.pop("true_cfg_scale", None)
        emotion.target = None
        without = stock(pipe, name, **how)
        emotion.target = {"valence": 2.5, "arousal": -1.5}
        assert not np.array_equal(stock(pipe, name, **how), without)
    kind = type(pipe.scheduler)
    other = "EulerDiscrete" if name.startswith("sd") and name != "sd3" else "FlowMatchLCM"
    scheduler, pipe.scheduler = (
        pipe.scheduler,
        getattr(diffusers, f"{other}Scheduler").from_config(pipe.scheduler.config),
    )
    assert not np.array_equal(stock(pipe, name), glad)
    pipe.scheduler = kind.from_config(scheduler.config)
    assert np.array_equal(stock(pipe, name), glad)
    # With the hooks of a real offload, though to the same device.
    pipe.enable_model_cpu_offload(device="cpu")
    assert np.array_equal(stock(pipe, name), glad)
    pipe.remove_all_hooks()
    pipe.to(torch.bfloat16)
    # Of these images a difference of one bit in a weight is seen nearly everywhere.
    assert np.abs(stock(pipe, name).astype(int) - glad).mean() < 16


async def test_weights_that_wait_elsewhere_compute_where_the_pipeline_says(name: str, artifact: Path):
    class Offloaded(type(tiny.build(name))):
        """What sequential offload to an accelerator looks like: weights on "meta", work elsewhere."""

        device = property(lambda self: torch.device("meta"))
        _execution_device = property(lambda self: torch.device("cpu"))

    pipe = tiny.build(name)
    pipe.__class__ = Offloaded
    settings = GeneratorSettings(adapter=str(artifact), micro_batch=1)
    source = DiffusersGenerator(pipe, settings, defaults=tiny.DEFAULTS[name])
    [made] = await source.generate([ImageRequest("a dog by the sea", 7, GLAD)])
    assert source.describe()["device"] == made.provenance["versions"]["device"] == "cpu"
    assert np.array_equal(np.asarray(made.image), ours(name, artifact, GLAD)[0])


async def test_the_shipped_adapter_in_the_stock_miniature_draws_what_a_run_draws():
    shipped, weights = ROOT / "miniature/adapters/opd", ROOT / "miniature/weights/generator"
    source = load_generator("miniature", GeneratorSettings(adapter=str(shipped), device="cpu"))
    requests = [
        ImageRequest("a dog by the sea", seed, EmotionTarget(valence=2, arousal=-1)) for seed in range(8)
    ]
    wanted = [np.asarray(made.image) for made in await source.generate(requests)]
    assert codec is not None  # diffusers loads the codec by its module's name
    absent = dict.fromkeys(("text_encoder_3", "tokenizer_3", "image_encoder", "feature_extractor"))
    pipe = diffusers.StableDiffusion3Pipeline.from_pretrained(weights, dtype=torch.float32, **absent)
    how = {"num_inference_steps": 14, "guidance_scale": source.guidance, "height": 96, "width": 96}
    how |= {"max_sequence_length": 0, "num_images_per_prompt": 8}

    def draw() -> list[np.ndarray]:
        noise = [_noise(seed) for seed in range(8)]
        return [np.asarray(it) for it in pipe("a dog by the sea", generator=noise, **how).images]

    base = draw()
    with emoloop.apply(pipe, shipped, EmotionTarget(valence=2, arousal=-1)):
        drawn = draw()
    assert all(np.array_equal(*pair) for pair in zip(drawn, wanted, strict=True))
    assert all(np.array_equal(*pair) for pair in zip(draw(), base, strict=True))
    assert not np.array_equal(drawn[0], base[0])
    await source.aclose()
