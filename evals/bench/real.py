"""Models of published sizes with random weights: how much of a device's time is the models', and how much is ours?

`real.yaml` has their configurations; nothing is downloaded. Of a generator: pictures a second of concurrent runs
against the bare pipeline, then steps a second of `opd`, `dpo` and Flow-GRPO on the log that those runs left. Of an
LVLM: critiques a second of our client against plain HTTP to the same vLLM server, which makes the weights up itself.
In the first part a critic that draws its numbers from the picture's bytes takes its place: a random LVLM says nothing.

`size=tiny` is the same by one rule: a quarter of each width, an eighth of each length, two of each depth; and a step
of training takes one picture or pair.
"""

from __future__ import annotations

import asyncio
import gc
import hashlib
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from string import ascii_lowercase
from typing import Any
from unittest.mock import patch

import httpx
import numpy as np
import torch
import yaml
from accelerate import Accelerator
from langchain_core.messages import AIMessage, BaseMessage
from langchain_core.outputs import ChatGeneration, ChatResult
from PIL import Image

from ...agents.critic import Critic
from ...agents.prompt import load_prompt
from ...agents.schemas import CRITIC_SCHEMA, response_format, target_text
from ...domain import EmotionTarget, UserError
from ...rl.config import load_config
from ...rl.distill import distill
from ...rl.online import train as online
from ...settings import GeneratorSettings, LVLMSettings, Settings, load_settings
from ...tools.fingerprint import versions
from ...tools.images.diffusers import DiffusersGenerator
from ...tools.images.pipelines import device_of, dtype_of
from ...tools.lvlm.chat import image_url, to_openai
from ...tools.lvlm.load import load_lvlm
from ...tools.vllm.server import VLLMServer, find_python
from .coalesce import bare_cost, loop_cost
from .fakes import FakeLVLM

_TARGET = EmotionTarget(valence=2.0, arousal=-1.0)

#: Objective → what a step takes, beside its preset; two pictures or pairs at a time.
_STEPS: dict[str, list[str]] = {
    "opd": ["train.batch_size=2", "train.accumulation=1"],
    "dpo": ["train.batch_size=2", "train.accumulation=1"],
    "flow-grpo": [
        "train.batch_size=2", "train.accumulation=2", "train.checkpoint_every=2", "objective.reward=emotion",
        "objective.groups=2", "objective.group=4", "objective.window=1", "objective.updates=2",
    ],
}  # fmt: skip

#: What a step of a tiny model takes instead.
_TINY = {
    "opd": ["train.batch_size=1", "objective.rollout_steps=2", "objective.states=1"],
    "dpo": ["train.batch_size=1"],
    "flow-grpo": ["train.accumulation=1", "objective.group=2", "objective.steps=4"],
}


def main(
    size: str = "full",
    models: str = "sd35-medium,flux-dev,sdxl,qwen25-vl-7b",
    runs: int = 8,
    images: int = 2,
    steps: int = 0,
    updates: int = 6,
    critiques: int = 64,
    seed: int = 0,
) -> dict[str, Any]:
    """Models of published sizes: pictures, critiques and training steps a second, and the models' share.

    Args:
        size: "full", or "tiny" for a CPU.
        models: Names in `real.yaml`, with commas between.
        runs: Concurrent runs of two rounds; some of them have to gain by chance, for there to be pairs to learn from.
        images: Pictures in a round.
        steps: Denoising steps; 0 leaves them to the model.
        updates: Optimizer steps of each objective, an even number; the first two are left out.
        critiques: How many are asked, by each side.
        seed: Of the first run.

    Returns:
        The document with `figures`, MODEL.FIGURE: of a generator images_per_second(_bare), efficiency, images_share,
        OBJECTIVE_steps_per_second, OBJECTIVE_share and, on a GPU, peak_gb; of an LVLM critiques_per_second(_bare),
        efficiency, tokens_per_critique. What could not be measured is left out, and `notes` says why.

    Raises:
        UserError: No such model or size.
    """
    if size not in ("full", "tiny"):
        raise UserError(f"size {size!r}: full or tiny is wanted")
    figures: dict[str, float] = {}
    notes: list[str] = []
    for name in models.split(","):
        entry = _entry(name, size)
        if "pipeline" in entry:
            found = _generator(name, size, runs, images, steps, updates, seed)
        else:
            try:
                found = asyncio.run(_critic(name, entry, size, critiques, seed))
            except UserError as error:
                found, _ = {}, notes.append(f"{name}: {error}")
        figures |= {f"{name}.{key}": value for key, value in found.items()}
    device = device_of("auto")
    about = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device}, {size} models"
    libraries = versions("torch", "diffusers", "transformers", "peft", "accelerate")
    return {"figures": figures, "n": updates, "on": about, "notes": notes, "versions": libraries}


