"""Adapters on real tiny pipelines: what binds must work, what does not work must not bind."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from emoloop.domain import Emotion, EmotionTarget, UserError
from emoloop.graph.loop import open_loop
from emoloop.settings import GeneratorSettings, load_settings
from emoloop.tools.diffusion.adapter import LORA_FILE, TOKENS_FILE, load_artifact, rescale, save_artifact
from emoloop.tools.diffusion.conditioners import EmotionConditioner
from emoloop.tools.diffusion.families import family_of
from emoloop.tools.images.base import ImageRequest
from emoloop.tools.images.diffusers import DiffusersGenerator
from emoloop.tools.images.load import load_generator
from huggingface_hub import ModelCard
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from scripted import Scripted

RANK, ALPHA = 4, 10


def trained(name: str, seed: int = 1, *, tokens: int = 0, **lora: Any) -> tuple[Any, EmotionConditioner]:
    """A pipeline whose LoRA and emotion tokens have moved away from the start."""
    pipe = tiny.build(name)
    torch.manual_seed(seed)
    family = family_of(pipe, tiny.DEFAULTS[name]["call"])
    family.module.add_adapter(
        LoraConfig(
            r=RANK, lora_alpha=ALPHA, target_modules=["to_q", "to_v", "to_k"], init_lora_weights=False, **lora
        )
    )
    module = EmotionConditioner.for_embeds(family.encode(""), tokens=tokens)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return pipe, module


def save(name: str, folder: Path, **kwargs: Any) -> Path:
    pipe, module = trained(name, **kwargs)
    return save_artifact(
        folder,
        pipe,
        emotion_tokens=module,
        training={"objective": "none", "steps": 1},
        base_model="tiny/model",
        call=tiny.DEFAULTS[name]["call"],
    )


@pytest.fixture(scope="module", params=tiny.NAMES)
def name(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def artifact(name: str, tmp_path_factory) -> Path:
    return save(name, tmp_path_factory.mktemp(name) / "artifact")


def generator(name: str, **settings: Any) -> DiffusersGenerator:
    defaults = tiny.DEFAULTS[name]
    return DiffusersGenerator(tiny.build(name), GeneratorSettings(**settings), defaults=defaults)


async def draw(source: DiffusersGenerator, target: EmotionTarget | None = None) -> np.ndarray:
    (made,) = await source.generate([ImageRequest("a dog by the sea", 3, target)])
    return np.asarray(made.image).astype(int)


async def test_an_artifact_draws_what_the_trained_pipeline_draws(name: str, artifact: Path):
    pipe, module = trained(name)
    source = DiffusersGenerator(pipe, defaults=tiny.DEFAULTS[name])
    loaded = generator(name, adapter=str(artifact))
    assert np.array_equal(await draw(source), await draw(loaded))
    assert loaded.adapter is not None and loaded.adapter.emotion_tokens is not None
    for mine, theirs in zip(module.parameters(), loaded.adapter.emotion_tokens.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    assert loaded.adapter.training == {"objective": "none", "steps": 1}


async def test_the_lora_alone_loads_in_plain_diffusers_with_the_same_effect(name: str, artifact: Path):
    ours = await draw(generator(name, adapter=str(artifact)))
    pipe = tiny.build(name)
    pipe.load_lora_weights(str(artifact))
    layer = next(m for m in family_of(pipe).module.modules() if hasattr(m, "lora_A"))
    assert layer.scaling["default_0"] == ALPHA / RANK
    plain = DiffusersGenerator(pipe, defaults=tiny.DEFAULTS[name])
    assert np.array_equal(ours, await draw(plain))
    assert not np.array_equal(ours, await draw(generator(name)))


async def test_scale_zero_is_the_base_and_half_lies_between(name: str, artifact: Path):
    target = EmotionTarget(valence=2, arousal=-1)
    base = await draw(generator(name))
    off = generator(name, adapter=str(artifact), adapter_scale=0)
    assert np.array_equal(base, await draw(off, target))
    assert off.describe()["adapter"] is None
    full = generator(name, adapter=str(artifact))
    half = generator(name, adapter=str(artifact), adapter_scale=0.5)
    a, b = await draw(full, target), await draw(half, target)
    assert not np.array_equal(a, b)
    assert not np.array_equal(b, base)
    assert half.describe()["adapter"] == f"{full.describe()['adapter']}@0.5"
    (made,) = await half.generate([ImageRequest("a dog", 1, target)])
    assert made.provenance["adapter"] == half.describe()["adapter"]


async def test_a_bound_adapter_takes_another_strength(name: str, artifact: Path):
    target = EmotionTarget(valence=2, arousal=-1)
    source = generator(name, adapter=str(artifact))
    for scale in (0.5, 0.0, 1.0):
        source.adapter = rescale(source.pipe, source.adapter, scale)
        loaded = generator(name, adapter=str(artifact), adapter_scale=scale)
        assert np.array_equal(await draw(source, target), await draw(loaded, target))


async def test_the_target_moves_the_picture_and_only_with_an_artifact(name: str, artifact: Path):
    with_tokens = generator(name, adapter=str(artifact))
    calm = await draw(with_tokens, EmotionTarget(valence=2.5, arousal=-2.5))
    tense = await draw(with_tokens, EmotionTarget(valence=-2.5, arousal=2.5))
    half = await draw(with_tokens, EmotionTarget(valence=2.5))
    none = await draw(with_tokens)
    assert len({image.tobytes() for image in (calm, tense, half, none)}) == 4
    sad, point = EmotionTarget(category=Emotion.SADNESS), EmotionTarget(valence=-1.8, arousal=-1.4)
    assert np.array_equal(await draw(with_tokens, sad), await draw(with_tokens, point))
    lora_alone = generator(name, adapter=str(artifact / LORA_FILE))
    assert np.array_equal(none, await draw(lora_alone, EmotionTarget(valence=2.5)))


async def test_a_part_speaks_alone(name: str, artifact: Path):
    target = EmotionTarget(valence=2, arousal=-1)
    base, whole = generator(name), generator(name, adapter=str(artifact))
    lora = generator(name, adapter=str(artifact), adapter_part="lora")
    tokens = generator(name, adapter=str(artifact), adapter_part="tokens")
    assert np.array_equal(await draw(lora, target), await draw(whole))
    assert np.array_equal(await draw(tokens), await draw(base))
    assert len({(await draw(it, target)).tobytes() for it in (base, whole, lora, tokens)}) == 4
    ids = [it.describe()["adapter"] for it in (whole, tokens, lora)]
    assert ids == [ids[0], f"{ids[0]}:tokens", f"{ids[0]}:lora"]


async def test_a_lora_has_no_tokens_to_speak_alone(artifact: Path, name: str):
    with pytest.raises(UserError, match="no emotion tokens"):
        generator(name, adapter=str(artifact / LORA_FILE), adapter_part="tokens")


async def test_extra_tokens_draw_the_same_bits_in_mixed_company(name: str, tmp_path: Path):
    source = generator(name, adapter=str(save(name, tmp_path / "extra", tokens=3)), batch_window_ms=30)
    requests = [
        ImageRequest("a dog", seed, EmotionTarget(valence=seed) if seed % 2 else None)
        for seed in range(-2, 3)
    ]
    together = await source.generate(requests)
    for request, image in zip(requests, together, strict=True):
        (alone,) = await source.generate([request])
        assert np.array_equal(np.asarray(alone.image), np.asarray(image.image))
    lora_alone = generator(name, adapter=str(tmp_path / "extra" / LORA_FILE))
    assert np.array_equal(await draw(source), await draw(lora_alone))


def test_the_folder_holds_what_the_design_says(artifact: Path):
    names = {path.name for path in artifact.iterdir()}
    assert names == {LORA_FILE, TOKENS_FILE, "README.md", "training.json"}
    card = (artifact / "README.md").read_text()
    assert card.startswith("---\nbase_model: tiny/model\nlibrary_name: diffusers\n")
    said = ModelCard.load(artifact / "README.md")
    assert said.data.to_dict() == {
        "base_model": "tiny/model",
        "base_model_relation": "adapter",
        "library_name": "diffusers",
        "license": "other",
        "license_name": "that-of-the-base-model",
        "license_link": "https://huggingface.co/tiny/model",
        "pipeline_tag": "text-to-image",
        "tags": ["text-to-image", "diffusers", "lora", "template:sd-lora", "emoloop", "affective-computing"],
    }
    assert "rank 4, alpha 10" in card
    assert "it has no target" in card


def test_equal_weights_give_an_equal_hash_and_replace_the_old_artifact(tmp_path: Path):
    first = save("sd3", tmp_path / "a")
    content = [(first / file).read_bytes() for file in (LORA_FILE, TOKENS_FILE)]
    hashes = [load_artifact(tiny.build("sd3"), first, call={"max_sequence_length": 0}).sha256]
    for seed in (1, 2):
        save("sd3", first, seed=seed)
        hashes.append(load_artifact(tiny.build("sd3"), first, call={"max_sequence_length": 0}).sha256)
    assert hashes[0] == hashes[1] != hashes[2]
    save("sd3", first)
    assert content == [(first / file).read_bytes() for file in (LORA_FILE, TOKENS_FILE)]
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_failed_save_leaves_the_old_artifact_whole(tmp_path: Path, monkeypatch):
    first = save("sd3", tmp_path / "a")
    before = (first / LORA_FILE).read_bytes()

    def full(self, path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(EmotionConditioner, "save", full)
    with pytest.raises(OSError, match="No space left"):
        save("sd3", first, seed=2)
    assert (first / LORA_FILE).read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


async def test_peft_format_is_the_same_adapter(tmp_path: Path):
    pipe, _ = trained("sd3")
    state = load_file(save_artifact(tmp_path / "d", pipe, call={"max_sequence_length": 0}) / LORA_FILE)
    twin = get_peft_model(
        tiny.build("sd3").transformer,
        LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["to_q", "to_v", "to_k"]),
    )
    twin.save_pretrained(str(tmp_path / "p"))
    prefixed = {k.replace("transformer.", "base_model.model.", 1): v for k, v in state.items()}
    save_file(prefixed, tmp_path / "p" / "adapter_model.safetensors")
    a = await draw(generator("sd3", adapter=str(tmp_path / "d")))
    b = await draw(generator("sd3", adapter=str(tmp_path / "p")))
    assert np.array_equal(a, b)


async def test_a_lora_of_the_text_encoders_counts_too(tmp_path: Path):
    pipe = tiny.build("sd15")
    pipe.text_encoder.add_adapter(LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    from peft.utils import get_peft_model_state_dict

    state = get_peft_model_state_dict(pipe.text_encoder)
    save_file({f"text_encoder.{k}": v for k, v in state.items()}, tmp_path / "text.safetensors")
    with_lora = await draw(generator("sd15", adapter=str(tmp_path / "text.safetensors")))
    assert not np.array_equal(with_lora, await draw(generator("sd15")))


async def test_an_adapter_that_was_active_before_stays_active(tmp_path: Path):
    call = {"max_sequence_length": 0}
    first, second = save("sd3", tmp_path / "1", seed=1), save("sd3", tmp_path / "2", seed=2)
    pipe = tiny.build("sd3")
    load_artifact(pipe, first, name="one", call=call)
    one = await draw(DiffusersGenerator(pipe, defaults=tiny.DEFAULTS["sd3"]))
    load_artifact(pipe, second, name="two", call=call)
    both = await draw(DiffusersGenerator(pipe, defaults=tiny.DEFAULTS["sd3"]))
    assert sorted(pipe.get_active_adapters()) == ["one", "two"]
    assert not np.array_equal(one, both)
    with pytest.raises(UserError):
        load_artifact(pipe, tmp_path / "gone", name="three", call=call)
    load_artifact(pipe, second, name="three", scale=0, call=call)
    assert sorted(pipe.get_active_adapters()) == ["one", "two"]


def broken(kind: str, folder: Path) -> Path:
    """Adapters that must be refused."""
    path = save("sd3", folder / "a")
    state = load_file(path / LORA_FILE)
    header = {"lora_adapter_metadata": json.dumps({})}
    match kind:
        case "gone":
            return folder / "gone"
        case "empty":
            (folder / "empty").mkdir()
            return folder / "empty"
        case "pickle":
            (folder / "lora.bin").write_bytes(b"x")
            return folder / "lora.bin"
        case "garbage":
            (path / LORA_FILE).write_bytes(b"x" * 64)
        case "no lora":
            save_file({"weight": torch.zeros(2)}, path / LORA_FILE)
        case "zero":
            save_file({k: v * 0 if "lora_B" in k else v for k, v in state.items()}, path / LORA_FILE)
        case "other names":
            save_file(
                {k.replace("transformer_blocks", "layers"): v for k, v in state.items()}, path / LORA_FILE
            )
        case "more modules":
            more = {k.replace("blocks.1", "blocks.7"): v.clone() for k, v in state.items() if "blocks.1" in k}
            save_file(state | more, path / LORA_FILE)
        case "other prefix":
            save_file({k.replace("transformer.", "unet.", 1): v for k, v in state.items()}, path / LORA_FILE)
        case "other width":
            save_file(
                {k: torch.cat([v, v], 1) if "lora_A" in k else v for k, v in state.items()}, path / LORA_FILE
            )
        case "other tokens":
            EmotionConditioner(7, 3).save(path / TOKENS_FILE)
        case "no tokens":
            save_file(state, path / TOKENS_FILE, metadata=header)
        case "two files":
            (path / LORA_FILE).rename(path / "one.safetensors")
            save_file(state, path / "two.safetensors")
    return path


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("gone", "no adapter at"),
        ("empty", "holds no LoRA"),
        ("pickle", r"a \.safetensors file is wanted"),
        ("garbage", "not a readable safetensors file"),
        ("no lora", "holds no LoRA weights"),
        ("zero", "changes nothing"),
        ("other names", "does not fit|binds to no module"),
        ("more modules", "does not fit"),
        ("other prefix", "binds to no module|does not fit"),
        ("other width", "does not fit"),
        ("other tokens", "made for another model"),
        ("no tokens", "holds no emotion tokens of version 3"),
        ("two files", "holds 2 safetensors files: name one"),
    ],
)
async def test_what_does_not_fit_is_one_line_and_leaves_no_trace(kind: str, words: str, tmp_path: Path):
    path = broken(kind, tmp_path)
    pipe = tiny.build("sd3")
    with pytest.raises(UserError, match=words) as error:
        load_artifact(pipe, path, call={"max_sequence_length": 0})
    assert "\n" not in str(error.value)
    assert not getattr(pipe.transformer, "peft_config", {})
    clean = await draw(DiffusersGenerator(pipe, defaults=tiny.DEFAULTS["sd3"]))
    assert np.array_equal(clean, await draw(generator("sd3")))


@pytest.mark.parametrize("other", [n for n in tiny.NAMES if n != "sd3"])
def test_a_lora_of_another_class_is_refused(other: str, tmp_path: Path):
    path = save(other, tmp_path / "other")
    folder = tiny.save("sd3", tmp_path / "model")
    for adapter in (path, path / LORA_FILE):
        with pytest.raises(UserError, match=r"adapter .*(does not fit|binds to no module|another model)"):
            load_generator(GeneratorSettings(model=str(folder), adapter=str(adapter)))


def test_saving_refuses_what_has_no_effect(tmp_path: Path):
    call = {"max_sequence_length": 0}
    pipe = tiny.build("sd3")
    with pytest.raises(UserError, match="nothing to save"):
        save_artifact(tmp_path / "a", pipe, call=call)
    pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    with pytest.raises(UserError, match="changes nothing"):
        save_artifact(tmp_path / "a", pipe, call=call)
    assert not (tmp_path / "a").exists()


def pipe_and(**settings: Any) -> tuple[Any, DiffusersGenerator]:
    pipe = tiny.build("sd3")
    return pipe, DiffusersGenerator(pipe, GeneratorSettings(**settings), defaults=tiny.DEFAULTS["sd3"])


async def test_a_second_adapter_on_one_pipeline_leaves_the_first_and_both_are_logged(tmp_path: Path):
    one, two = save("sd3", tmp_path / "1", seed=1), save("sd3", tmp_path / "2", seed=2)
    pipe, first = pipe_and(adapter=str(one))
    alone, first_id = await draw(first), first.describe()["adapter"]
    second = DiffusersGenerator(pipe, GeneratorSettings(adapter=str(two)), defaults=tiny.DEFAULTS["sd3"])
    assert first.adapter is not None and second.adapter is not None
    assert first.adapter.id == first_id != second.adapter.id
    both = f"{first_id}+{second.adapter.id}"
    (made,) = await first.generate([ImageRequest("a dog", 1)])
    assert made.provenance["adapter"] == both == second.describe()["adapter"]
    await second.aclose()
    assert first.describe()["adapter"] == first_id
    assert np.array_equal(alone, await draw(first))


async def test_closing_gives_the_pipeline_back_as_it_was(tmp_path: Path):
    pipe = tiny.build("sd3")
    pipe.set_progress_bar_config(disable=False, desc="mine")
    defaults = tiny.DEFAULTS["sd3"]
    settings = GeneratorSettings(adapter=str(save("sd3", tmp_path / "1")))
    source = DiffusersGenerator(pipe, settings, defaults=defaults)
    await source.aclose()
    await source.aclose()
    assert pipe._progress_bar_config == {"disable": False, "desc": "mine"}
    assert not getattr(pipe.transformer, "peft_config", {})
    clean = DiffusersGenerator(pipe, defaults=defaults)
    assert clean.describe()["adapter"] is None
    assert np.array_equal(await draw(clean), await draw(generator("sd3")))


async def test_a_loop_that_is_closed_gives_the_users_pipeline_back_as_it_was(tmp_path: Path):
    pipe = tiny.build("sd3")
    pipe.set_progress_bar_config(disable=False, desc="mine")
    drawn = {"adapter": str(save("sd3", tmp_path / "1")), "steps": 1, "height": tiny.SIZE, "width": tiny.SIZE}
    settings = load_settings(
        {"home": tmp_path / "home", "generator": drawn, "loop": {"rounds": 1, "images": 1}}
    )
    async with open_loop(settings, generator=pipe, lvlm=Scripted()) as loop:
        result = await loop.run("a dog", EmotionTarget(valence=2), seed=1)
        assert result.best and result.best.adapter and pipe.get_active_adapters()
    assert pipe._progress_bar_config == {"disable": False, "desc": "mine"}
    assert not getattr(pipe.transformer, "peft_config", {})


async def test_a_lora_that_was_on_the_pipeline_already_is_logged(tmp_path: Path):
    pipe = tiny.build("sd3")
    pipe.load_lora_weights(str(save("sd3", tmp_path / "1")), adapter_name="emoloop")
    source = DiffusersGenerator(pipe, defaults=tiny.DEFAULTS["sd3"])
    theirs = source.describe()["adapter"]
    assert theirs is not None and theirs.startswith("emoloop:") and len(theirs) == len("emoloop:") + 64
    await source.aclose()
    settings = GeneratorSettings(adapter=str(save("sd3", tmp_path / "2", seed=2)))
    ours = DiffusersGenerator(pipe, settings, defaults=tiny.DEFAULTS["sd3"])
    assert ours.adapter is not None and ours.describe()["adapter"] == f"{theirs}+{ours.adapter.id}"
    await ours.aclose()
    assert pipe.get_active_adapters() == ["emoloop"]


def test_a_name_that_is_taken_is_refused_and_keeps_its_adapter(tmp_path: Path):
    call, pipe = {"max_sequence_length": 0}, tiny.build("sd3")
    one, two = save("sd3", tmp_path / "1", seed=1), save("sd3", tmp_path / "2", seed=2)
    load_artifact(pipe, one, name="mine", call=call)
    with pytest.raises(UserError, match="has an adapter 'mine' already"):
        load_artifact(pipe, two, name="mine", call=call)
    assert pipe.get_active_adapters() == ["mine"]


def test_an_adapter_of_another_base_of_the_same_shapes_is_told(tmp_path: Path, caplog):
    path = save("sd3", tmp_path / "1")
    (path / "training.json").write_text(json.dumps({"base": {"model": "theirs", "revision": "1"}}))
    call = {"max_sequence_length": 0}
    load_artifact(tiny.build("sd3"), path, call=call, base={"model": "copy", "revision": "1"})
    assert not caplog.text
    load_artifact(tiny.build("sd3"), path, call=call, base={"model": "ours", "revision": "2"})
    assert "was made for theirs, and is used on ours" in caplog.text
