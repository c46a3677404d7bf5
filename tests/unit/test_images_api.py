import base64
import io
import json
from collections.abc import Callable

import httpx
import pytest
from emoloop.domain import EmotionTarget, UserError
from emoloop.graph.retry import retryable
from emoloop.settings import GeneratorSettings
from emoloop.tools.images import images_api
from emoloop.tools.images.base import GeneratedImage, GenerationError, Generator, ImageRequest
from emoloop.tools.images.load import load_generator
from PIL import Image

URL = "http://images.test/v1"


def answer(request: httpx.Request) -> httpx.Response:
    body = json.loads(request.content)
    width, height = map(int, body["size"].split("x"))
    stream = io.BytesIO()
    Image.new("RGB", (width, height), (body["seed"], 0, 0)).save(stream, "PNG")
    return httpx.Response(200, json={"data": [{"b64_json": base64.b64encode(stream.getvalue()).decode()}]})


def generator(handler: Callable[[httpx.Request], httpx.Response], **more) -> images_api.ImagesApiGenerator:
    settings = GeneratorSettings(model="served", base_url=URL, width=16, height=8, **more)
    return images_api.ImagesApiGenerator(settings, transport=httpx.MockTransport(handler))


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(images_api, "wait_exponential_jitter", lambda **_: lambda state: 0.0)


async def test_each_image_is_one_request_with_everything_in_it():
    bodies = []

    def handler(request: httpx.Request) -> httpx.Response:
        assert str(request.url) == f"{URL}/images/generations"
        bodies.append(json.loads(request.content))
        return answer(request)

    source = generator(handler, steps=5, guidance=2.5, negative_prompt="rain")
    assert isinstance(source, Generator)
    requests = [ImageRequest("a dog", seed, EmotionTarget(valence=1)) for seed in (3, 4)]
    made = await source.generate(requests)
    assert [image.image.getpixel((0, 0)) for image in made] == [(3, 0, 0), (4, 0, 0)]
    assert sorted(body.pop("seed") for body in bodies) == [3, 4]
    assert bodies[0] == {
        "model": "served",
        "prompt": "a dog",
        "n": 1,
        "size": "16x8",
        "response_format": "b64_json",
        "num_inference_steps": 5,
        "guidance_scale": 2.5,
        "negative_prompt": "rain",
    }
    provenance = made[0].provenance
    assert (provenance["model"], provenance["steps"], provenance["width"], provenance["height"]) == (
        "served",
        5,
        16,
        8,
    )
    assert source.unknown_words("anything") == []
    await source.aclose()


async def test_overload_is_waited_out():
    calls = []

    def handler(request: httpx.Request) -> httpx.Response:
        calls.append(1)
        if len(calls) == 1:
            return httpx.Response(429, text="slow down")
        if len(calls) == 2:
            raise httpx.ConnectError("away")
        return answer(request)

    source = generator(handler)
    assert len(await source.generate([ImageRequest("a dog", 1)])) == 1
    assert len(calls) == 3
    await source.aclose()


@pytest.mark.parametrize(
    "trouble", [httpx.ConnectError("away"), httpx.Response(503, text="CUDA out of memory")]
)
async def test_only_one_layer_tries_again(monkeypatch, trouble):
    """The client's patience is all there is: the graph does not begin it anew."""
    monkeypatch.setattr(images_api, "_PATIENCE", 0.0)

    def handler(request: httpx.Request) -> httpx.Response:
        if isinstance(trouble, Exception):
            raise trouble
        return trouble

    source = generator(handler)
    with pytest.raises(
        GenerationError, match=r"http://images\.test/v1/images/generations.*(away|answered 503)"
    ) as failed:
        await source.generate([ImageRequest("a dog", 1)])
    assert not retryable(failed.value)
    await source.aclose()


