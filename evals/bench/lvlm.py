"""Measures a running vLLM server as an engine for critic and rewriter.

`valid_json` and `agreement` ask n critiques over HTTP and again from the embedded engine on the same
weights, greedy. The prefix cache is measured with the long rubric, as many runs ask at once, once in our
order and once with the picture first. The rates compare the same server with itself, in turns, so that a
busy machine cancels out.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import secrets
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import numpy as np
from langchain_core.messages import BaseMessage, HumanMessage, SystemMessage
from PIL import Image

from ...agents.ask import read
from ...agents.prompt import load_prompt
from ...agents.schemas import CRITIC_SCHEMA, CriticAnswer, response_format, target_text
from ...domain import EmotionTarget, UserError
from ...miniature import law, world
from ...settings import LVLMSettings, load_settings
from ...tools import presets
from ...tools.lvlm.chat import image_url, to_openai
from ...tools.lvlm.load import load_lvlm
from ...tools.lvlm.scores import read_scores, score_only
from ...tools.lvlm.vllm import VLLMChat
from ...tools.urls import public

CRITIQUE = response_format("critique", CRITIC_SCHEMA)

#: Conversations; chat models take them as one union type, other runnables as another.
Questions = list[Any]

#: Repetitions of each rate, in turns.
TURNS = 3


async def main(
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
    name = (
        prompt
        or settings.critic_prompt
        or presets.defaults_if_known(settings.model, "lvlm").get("critic_prompt", "critic")
    )
    critic, rubric = load_prompt(name), load_prompt("critic")
    cases = _cases(max(n, runs * candidates), images, seed)
    chat: Any = await asyncio.to_thread(load_lvlm, settings)
    assert isinstance(chat, VLLMChat)
    try:
        questions: Questions = [case.ask(critic) for case in cases]
        answers = await chat.bind(response_format=CRITIQUE).abatch(questions[:n], return_exceptions=True)
        points = [_point(answer) for answer in answers]
        figures = {"valid_json": statistics.fmean(point is not None for point in points)}
        differences: list[dict[str, Any]] = []
        if embedded:
            agreement, differences = await _agreement(chat, settings, questions[:n], answers)
            figures |= agreement
        figures |= _accuracy("critique", points, cases)

        rate = "prefix_hit_rate"
        figures[rate] = await _hit_rate(chat, rubric, cases, runs, candidates, False)
        figures[f"{rate}_image_first"] = await _hit_rate(chat, rubric, cases, runs, candidates, True)
        if name != "critic":
            own = await _hit_rate(chat, critic, cases, runs, candidates, False)
            figures[f"{rate}_{name.replace('-', '_')}"] = own

        scorer = load_prompt("score-compact" if name.endswith("-compact") else "score")
        scores: Questions = [case.ask(scorer) for case in cases]
        figures |= await _rates(chat, questions, scores, concurrency)
        scored = await score_only(chat).abatch(scores[:n], return_exceptions=True)
        figures |= _accuracy("score", [_expected(answer) for answer in scored], cases)
    finally:
        await asyncio.to_thread(chat.close)
    return {
        "figures": figures,
        "n": n,
        "prompt": critic.id,
        "differences": differences,
        "lvlm": public(settings.model_dump(mode="json")),
    }


# ---- cases


class _Case(NamedTuple):
    """A picture as a data URL with a prompt, a target and, for a drawn scene, its true point."""

    url: str
    prompt: str
    target: EmotionTarget
    truth: tuple[float, float] | None = None

    def ask(self, prompt: Any) -> list[BaseMessage]:
        """The question about the picture."""
        return prompt.messages((self.url,), prompt=self.prompt, target=target_text(self.target))


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
        return [_Case(image_url(Image.open(it)), it.stem.replace("_", " "), target()) for it in chosen]
    cases = []
    for _ in range(count):
        scene = world.sample_scene(rng)
        pixels = world.render(scene)
        caption = world.caption(rng, scene, world.sample_named(rng, scene))
        truth = law.affect(scene, pixels)
        cases.append(_Case(image_url(Image.fromarray(pixels)), caption, target(), truth))
    return cases


def _point(answer: BaseMessage | Exception) -> tuple[float, float] | None:
    """The numbers of a critique; None where the answer is none."""
    if isinstance(answer, Exception):
        return None
    try:
        json.loads(str(answer.text))
        critique = read(str(answer.text), CriticAnswer)
    except ValueError:
        return None
    return critique.valence, critique.arousal


def _expected(answer: BaseMessage | Exception) -> tuple[float, float] | None:
    """The numbers of a score-only answer; None where there is no answer."""
    if isinstance(answer, Exception):
        return None
    scores = read_scores(answer)
    return scores["valence"].expected, scores["arousal"].expected


def _accuracy(
    name: str, points: Sequence[tuple[float, float] | None], cases: Sequence[_Case]
) -> dict[str, float]:
    off = [np.abs(np.subtract(p, c.truth)) for p, c in zip(points, cases, strict=False) if p and c.truth]
    if not off:
        return {}
    return {
        f"{name}_{axis}_error": float(np.mean(off, 0)[i]) for i, axis in enumerate(("valence", "arousal"))
    }


# ---- agreement


async def _agreement(
    chat: VLLMChat, settings: LVLMSettings, questions: Questions, answers: list[Any]
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    local = settings.model_copy(update={"engine": "embedded", "max_tokens": chat.max_tokens})
    model: Any = load_lvlm(local)
    try:
        own = await model.bind(response_format=CRITIQUE).abatch(questions, return_exceptions=True)
    finally:
        model.close()
    agree, same, differences = 0, 0, []
    for question, theirs, ours in zip(questions, answers, own, strict=True):
        a, b = _point(theirs), _point(ours)
        near = bool(a and b and np.abs(np.subtract(a, b)).max() <= 0.05)
        agree += near
        texts = [str(getattr(answer, "text", answer)) for answer in (theirs, ours)]
        same += texts[0] == texts[1]
        if texts[0] != texts[1] and len(differences) < 20:
            margin = await _margin(chat, question, *texts)
            differences.append({"vllm": texts[0], "embedded": texts[1], "agree": near, "margin": margin})
    count = len(questions)
    return {"agreement": agree / count, "same_text": same / count}, differences


async def _margin(chat: VLLMChat, question: list[BaseMessage], theirs: str, ours: str) -> float | None:
    """Difference of log-probability between the two best tokens where the texts differ first; near 0 at a tie."""
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
    """Prompt tokens out of the cache, as a share of those that an earlier request had as well.

    Runs ask at once; within a run the pictures come together, as in a round.
    """
    nonce = secrets.token_hex(3)  # an earlier measurement must not have filled the cache
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
        words: Any = user.content
        beginning = [system, HumanMessage([words[0], {"type": "text", "text": "zz"}])]
        shareable += await _common(chat, conversation(run), beginning) * (candidates - 1)
        pictures = (cases[(run * candidates + index) % len(cases)].url for index in range(candidates))
        chats = (conversation(run, url) for url in pictures)
        tasks.append(bound.abatch([_turned(chat) if image_first else chat for chat in chats]))
    hits = 0
    for answer in itertools.chain(*await asyncio.gather(*tasks)):
        details: Any = (getattr(answer, "usage_metadata", None) or {}).get("input_token_details") or {}
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
    pairs = zip(await _tokens(chat, first), await _tokens(chat, second), strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


async def _tokens(chat: VLLMChat, messages: list[BaseMessage]) -> list[int]:
    url = chat.urls[0].removesuffix("/v1") + "/tokenize"
    body = {"messages": to_openai(messages)}
    headers = {"Authorization": f"Bearer {chat.api_key.get_secret_value()}"}
    async with httpx.AsyncClient(trust_env=False, timeout=chat.timeout) as client:
        reply = (await client.post(url, json=body, headers=headers)).raise_for_status()
    return reply.json()["tokens"]


# ---- rates


async def _rates(
    chat: VLLMChat, questions: Questions, scores: Questions, concurrency: int
) -> dict[str, float]:
    critique, score = chat.bind(response_format=CRITIQUE), score_only(chat)
    many = 3 * concurrency
    #: Kind of rate → what is asked, of what, how often in a turn, how many at a time.
    plan: dict[str, tuple[Any, Questions, int, int]] = {
        "one": (critique, questions, 8, 1),
        "many": (critique, questions, many, concurrency),
        "scores": (score, scores, many, concurrency),
    }
    seconds = dict.fromkeys(plan, 0.0)
    for model, items in ((critique, questions), (score, scores)):
        await model.abatch(items[:concurrency], return_exceptions=True)
    for turn in range(TURNS):
        for kind, (model, items, count, at_once) in plan.items():
            asked = [items[(turn * count + i) % len(items)] for i in range(count)]
            began = time.perf_counter()
            await model.abatch(asked, {"max_concurrency": at_once})
            seconds[kind] += time.perf_counter() - began
    rate = {kind: TURNS * count / seconds[kind] for kind, (_, _, count, _) in plan.items()}
    return {
        "concurrency_gain": rate["many"] / rate["one"],
        "score_only_gain": rate["scores"] / rate["many"],
        "critiques_per_second": rate["many"],
        "critiques_per_second_alone": rate["one"],
        "scores_per_second": rate["scores"],
    }
