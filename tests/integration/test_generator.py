"""The generator over real, tiny, randomly initialised pipelines of every supported class."""

import asyncio
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
from emoloop.domain import UserError
from emoloop.events import ImageGenerated
from emoloop.settings import GeneratorSettings
from emoloop.tools.images import diffusers as module
from emoloop.tools.images.base import GeneratedImage, GenerationError, Generator, ImageRequest
from emoloop.tools.images.diffusers import DiffusersGenerator
from emoloop.tools.images.load import load_generator

PROMPTS = ["a dog by the sea", "a cat", "the red house on the hill", "a boat", "a calm dog", "a dark sea"]


@pytest.fixture(scope="module", params=tiny.NAMES)
def name(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def folder(name: str, tmp_path_factory) -> Path:
    return tiny.save(name, tmp_path_factory.mktemp(name))


@pytest.fixture(scope="module")
def sd3(tmp_path_factory) -> Path:
    return tiny.save("sd3", tmp_path_factory.mktemp("sd3"), tokenizer=tiny.word_tokenizer())


def pixels(image: GeneratedImage) -> np.ndarray:
    return np.asarray(image.image).astype(int)


def requests(count: int = len(PROMPTS)) -> list[ImageRequest]:
    return [ImageRequest(prompt, seed) for seed, prompt in enumerate(PROMPTS[:count])]


async def test_a_request_gives_the_same_bits_alone_and_in_any_company(folder: Path):
    source = load_generator(folder)
    together = await source.generate(requests())
    for request, image in zip(requests(), together, strict=True):
        (alone,) = await source.generate([request])
        assert np.array_equal(pixels(alone), pixels(image))
    backwards = await source.generate(requests()[::-1])
    assert all(np.array_equal(pixels(a), pixels(b)) for a, b in zip(together, backwards[::-1], strict=True))
    await source.aclose()


async def test_other_batch_shapes_stay_within_two_steps_of_255(folder: Path):
    made = []
    for size in (1, 3, 4):
        source = load_generator(folder, GeneratorSettings(micro_batch=size))
        made.append(await source.generate(requests()))
        await source.aclose()
    for others in made[1:]:
        for a, b in zip(made[0], others, strict=True):
            assert np.abs(pixels(a) - pixels(b)).max() <= 2


async def test_it_is_the_stock_pipeline_that_draws(name: str, folder: Path):
    source = load_generator(folder, GeneratorSettings(micro_batch=1))
    (ours,) = await source.generate([ImageRequest(PROMPTS[0], 7)])
    await source.aclose()
    stock = tiny.build(name)(
        PROMPTS[0],
        num_inference_steps=2,
        guidance_scale=3.0,
        height=tiny.SIZE,
        width=tiny.SIZE,
        generator=torch.Generator("cpu").manual_seed(7),
        **tiny.DEFAULTS[name]["call"],
    ).images[0]
    assert np.array_equal(pixels(ours), np.asarray(stock).astype(int))


async def test_prompt_seed_and_negative_prompt_each_matter(name: str, folder: Path):
    source = load_generator(folder)
    a, b, c, d = await source.generate(
        [
            ImageRequest("a dog", 1),
            ImageRequest("a cat", 1),
            ImageRequest("a dog", 2),
            ImageRequest("a dog", 1, negative_prompt="dark"),
        ]
    )
    assert not np.array_equal(pixels(a), pixels(b))
    assert not np.array_equal(pixels(a), pixels(c))
    # FLUX has a negative branch only where its folder asks for one.
    assert np.array_equal(pixels(a), pixels(d)) == (name == "flux")
    await source.aclose()


async def test_flux_takes_a_negative_prompt_when_its_folder_turns_guidance_on(tmp_path: Path):
    tiny.save("flux", tmp_path)
    defaults = tiny.DEFAULTS["flux"] | {"call": {"max_sequence_length": 32, "true_cfg_scale": 3.0}}
    (tmp_path / "emoloop.json").write_text(json.dumps(defaults))
    source = load_generator(tmp_path)
    a, b = await source.generate([ImageRequest("a dog", 1), ImageRequest("a dog", 1, negative_prompt="dark")])
    assert not np.array_equal(pixels(a), pixels(b))
    await source.aclose()


async def test_provenance_fills_the_event_and_makes_the_image_again(folder: Path):
    source = load_generator(folder, GeneratorSettings(negative_prompt="dark"))
    (made,) = await source.generate([ImageRequest("a dog", 5)])
    await source.aclose()
    event = ImageGenerated(run_id="r", sha256="0" * 64, prompt="a dog", seed=5, **made.provenance)
    assert (event.model, event.height, event.steps, event.guidance) == (str(folder), tiny.SIZE, 2, 3.0)
    assert event.revision is not None and len(event.revision) == 64
    assert event.negative_prompt == "dark"
    assert event.versions["diffusers"] != "none"
    again = load_generator(
        event.model,
        GeneratorSettings(
            steps=event.steps,
            guidance=event.guidance,
            height=event.height,
            width=event.width,
            negative_prompt=event.negative_prompt,
            micro_batch=int(event.versions["micro_batch"]),
        ),
    )
    (same,) = await again.generate([ImageRequest(event.prompt, event.seed)])
    assert np.array_equal(pixels(made), pixels(same))
    await again.aclose()


async def test_a_pipeline_object_is_taken_as_it_is_but_in_eval_mode(name: str):
    pipe = tiny.build(name)
    for component in pipe.components.values():
        if isinstance(component, torch.nn.Module):
            component.train()
    settings = GeneratorSettings(steps=2, height=tiny.SIZE, width=tiny.SIZE)
    pipe_generator = DiffusersGenerator(pipe, settings, defaults=tiny.DEFAULTS[name])
    assert isinstance(pipe_generator, Generator)
    assert load_generator(pipe_generator) is pipe_generator
    first, second = [await pipe_generator.generate([ImageRequest("a dog", 1)]) for _ in range(2)]
    assert np.array_equal(pixels(first[0]), pixels(second[0]))
    assert isinstance(load_generator(pipe, settings), DiffusersGenerator)
    await pipe_generator.aclose()


async def test_concurrent_callers_share_batches_and_do_not_block_the_loop(sd3: Path, monkeypatch):
    source = load_generator(sd3, GeneratorSettings(batch_window_ms=50))
    assert isinstance(source, DiffusersGenerator)
    sizes = []
    original = source._forward
    monkeypatch.setattr(
        source, "_forward", lambda rows, size: sizes.append((len(rows), size)) or original(rows, size)
    )
    ticks = 0

    async def tick() -> None:
        nonlocal ticks
        while True:
            await asyncio.sleep(0.002)
            ticks += 1

    ticking = asyncio.create_task(tick())
    made = await asyncio.gather(*(source.generate([request]) for request in requests()))
    ticking.cancel()
    assert sizes == [(4, 4), (2, 4)]
    assert ticks >= 3
    assert [images[0].request for images in made] == requests()
    await source.aclose()


async def test_an_error_stays_with_its_request(sd3: Path, monkeypatch):
    source = load_generator(sd3)
    encode = source.family.encode
    monkeypatch.setattr(
        type(source.family),
        "encode",
        lambda self, text: 1 / 0 if text == "bad" else encode(text),
    )
    with pytest.raises(GenerationError, match="1 of 3 images failed: division by zero") as failure:
        await source.generate([ImageRequest("a dog", 1), ImageRequest("bad", 2), ImageRequest("a cat", 3)])
    kinds = [type(result) for result in failure.value.results]
    assert kinds == [GeneratedImage, ZeroDivisionError, GeneratedImage]
    assert len(await source.generate([ImageRequest("a dog", 1)])) == 1
    await source.aclose()


async def test_pixels_that_are_not_numbers_are_an_error(sd3: Path):
    source = load_generator(sd3)
    torch.nn.init.constant_(source.pipe.vae.decoder.conv_out.bias, float("nan"))
    with pytest.raises(GenerationError, match="not numbers"):
        await source.generate([ImageRequest("a dog", 1)])
    await source.aclose()


async def test_a_picture_that_a_safety_checker_blackened_is_an_error(sd3: Path, monkeypatch):
    source = load_generator(sd3)
    draw, [black, *_] = source._draw, requests()

    def refusing(rows, seeds, steps):
        output = draw(rows, seeds, steps)
        return SimpleNamespace(images=output.images, nsfw_content_detected=[it == black.seed for it in seeds])

    monkeypatch.setattr(source, "_draw", refusing)
    with pytest.raises(GenerationError, match="1 of 6 images failed: the pipeline's safety checker refused"):
        await source.generate(requests())
    await source.aclose()


async def test_out_of_memory_halves_the_batch_and_goes_on(sd3: Path, monkeypatch, caplog):
    source = load_generator(sd3)
    forward = source._forward

    def small(rows, size):
        if size > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(rows, size)

    monkeypatch.setattr(source, "_forward", small)
    assert len(await source.generate(requests())) == len(PROMPTS)
    assert source.micro_batch == 1
    assert source.describe()["micro_batch"] == 1
    # Each step down is said once, however many pictures there are.
    await source.generate(requests())
    said = [it.getMessage() for it in caplog.records if "out of memory" in it.getMessage()]
    assert said == [f"out of memory: micro_batch goes from {n} to {n // 2}" for n in (4, 2)]
    monkeypatch.setattr(source, "_forward", lambda rows, size: small(rows, 2))
    with pytest.raises(GenerationError, match="6 of 6 images failed: CUDA out of memory"):
        await source.generate(requests())
    await source.aclose()


async def test_a_device_that_treats_rows_differently_gets_smaller_batches(sd3: Path, monkeypatch, caplog):
    source = load_generator(sd3)
    decode = source.pipe.vae.decode

    def unfair(latents, **kwargs):
        (pixels,) = decode(latents, **kwargs)
        return (pixels + 0.01 * (torch.arange(len(pixels)) // 2)[:, None, None, None],)

    monkeypatch.setattr(source.pipe.vae, "decode", unfair)
    together = await source.generate(requests())
    assert source.micro_batch == 2
    assert "micro_batch goes from 4 to 2" in caplog.text
    for request, image in zip(requests(), together, strict=True):
        (alone,) = await source.generate([request])
        assert np.array_equal(pixels(alone), pixels(image))
    assert together[0].provenance["versions"]["micro_batch"] == "2"
    await source.aclose()


async def test_a_cancelled_call_leaves_the_others_alone(sd3: Path):
    source = load_generator(sd3, GeneratorSettings(batch_window_ms=200))
    doomed = asyncio.create_task(source.generate(requests(1)))
    await asyncio.sleep(0.01)
    doomed.cancel()
    made = await source.generate([ImageRequest("a cat", 9)])
    assert made[0].request.seed == 9
    with pytest.raises(asyncio.CancelledError):
        await doomed
    await source.aclose()
    with pytest.raises(RuntimeError, match="closed"):
        await source.generate(requests(1))


def test_it_serves_several_event_loops(sd3: Path):
    source = load_generator(sd3)
    first = asyncio.run(source.generate(requests(1)))
    second = asyncio.run(source.generate(requests(1)))
    assert np.array_equal(pixels(first[0]), pixels(second[0]))
    asyncio.run(source.aclose())


def test_unknown_words_are_named_with_the_nearest_known_ones(sd3: Path):
    source = load_generator(sd3)
    found = source.unknown_words("An astronaut and a doge, by the Sea")
    assert [word.word for word in found] == ["astronaut", "and", "doge"]
    assert found[2].nearest[0] == "dog"
    assert all(len(word.nearest) == 3 for word in found)
    assert source.unknown_words("a dog by the sea") == []


def test_tokenizers_of_subwords_know_every_word(folder: Path):
    assert load_generator(folder).unknown_words("an astronaut on a zyzzyva") == []


async def test_prompt_embeddings_are_cached_and_the_cache_is_bounded(sd3: Path, monkeypatch):
    monkeypatch.setattr(module, "_CACHED_PROMPTS", 2)
    source = load_generator(sd3)
    calls = []
    encode = source.pipe.encode_prompt
    monkeypatch.setattr(
        source.pipe, "encode_prompt", lambda text, *a, **k: calls.append(text) or encode(text, *a, **k)
    )
    for prompt in ("a dog", "a dog", "a cat", "a boat", "a dog"):
        source._encode(prompt)
    assert calls == ["a dog", "a cat", "a boat", "a dog"]
    assert source._encode.cache_info().currsize == 2


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"height": 34}, "height 34: .* needs a multiple of (4|8), such as"),
        ({"width": 30}, "width 30: .* needs a multiple of (4|8), such as 32"),
        ({"device": "cuda:99"}, "device 'cuda:99' is not here"),
    ],
)
def test_wrong_settings_are_one_line(folder: Path, settings: dict, words: str):
    with pytest.raises(UserError, match=words):
        load_generator(folder, GeneratorSettings(**settings))


def test_a_size_beyond_the_positions_of_sd3_is_one_line(sd3: Path):
    with pytest.raises(UserError, match=r"height 128: .* goes up to 64"):
        load_generator(sd3, GeneratorSettings(height=128))


def test_the_end_of_a_prompt_that_no_encoder_reads_is_known(name: str, folder: Path):
    source = load_generator(folder)
    limit = 32 if name == "flux" else 16
    short = "a" * (limit - 2)
    assert source.unread(short) == ""
    assert source.unread(short + "bcd").endswith("bcd")