async def test_a_password_in_the_address_is_never_shown(monkeypatch):
    monkeypatch.setattr(images_api, "_PATIENCE", 0.0)
    settings = GeneratorSettings(model="m", base_url="http://ann:s3cret@127.0.0.1:9/v1", width=8, height=8)
    source = images_api.ImagesApiGenerator(settings)
    with pytest.raises(GenerationError) as failed:
        await source.generate([ImageRequest("a dog", 1)])
    assert "***@127.0.0.1" in str(failed.value)
    assert "s3cret" not in f"{failed.value} {source.describe()}"
    await source.aclose()


@pytest.mark.parametrize(
    ("response", "words"),
    [
        (httpx.Response(400, text="no\nsuch model"), "answered 400: no such model"),
        (httpx.Response(200, json={"data": []}), "holds no image"),
        (httpx.Response(200, json={"data": [{"b64_json": "AAAA"}]}), "holds no image"),
    ],
)
async def test_bad_answers_are_errors_of_their_request_alone(response: httpx.Response, words: str):
    def handler(request: httpx.Request) -> httpx.Response:
        return response if json.loads(request.content)["seed"] == 2 else answer(request)

    source = generator(handler)
    with pytest.raises(GenerationError, match=f"1 of 2 images failed: .*{words}") as failure:
        await source.generate([ImageRequest("a dog", 1), ImageRequest("a dog", 2)])
    assert failure.value.results[0].image.size == (16, 8)
    await source.aclose()


def test_wrong_settings_are_one_line():
    with pytest.raises(UserError, match="base_url"):
        load_generator(GeneratorSettings(base_url="images.test"))
    with pytest.raises(UserError, match="adapter works in this process only"):
        load_generator(GeneratorSettings(base_url=URL, adapter="x"))


async def test_the_key_is_sent_and_no_proxy_is_asked_for_this_machine(monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    settings = GeneratorSettings(
        model="m", base_url="http://127.0.0.1:1/v1", api_key="k-1\n", width=8, height=8
    )
    assert "k-1" not in repr(settings)
    local = images_api.ImagesApiGenerator(settings)
    assert local._client.headers["authorization"] == "Bearer k-1"
    assert not local._client._mounts
    await local.aclose()


async def test_an_answer_is_bounded_and_so_is_its_picture(monkeypatch):
    def handler(request: httpx.Request) -> httpx.Response:
        if json.loads(request.content)["seed"] == 2:
            return httpx.Response(200, content=b" " * (2**24 + 4096))
        stream = io.BytesIO()
        Image.new("1", (4000, 4000)).save(stream, "PNG")
        return httpx.Response(
            200, json={"data": [{"b64_json": base64.b64encode(stream.getvalue()).decode()}]}
        )

    source = generator(handler)
    with pytest.raises(GenerationError, match="far larger than was asked for"):
        await source.generate([ImageRequest("a dog", 1)])
    with pytest.raises(GenerationError, match="is longer than"):
        await source.generate([ImageRequest("a dog", 2)])
    await source.aclose()


class Plain:
    """What somebody writes first: nothing but `generate`."""

    def generate(self, requests):
        return [Image.new("RGB", (8, 4), (request.seed, 0, 0)) for request in requests]


class Later(Plain):
    async def generate(self, requests):
        images = super().generate(requests)
        return [GeneratedImage(*pair) for pair in zip(images, requests, strict=True)]

    def describe(self):
        return {"model": "mine"}


@pytest.mark.parametrize(("kind", "model"), [(Plain, "Plain"), (Later, "mine")])
async def test_an_object_that_only_generates_is_a_generator(kind: type, model: str):
    for spec in (kind(), f"{__name__}:given"):
        given.kind = kind
        source = load_generator(spec)
        assert isinstance(source, Generator) and source.describe()["model"] == model
        made = await source.generate([ImageRequest("a dog", 3), ImageRequest("a dog", 4)])
        assert [it.image.getpixel((0, 0))[0] for it in made] == [3, 4]
        assert [it.request.seed for it in made] == [3, 4] and made[0].provenance == {"model": model}
        assert source.unknown_words("a dog") == []
        await source.aclose()


def given(settings: GeneratorSettings):
    return given.kind()
