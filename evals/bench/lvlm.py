"""Measures a running vLLM server against what critics and rewriters need of it.

`valid_json` and `agreement` ask n critiques over HTTP and again from the embedded engine on the same
weights, greedy. The prefix cache is measured with the long rubric, as many runs ask at once, once in our
order and once with the picture first. The rates compare the same server with itself, in turns, so that a
busy machine cancels out.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from langchain_core.messages import AIMessage, BaseMessage, HumanMessage, SystemMessage
from PIL import Image

from ...agents.ask import read
from ...agents.prompt import load_prompt
from ...agents.schemas import CRITIC_SCHEMA, CriticAnswer, response_format, target_text
from ...domain import EmotionTarget, UserError
from ...settings import LVLMSettings, load_settings
from ...tools import presets
from ...tools.lvlm.chat import image_url, to_openai
from ...tools.lvlm.load import load_lvlm
from ...tools.lvlm.scores import read_scores, score_only
from ...tools.lvlm.vllm import VLLMChat
from ...tools.urls import public, redact

CRITIQUE = response_format("critique", CRITIC_SCHEMA)

#: Repetitions of each rate, in turns.
TURNS = 3


def main(
    n: int = 200,
    concurrency: int = 16,
    runs: int = 16,
    candidates: int = 8,
    images: str = "",
    prompt: str = "",
    embedded: bool = True,
    seed: int = 0,
) -> dict[str, Any]:
    """Critic's engine: valid answers, agreement with the embedded engine, prefix cache, rates.

    Args:
        n: Critiques that are compared.
        concurrency: Requests in flight.
        runs: Concurrent runs in the cache measurement.
        candidates: Pictures of each of them.
        images: Folder with pictures; by default scenes of the miniature world are drawn.
        prompt: The critic's prompt file; by default the model's.
        embedded: Compare with the embedded engine; without it there is no `agreement`.
        seed: Of scenes, prompts and targets.

    Raises:
        UserError: No server, or another one than the settings say.
    """
    settings = load_settings().lvlm
    settings = settings.model_copy(update={"engine": "vllm", "concurrency": concurrency})
    chat = load_lvlm(settings)
    assert isinstance(chat, VLLMChat)
    try:
        return asyncio.run(
            _measure(chat, settings, n, concurrency, runs, candidates, images, prompt, embedded, seed)
        )
    finally:
        chat.close()


async def _measure(
    chat: VLLMChat,
    settings: LVLMSettings,
    n: int,
    concurrency: int,
    runs: int,
    candidates: int,
    images: str,
    prompt: str,
    embedded: bool,
    seed: int,
) -> dict[str, Any]:
    defaults = _defaults(settings.model)
    name = prompt or settings.critic_prompt or defaults.get("critic_prompt", "critic")
    cases = _cases(max(n, runs * candidates), images, seed)
    critic = load_prompt(name)

    def ask(case: _Case, template: Any = critic) -> list[BaseMessage]:
        return template.messages((case.url,), prompt=case.prompt, target=target_text(case.target))

    questions = [ask(case) for case in cases]
    figures: dict[str, float] = {}
    answers = await _gather(chat.bind(response_format=CRITIQUE), questions[:n])
    read_well = [_read(answer) for answer in answers]
    figures["valid_json"] = statistics.fmean(answer is not None for answer in read_well)
    differences: list[dict[str, Any]] = []
    if embedded:
        agreement, differences = await _agreement(chat, settings, questions[:n], answers)
        figures |= agreement
    figures |= _accuracy("critique", [_point(answer) for answer in read_well], cases)

    rubric = load_prompt("critic")
    for key, first in (("prefix_hit_rate", False), ("prefix_hit_rate_image_first", True)):
        figures[key] = await _hit_rate(chat, rubric, cases, runs, candidates, first)
    if critic is not rubric:
        figures[f"prefix_hit_rate_{name.replace('-', '_')}"] = await _hit_rate(
            chat, critic, cases, runs, candidates, False
        )

    scorer = load_prompt("score-compact" if name.endswith("-compact") else "score")
    scores = [ask(case, scorer) for case in cases]
    figures |= await _rates(chat, questions, scores, concurrency)
    scored = await _gather(score_only(chat), scores[:n])
    figures |= _accuracy("score", [_expected(answer) for answer in scored], cases)
    return {
        "bench": "lvlm",
        "figures": figures,
        "n": n,
        "seed": seed,
        "prompt": critic.id,
        "differences": differences,
        "settings": public(settings.model_dump(mode="json")),
        "device": await asyncio.to_thread(_device, settings),
    }


# ---- cases


class _Case:
    """A picture with a prompt, a target and, for a drawn scene, its true place."""

    def __init__(
        self, image: Image.Image, prompt: str, target: EmotionTarget, truth: tuple[float, float] | None = None
    ):
        self.url, self.prompt, self.target, self.truth = image_url(image), prompt, target, truth


def _cases(count: int, folder: str, seed: int) -> list[_Case]:
    rng = np.random.default_rng(seed)

    def target() -> EmotionTarget:
        valence, arousal = np.round(rng.uniform(-2.5, 2.5, 2), 1)
        return EmotionTarget(valence=float(valence), arousal=float(arousal))

    if folder:
        paths = sorted(path for path in Path(folder).rglob("*") if path.suffix.lower() in (".png", ".jpg"))
        if not paths:
            raise UserError(f"{folder} holds no pictures (.png, .jpg)")
        chosen = [paths[i % len(paths)] for i in range(count)]
        return [_Case(Image.open(path), path.stem.replace("_", " "), target()) for path in chosen]
    from ...miniature import law, world

    cases = []
    for _ in range(count):
        scene = world.sample_scene(rng)
        pixels = world.render(scene)
        caption = world.caption(rng, scene, world.sample_named(rng, scene))
        cases.append(_Case(Image.fromarray(pixels), caption, target(), law.affect(scene, pixels)))
    return cases


def _defaults(model: str) -> dict[str, Any]:
    try:
        return presets.defaults(model, "lvlm")
    except UserError:
        return {}


async def _gather(model: Any, questions: Sequence[list[BaseMessage]]) -> list[AIMessage | Exception]:
    async def one(messages: list[BaseMessage]) -> AIMessage | Exception:
        try:
            return await model.ainvoke(messages)
        except Exception as error:
            return error

    return await asyncio.gather(*(one(messages) for messages in questions))


def _read(answer: AIMessage | Exception) -> CriticAnswer | None:
    if isinstance(answer, Exception):
        return None
    try:
        json.loads(str(answer.text))
        return read(str(answer.text), CriticAnswer)
    except ValueError:
        return None


def _point(answer: CriticAnswer | None) -> tuple[float, float] | None:
    return None if answer is None else (answer.valence, answer.arousal)


def _expected(answer: AIMessage | Exception) -> tuple[float, float] | None:
    if isinstance(answer, Exception):
        return None
    scores = read_scores(answer)
    return scores["valence"].expected, scores["arousal"].expected


def _accuracy(name: str, points: list[tuple[float, float] | None], cases: list[_Case]) -> dict[str, float]:
    pairs = [
        (p, c.truth) for p, c in zip(points, cases, strict=False) if p is not None and c.truth is not None
    ]
    if not pairs:
        return {}
    return {
        f"{name}_{axis}_error": statistics.fmean(abs(point[i] - truth[i]) for point, truth in pairs)
        for i, axis in enumerate(("valence", "arousal"))
    }


# ---- agreement


async def _agreement(
    chat: VLLMChat, settings: LVLMSettings, questions: list[list[BaseMessage]], answers: list[Any]
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    local = settings.model_copy(update={"engine": "embedded", "max_tokens": chat.max_tokens})
    model: Any = load_lvlm(local)
    try:
        own = await _gather(model.bind(response_format=CRITIQUE), questions)
    finally:
        model.close()
    agree, same, differences = 0, 0, []
    for question, theirs, ours in zip(questions, answers, own, strict=True):
        pair = [_point(_read(theirs)), _point(_read(ours))]
        near = all(pair) and max(abs(a - b) for a, b in zip(*pair, strict=True)) <= 0.05  # pyright: ignore
        agree += bool(near)
        texts = [str(getattr(answer, "text", answer)) for answer in (theirs, ours)]
        same += texts[0] == texts[1]
        if texts[0] != texts[1] and len(differences) < 20:
            margin = await _margin(chat, question, *texts)
            differences.append(
                {"vllm": texts[0], "embedded": texts[1], "agree": bool(near), "margin": margin}
            )
    count = len(questions)
    return {"agreement": agree / count, "same_text": same / count}, differences


async def _margin(chat: VLLMChat, question: list[BaseMessage], theirs: str, ours: str) -> float | None:
    """Log-probability between the two best tokens where the texts part: next to nothing at a near tie."""
    bound = chat.bind(response_format=CRITIQUE, logprobs=True, top_logprobs=5)
    message: Any = await bound.ainvoke(question)
    part = next((i for i, (a, b) in enumerate(zip(theirs, ours, strict=False)) if a != b), 0)
    position = 0
    for token in message.response_metadata["logprobs"]["content"]:
        position += len(token["token"])
        if position > part:
            others = [t["logprob"] for t in token["top_logprobs"] if t["token"] != token["token"]]
            return token["logprob"] - max(others) if others else None
    return None


# ---- prefix cache


async def _hit_rate(
    chat: VLLMChat, prompt: Any, cases: list[_Case], runs: int, candidates: int, image_first: bool
) -> float:
    """Prompt tokens out of the cache, as a share of those that an earlier request of the run or the rubric
    had.

    Runs ask at once; within a run the pictures come together, as in a round.
    """
    nonce = secrets.token_hex(3)  # so that an earlier measurement leaves nothing to find
    bound = chat.bind(max_tokens=2)

    def conversation(run: int, *urls: str) -> list[BaseMessage]:
        case = cases[run]
        system, user = prompt.messages(urls, prompt=f"{case.prompt} {run}", target=target_text(case.target))
        return [SystemMessage(f"{nonce} {system.content}"), user]

    rubric = await _common(chat, conversation(0), conversation(1))
    shareable = rubric * (runs - 1)  # the very first request finds nothing
    tasks = []
    for run in range(runs):
        system, user = conversation(run)
        beginning = [system, HumanMessage([user.content[0], {"type": "text", "text": "zz"}])]
        shareable += await _common(chat, conversation(run), beginning) * (candidates - 1)
        urls = [cases[(run * candidates + index) % len(cases)].url for index in range(candidates)]
        asked = [conversation(run, url) for url in urls]
        tasks.append(_gather(bound, [_turned(messages) for messages in asked] if image_first else asked))
    hits = 0
    for answers in await asyncio.gather(*tasks):
        for answer in answers:
            if isinstance(answer, Exception):
                raise answer
            details: Any = (answer.usage_metadata or {}).get("input_token_details") or {}
            hits += details.get("cache_read", 0)
    return hits / shareable


def _turned(messages: list[BaseMessage]) -> list[BaseMessage]:
    """The same content with the picture before all words."""
    parts = [part for part in messages[1].content if isinstance(part, dict)]
    pictures = [part for part in parts if part["type"] == "image_url"]
    words = [part for part in parts if part["type"] == "text"]
    return [HumanMessage([*pictures, {"type": "text", "text": str(messages[0].content)}, *words])]


async def _common(chat: VLLMChat, first: list[BaseMessage], second: list[BaseMessage]) -> int:
    """Tokens that two conversations begin with."""
    pair = [await _tokens(chat, side) for side in (first, second)]
    return next((i for i, (a, b) in enumerate(zip(*pair, strict=False)) if a != b), min(map(len, pair)))


async def _tokens(chat: VLLMChat, messages: list[BaseMessage]) -> list[int]:
    url = chat.urls[0].removesuffix("/v1") + "/tokenize"
    body = {"messages": to_openai(messages)}
    headers = {"Authorization": f"Bearer {chat.api_key.get_secret_value()}"}
    async with httpx.AsyncClient(trust_env=False, timeout=chat.timeout) as client:
        reply = (await client.post(url, json=body, headers=headers)).raise_for_status()
    return reply.json()["tokens"]


# ---- rates


async def _rates(
    chat: VLLMChat, questions: list[list[BaseMessage]], scores: list[list[BaseMessage]], concurrency: int
) -> dict[str, float]:
    critique, score = chat.bind(response_format=CRITIQUE), score_only(chat)
    seconds = {"one": 0.0, "many": 0.0, "scores": 0.0}
    counts = {"one": 0, "many": 0, "scores": 0}

    async def clock(kind: str, model: Any, asked: list[list[BaseMessage]], at_once: int) -> None:
        slots = asyncio.Semaphore(at_once)

        async def one(messages: list[BaseMessage]) -> None:
            async with slots:
                await model.ainvoke(messages)

        began = time.perf_counter()
        await asyncio.gather(*(one(messages) for messages in asked))
        seconds[kind] += time.perf_counter() - began
        counts[kind] += len(asked)

    await _gather(critique, questions[:concurrency])
    await _gather(score, scores[:concurrency])
    many = 3 * concurrency
    for turn in range(TURNS):
        await clock("one", critique, _slice(questions, turn * 8, 8), 1)
        await clock("many", critique, _slice(questions, turn * many, many), concurrency)
        await clock("scores", score, _slice(scores, turn * many, many), concurrency)
    rate = {kind: counts[kind] / seconds[kind] for kind in seconds}
    return {
        "concurrency_gain": rate["many"] / rate["one"],
        "score_only_gain": rate["scores"] / rate["many"],
        "critiques_per_second": rate["many"],
        "critiques_per_second_alone": rate["one"],
        "scores_per_second": rate["scores"],
    }


def _slice(items: list[Any], start: int, count: int) -> list[Any]:
    return [items[(start + i) % len(items)] for i in range(count)]


def _device(settings: LVLMSettings) -> str:
    """Where the server runs, as far as can be told: this machine's processor, or a GPU's server elsewhere."""
    import os
    import platform

    return f"{platform.machine()}, {os.cpu_count()} cores; server at {redact(settings.base_url)}"