# ---- building


def _entry(name: str, size: str) -> dict[str, Any]:
    tiny = size == "tiny"

    class Reader(yaml.SafeLoader):
        """Numbers as they are, or by the rule of tiny models."""

    def number(loader: Any, node: Any, rule: Callable[[int], int]) -> int:
        value = int(loader.construct_scalar(node))
        return rule(value) if tiny else value

    def layers(loader: Any, node: Any) -> list[int]:
        return [it for it in map(int, loader.construct_sequence(node)) if not tiny or it < 2]

    Reader.add_constructor("!width", partial(number, rule=lambda value: value // 4))
    Reader.add_constructor("!length", partial(number, rule=lambda value: value // 8))
    Reader.add_constructor("!depth", partial(number, rule=lambda value: min(value, 2)))
    Reader.add_constructor("!layers", layers)
    entries = yaml.load(Path(__file__).with_suffix(".yaml").read_text("utf-8"), Reader)
    known = [key for key, it in entries.items() if {"pipeline", "config"} & it.keys()]
    if name not in known:
        raise UserError(f"no model {name!r}; there are {', '.join(known)}")
    return entries[name]


def __getattr__(name: str) -> Any:
    """`sd35_medium_tiny` and the like: what makes a generator of settings, as `generator.model` names it."""
    model, _, size = name.rpartition("_")
    if size not in ("full", "tiny"):
        raise AttributeError(name)
    return partial(_build, model.replace("_", "-"), size)


def _model(name: str, size: str) -> str:
    return f"{__name__}:{name.replace('-', '_')}_{size}"


def _build(name: str, size: str, settings: GeneratorSettings) -> DiffusersGenerator:
    import diffusers
    import transformers

    entry, device = _entry(name, size), device_of(settings.device)
    dtype, before = dtype_of(settings.dtype, device), torch.get_default_dtype()
    parts: dict[str, Any] = {}
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            for part, spec in entry["components"].items():
                config = {key: value for key, value in spec.items() if key != "class"}
                kind = getattr(diffusers, spec["class"], None)
                if kind is not None:
                    parts[part] = kind.from_config(config)
                else:
                    kind = getattr(transformers, spec["class"])
                    parts[part] = kind(kind.config_class(**config))
                    parts[part.replace("text_encoder", "tokenizer")] = _tokenizer(kind, entry)
    finally:
        torch.set_default_dtype(before)
    more = {"add_watermarker": False} if name == "sdxl" else {}
    pipe = getattr(diffusers, entry["pipeline"])(**parts, **more).to(device)
    for component in pipe.components.values():
        if isinstance(component, torch.nn.Module):
            component.register_forward_pre_hook(lambda *_: CLOCK.start())
            component.register_forward_hook(lambda *_: CLOCK.stop(), always_call=True)
    pipe.vae.decode, pipe.vae.encode = CLOCK.timed(pipe.vae.decode), CLOCK.timed(pipe.vae.encode)
    return DiffusersGenerator(pipe, settings, model=_model(name, size), defaults=entry["defaults"])


def _tokenizer(encoder: type, entry: dict[str, Any]) -> Any:
    """Letters as tokens: what a text encoder takes as long as a real one's."""
    from transformers import CLIPTokenizer, T5Tokenizer

    if encoder.__name__.startswith("T5"):
        pieces = [
            ("<pad>", 0.0),
            ("</s>", 0.0),
            ("<unk>", 0.0),
            ("▁", -2.0),
            *((it, -3.0) for it in ascii_lowercase),
        ]
        return T5Tokenizer(
            vocab=pieces, extra_ids=0, model_max_length=entry["defaults"]["call"]["max_sequence_length"]
        )
    letters = [*ascii_lowercase, *(f"{letter}</w>" for letter in ascii_lowercase)]
    vocabulary = {letter: number for number, letter in enumerate(letters)}
    vocabulary |= {"<|startoftext|>": 49406, "<|endoftext|>": 49407}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=77)


class _Clock:
    """Seconds inside models, each second once though models call models."""

    def __init__(self) -> None:
        self.seconds, self._depth, self._since = 0.0, 0, 0.0

    def start(self) -> None:
        """A model begins."""
        self._depth += 1
        if self._depth == 1:
            self._since = _now()

    def stop(self) -> None:
        """It ends."""
        self._depth -= 1
        if self._depth == 0:
            self.seconds += _now() - self._since

    def timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, inside."""

        def inside(*args: Any, **kwargs: Any) -> Any:
            self.start()
            try:
                return function(*args, **kwargs)
            finally:
                self.stop()

        return inside

    @contextmanager
    def share(self) -> Iterator[list[float]]:
        """Wall seconds, and those of them inside models."""
        began, before, found = _now(), self.seconds, list[float]()
        yield found
        found += [_now() - began, self.seconds - before]


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


CLOCK = _Clock()


# ---- generators


class _Drawn(FakeLVLM):
    """A critic whose numbers come from the picture's bytes, and the rewriter of other benches."""

    def close(self) -> None:
        """As our own engines have it."""

    def _generate(self, messages: list[BaseMessage], *args: Any, **kwargs: Any) -> ChatResult:
        content: Any = messages[-1].content
        picture = [
            it["image_url"]["url"] for it in content if isinstance(it, dict) and it["type"] == "image_url"
        ]
        if not picture:
            return super()._generate(messages, *args, **kwargs)
        valence, arousal = (byte % 31 / 10 for byte in hashlib.sha256(picture[0].encode()).digest()[:2])
        answer = {"analysis": "noise", "valence": f"{valence:+.1f}", "arousal": f"{-arousal:+.1f}", "category": "awe",
                  "alignment": "0.8", "suggestion": "more light"}  # fmt: skip
        return ChatResult(generations=[ChatGeneration(message=AIMessage(json.dumps(answer)))])


def _generator(
    name: str, size: str, runs: int, images: int, steps: int, updates: int, seed: int
) -> dict[str, float]:
    settings = GeneratorSettings(model=_model(name, size), steps=steps or None)
    with tempfile.TemporaryDirectory(prefix="emoloop-real-") as folder:
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        figures = _pictures(_build(name, size, settings), folder, runs, images, seed)
        gc.collect()
        for objective, sets in _STEPS.items():
            if objective == "flow-grpo" and name == "sdxl":  # no flow
                continue
            words = [
                *sets,
                f"train.steps={updates}",
                "train.tensorboard=false",
                "guard.every=0",
                "data.held_out=0",
            ]
            if not torch.cuda.is_available():
                words.append("train.precision=fp32")
            if size == "tiny":
                words += _TINY.get(objective, [])
            home = load_settings({"home": folder, "generator": {"model": settings.model}})
            figures |= _training(objective, name, words, home, Path(folder) / objective)
            gc.collect()
        if torch.cuda.is_available():
            figures["peak_gb"] = torch.cuda.max_memory_allocated() / 2**30
    return figures


def _pictures(generator: Any, home: str, runs: int, images: int, seed: int) -> dict[str, float]:
    count, batch = runs * images * 2, generator.micro_batch
    bare_cost(generator, batch, batch)  # whatever is made on the first call
    bare, _ = bare_cost(generator, count, batch)
    with CLOCK.share() as spent:
        ours, _ = asyncio.run(loop_cost(generator, home, runs, images, 2, seed, _Drawn()))
    asyncio.run(generator.aclose())
    return {
        "images_per_second": count / ours,
        "images_per_second_bare": count / bare,
        "efficiency": bare / ours,
        "images_share": spent[1] / ours,
        "micro_batch": float(generator.micro_batch),
    }


def _training(
    objective: str, preset: str, sets: list[str], settings: Settings, out: Path
) -> dict[str, float]:
    config = load_config(objective, preset, sets=sets)
    marks: list[tuple[float, float]] = []

    def watch(step: int, steps: int, figures: dict[str, float]) -> None:
        marks.append((_now(), CLOCK.seconds))

    requests = [(prompt, _TARGET) for prompt in ("a dog by the sea", "a house", "a boat in the snow")]
    with (
        patch.object(Accelerator, "backward", CLOCK.timed(Accelerator.backward)),
        patch.object(online, "load_lvlm", lambda settings: _Drawn()),
    ):
        if objective == "flow-grpo":
            online.train_flow_grpo(settings, config, out, requests, watch=watch, warn=lambda note: None)
        else:
            distill(settings, config, out, watch=watch, warn=lambda note: None)
    # The first two fill caches, and are one collection.
    (began, inside), (ended, inside_then) = marks[1], marks[-1]
    key = objective.replace("-", "_")
    return {
        f"{key}_steps_per_second": (len(marks) - 2) / (ended - began),
        f"{key}_share": (inside_then - inside) / (ended - began),
    }


# ---- LVLMs


async def _critic(name: str, entry: dict[str, Any], size: str, count: int, seed: int) -> dict[str, float]:
    python = find_python(load_settings().lvlm.vllm_python)
    with tempfile.TemporaryDirectory(prefix="emoloop-real-") as folder:
        model = _lvlm_folder(Path(folder) / name, entry["config"])
        server = VLLMServer(
            str(model), python=python, log=Path(folder) / "log", extra=["--load-format", "dummy"]
        )
        try:
            await asyncio.to_thread(server.start)
            return await _critiques(server, size, count, seed)
        finally:
            await asyncio.to_thread(server.stop)


async def _critiques(server: VLLMServer, size: str, count: int, seed: int) -> dict[str, float]:
    pixels = 128 if size == "tiny" else 512
    # Tokens of random words are short, and an answer that is cut is asked for again.
    settings = LVLMSettings(engine="vllm", model=server.model, base_url=server.url, max_tokens=2048)
    chat: Any = await asyncio.to_thread(load_lvlm, settings)
    critic, client = Critic(chat, "critic"), httpx.AsyncClient(timeout=600, trust_env=False)
    rng = np.random.default_rng(seed)

    def pictures() -> list[Image.Image]:
        spots = rng.integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)
        return [Image.fromarray(it).resize((pixels, pixels)) for it in spots]

    slots = asyncio.Semaphore(settings.concurrency)

    async def bare(picture: Image.Image) -> int:
        messages = load_prompt("critic").messages(
            (image_url(picture),), prompt="a dog", target=target_text(_TARGET)
        )
        body = {
            "model": server.model, "messages": to_openai(messages), "temperature": 0, "max_tokens": 2048,
            "response_format": response_format("critique", CRITIC_SCHEMA),
        }  # fmt: skip
        async with slots:
            reply = await client.post(f"{server.url}/chat/completions", json=body)
        return reply.raise_for_status().json()["usage"]["completion_tokens"]

    async def ours(picture: Image.Image) -> int:
        return (await critic.read(picture, "a dog", _TARGET)).usage.get("output_tokens", 0)

    sides, rates = {"": ours, "_bare": bare}, dict[str, list[float]]()
    tokens: list[int] = []
    try:
        for turn, (side, ask) in itertools.product(range(3), sides.items()):
            asked, began = pictures(), time.perf_counter()
            tokens += await asyncio.gather(*map(ask, asked))
            if turn:  # the first fills caches
                rates.setdefault(side, []).append(count / (time.perf_counter() - began))
    finally:
        await client.aclose()
        await asyncio.to_thread(chat.close)
    rate = {f"critiques_per_second{side}": statistics.median(values) for side, values in rates.items()}
    efficiency = rate["critiques_per_second"] / rate["critiques_per_second_bare"]
    return {**rate, "efficiency": efficiency, "tokens_per_critique": statistics.fmean(tokens)}


def _lvlm_folder(folder: Path, config: dict[str, Any]) -> Path:
    """Configuration, processor, and a tokenizer learned from the agents' prompts; the server makes the weights up."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    specials = {
        "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "image_token": "<|image_pad|>",
        "video_token": "<|video_pad|>", "vision_start_token": "<|vision_start|>", "vision_end_token": "<|vision_end|>",
    }  # fmt: skip
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    prompts = Path(__file__).parents[2] / "agents" / "prompts"
    trainer = trainers.BpeTrainer(
        vocab_size=8192, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
        special_tokens=[AddedToken(it, special=True) for it in (*specials.values(), "<|im_start|>")],
    )  # fmt: skip
    tokenizer.train([str(path) for path in sorted(prompts.glob("*.yaml"))], trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=specials["eos_token"], pad_token=specials["pad_token"],
        model_max_length=32768, clean_up_tokenization_spaces=False,
    )  # fmt: skip
    fast.chat_template = _TEMPLATE
    fast.save_pretrained(folder)
    ids = {f"{key}_id": tokenizer.token_to_id(token) for key, token in specials.items()}
    ids["bos_token_id"] = ids["pad_token_id"]
    (folder / "config.json").write_text(json.dumps({**config, **ids}))
    processor = {
        "image_processor_type": "Qwen2VLImageProcessor", "processor_class": "Qwen2_5_VLProcessor", "patch_size": 14,
        "temporal_patch_size": 2, "merge_size": 2, "min_pixels": 3136, "max_pixels": 12845056,
        "image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711],
    }  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    (folder / "chat_template.jinja").write_text(_TEMPLATE)
    return folder


_TEMPLATE = (
    "{%- for m in messages -%}<|im_start|>{{ m.role }}\n"
    "{%- if m.content is string -%}{{ m.content }}"
    "{%- else -%}{%- for p in m.content -%}{%- if p.type == 'text' -%}{{ p.text }}"
    "{%- else -%}<|vision_start|><|image_pad|><|vision_end|>{%- endif -%}{%- endfor -%}{%- endif -%}"
    "<|im_end|>\n{%- endfor -%}{%- if add_generation_prompt -%}<|im_start|>assistant\n{%- endif -%}"
)
