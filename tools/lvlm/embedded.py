"""An LVLM inside this process: a LangChain chat model over any transformers image-text-to-text folder.

Concurrent calls coalesce into batches on one worker thread, since the loop asks for eight critiques at once
and one forward pass over eight rows costs little more than over one. The decoder is constrained by the JSON
schema of the request (llguidance, the engine that vLLM's "guidance" backend uses too), so an answer always
parses and both engines write the same text. A request's randomness is its own, drawn from its seed: company
never changes an answer.
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import llguidance
import llguidance.hf
import llguidance.numpy  # not llguidance.torch, which loads torch's compiler
import numpy as np
import torch
from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import BaseMessage
from langchain_core.outputs import ChatResult
from PIL import Image
from pydantic import ConfigDict, Field, PrivateAttr
from transformers import AutoModelForImageTextToText, AutoProcessor, GenerationConfig
from transformers.generation.logits_process import LogitsProcessor, LogitsProcessorList
from transformers.generation.stopping_criteria import StoppingCriteria, StoppingCriteriaList
from transformers.utils import logging as hf_logging

from ...domain import UserError
from ..images.batching import BatchWorker
from ..threads import set_threads_here
from .chat import continues, image_from_url, to_openai, to_result, with_layout


@dataclass
class _Request:
    messages: list[dict[str, Any]]
    images: list[Image.Image]
    continues: bool
    grammar: str | None
    temperature: float
    seed: int | None
    max_tokens: int
    logprobs: int | None


class EmbeddedLVLM(BaseChatModel):
    """A chat model that runs in this process.

    Understands, by `.bind(...)` or per call: `response_format` ({"type": "json_schema", ...}), `temperature`,
    `seed`, `max_tokens`, `structured_outputs` ({"regex": ...}, as vLLM has it), and `logprobs=True` with
    `top_logprobs=n`. A chat that ends with an AIMessage is continued. With a grammar, `max_tokens` is where free
    text is cut short: the answer is then closed at once, so that it still parses.

    Attributes:
        model: Folder (or hub id) of an image-text-to-text model with processor and chat template.
        temperature: 0 is greedy.
        max_tokens: Length limit of an answer.
        batch_size: Rows of a forward pass at most.
        window_ms: How long a request waits for company, in milliseconds. A round's critiques come one after another
            from their threads, and a batch that leaves without some of them costs as much again.
        device: "auto" is cuda, then mps, then cpu.
        dtype: "auto" is bfloat16 on cuda, float32 elsewhere.
        threads: CPU threads of a forward pass; None is torch's number. A model of a few million weights does best
            with 1: waking a second thread takes longer than what it is woken for.
    """

    model_config = ConfigDict(extra="forbid", arbitrary_types_allowed=True)

    model: str
    temperature: float = Field(default=0.0, ge=0)
    max_tokens: int = Field(default=512, ge=1)
    batch_size: int = Field(default=8, ge=1)
    window_ms: float = Field(default=20.0, ge=0)
    device: str = "auto"
    dtype: str = "auto"
    threads: int | None = Field(default=None, ge=1)

    _engine: _Engine | None = PrivateAttr(default=None)
    _lock: threading.Lock = PrivateAttr(default_factory=threading.Lock)

    @property
    def _llm_type(self) -> str:
        return "emoloop-embedded"

    @property
    def _identifying_params(self) -> dict[str, Any]:
        return {"model": self.model, "temperature": self.temperature, "max_tokens": self.max_tokens}

    def close(self) -> None:
        """Finish the batch that is running and free the model; the next call loads it again."""
        with self._lock:
            engine, self._engine = self._engine, None
        if engine is not None:
            engine.worker.close()

    def _submit(self, messages: list[BaseMessage], **kwargs: Any) -> Future[ChatResult]:
        response_format = with_layout(kwargs.get("response_format"))
        kind = (response_format or {}).get("type", "text")
        if kind not in ("text", "json_object", "json_schema"):
            raise ValueError(f"response_format {kind!r} is not known here; json_schema is")
        grammar = None
        if response_format and kind == "json_schema":
            schema = json.dumps(response_format["json_schema"]["schema"])
            grammar = llguidance.LLMatcher.grammar_from_json_schema(schema)
        elif kind == "json_object":
            grammar = llguidance.LLMatcher.grammar_from_json_schema('{"type": "object"}')
        elif structured := kwargs.get("structured_outputs"):
            grammar = llguidance.LLMatcher.grammar_from_regex(structured["regex"])
        prompt, images = _split_images(to_openai(messages))
        temperature = kwargs.get("temperature")
        request = _Request(
            messages=prompt,
            images=images,
            continues=continues(messages),
            grammar=grammar,
            temperature=self.temperature if temperature is None else float(temperature),
            seed=kwargs.get("seed"),
            max_tokens=int(kwargs.get("max_tokens") or self.max_tokens),
            logprobs=int(kwargs.get("top_logprobs") or 0) if kwargs.get("logprobs") else None,
        )
        with self._lock:
            if self._engine is None:
                load = partial(_Decoder, self.model, self.device, self.dtype)
                self._engine = _Engine(load, self.batch_size, self.window_ms / 1000, self.threads)
            return self._engine.worker.submit([request])[0]

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        return self._submit(messages, **kwargs).result()

    async def _agenerate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        # Decoding images and rendering the request is work: off the event loop, like everything that is.
        answer = await asyncio.to_thread(self._submit, messages, **kwargs)
        return await asyncio.wrap_future(answer)


def _split_images(messages: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[Image.Image]]:
    images: list[Image.Image] = []

    def part(block: dict[str, Any]) -> dict[str, Any]:
        if block["type"] == "image_url":
            images.append(image_from_url(block["image_url"]["url"]))
            return {"type": "image"}
        if block["type"] != "text":
            raise ValueError(f"a message part of type {block['type']!r}: text and image_url are known")
        return block

    rendered = [{**message, "content": [part(block) for block in message["content"]]} for message in messages]
    return rendered, images


class _Engine:
    """The model behind one worker thread; it loads with the first batch."""

    def __init__(self, load: Callable[[], _Decoder], batch_size: int, window: float, threads: int | None):
        self._load, self._decoder, self._threads = load, None, threads
        self.worker: BatchWorker[_Request, ChatResult] = BatchWorker(
            self._run,
            size=batch_size,
            window=window,
            key=lambda request: len(request.images),  # so that pixels stack without padding
            name="emoloop-lvlm",
        )

    def _run(self, requests: list[_Request]) -> Sequence[ChatResult | Exception]:
        if self._decoder is None:
            if self._threads:
                set_threads_here(self._threads)
            self._decoder = self._load()
        try:
            return self._decoder(requests)
        except Exception as error:
            if len(requests) == 1:
                return [error]
            # One bad request must not take its company with it.
            return [self._run([request])[0] for request in requests]


class _Decoder:
    """Model, processor and grammars; turns a batch of requests into answers."""

    def __init__(self, model: str, device: str, dtype: str):
        self.name = model
        if device == "auto":
            device = (
                "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
            )
        if dtype == "auto":
            dtype = "bfloat16" if device == "cuda" else "float32"
        # "Loading weights: 100 %" is noise among the loop's own progress.
        noisy = hf_logging.is_progress_bar_enabled()
        hf_logging.disable_progress_bar()
        try:
            self.processor = AutoProcessor.from_pretrained(model)
            loaded: Any = AutoModelForImageTextToText.from_pretrained(model, dtype=getattr(torch, dtype))
        finally:
            if noisy:
                hf_logging.enable_progress_bar()
        self.tokenizer = self.processor.tokenizer
        self.tokenizer.padding_side = "left"
        self.model: Any = loaded.eval().requires_grad_(False).to(device)
        stops = self.model.generation_config.eos_token_id
        self.stops = set(stops if isinstance(stops, list) else [stops]) - {None} or {
            self.tokenizer.eos_token_id
        }
        self.vocabulary = self.model.get_output_embeddings().weight.shape[0]
        self.grammar_tokens = llguidance.hf.from_tokenizer(
            self.tokenizer, n_vocab=self.vocabulary, eos_token=sorted(self.stops)
        )
        self.grammars: dict[str, llguidance.LLMatcher] = {}
        self.bytes = [self.grammar_tokens.decode_bytes([token]) for token in range(len(self.tokenizer))]
        #: Tokens that end a JSON string.
        self.closing = np.zeros(self.vocabulary, dtype=bool)
        self.closing[: len(self.bytes)] = [token.startswith(b'"') for token in self.bytes]

    def matcher(self, grammar: str) -> llguidance.LLMatcher:
        """A fresh matcher; compiling happens once per grammar."""
        if grammar not in self.grammars:
            matcher = llguidance.LLMatcher(self.grammar_tokens, grammar, log_level=0)
            if matcher.is_error():
                raise ValueError(f"the response schema cannot be used: {matcher.get_error()}")
            self.grammars[grammar] = matcher
        return self.grammars[grammar].deep_copy()

    @torch.inference_mode()
    def __call__(self, requests: Sequence[_Request]) -> list[ChatResult]:
        prompts = [
            self.processor.apply_chat_template(
                request.messages,
                add_generation_prompt=not request.continues,
                continue_final_message=request.continues,
                tokenize=False,
            )
            for request in requests
        ]
        images = [request.images for request in requests] if requests[0].images else None
        inputs = self.processor(text=prompts, images=images, padding=True, return_tensors="pt").to(
            self.model.device
        )
        rows = [_Row(self, request) for request in requests]
        referee = _Referee(self, rows)
        pad = self.tokenizer.pad_token_id
        self.model.generate(
            **inputs,
            generation_config=GenerationConfig(
                do_sample=False,
                max_new_tokens=max(row.hard_limit for row in rows),
                pad_token_id=pad if pad is not None else min(self.stops),
                eos_token_id=None,
            ),
            logits_processor=LogitsProcessorList([referee]),
            stopping_criteria=StoppingCriteriaList([_AllDone(rows)]),
        )
        lengths = inputs["attention_mask"].sum(dim=1).tolist()
        return [row.result(length) for row, length in zip(rows, lengths, strict=True)]


class _Row:
    """One request while it is decoded."""

    #: Tokens that a closing answer may take beyond its limit: what the numbers and keys of a flat schema
    #: need.
    SLACK = 256

    def __init__(self, decoder: _Decoder, request: _Request):
        self.decoder, self.request = decoder, request
        self.matcher = decoder.matcher(request.grammar) if request.grammar else None
        self.hard_limit = request.max_tokens + (self.SLACK if self.matcher else 0)
        self.tokens: list[int] = []
        self.logprobs: list[dict[str, Any]] = []
        self.finish_reason: str | None = None
        self.random = np.random.default_rng(request.seed)

    def choose(self, logits: np.ndarray, allowed: np.ndarray) -> int:
        """The next token.

        Args:
            logits: The model's, shape (vocabulary,), float32.
            allowed: What the grammar lets through, shape (vocabulary,), bool.
        """
        if self.matcher and len(self.tokens) >= self.request.max_tokens:
            closing = allowed & self.decoder.closing
            allowed = closing if closing.any() else allowed
        permitted = np.where(allowed, logits, -np.inf)
        if self.request.temperature == 0:
            token = int(permitted.argmax())
        else:
            scaled = permitted.astype(np.float64) / self.request.temperature
            chances = np.exp(scaled - scaled.max()).cumsum()
            token = int(np.searchsorted(chances, self.random.random() * chances[-1], side="right"))
        if self.request.logprobs is not None and token not in self.decoder.stops:
            self.logprobs.append(self._report(logits, token))
        self._take(token)
        return token

    def _take(self, token: int) -> None:
        if token in self.decoder.stops:
            self.finish_reason = "stop"
            return
        self.tokens.append(token)
        if self.matcher:
            self.matcher.consume_token(token)
            if self.matcher.is_stopped():  # the grammar allows nothing more: no step for the end token
                self.finish_reason = "stop"
        if not self.finish_reason and len(self.tokens) >= self.hard_limit:
            self.finish_reason = "length"

    def _report(self, logits: np.ndarray, token: int) -> dict[str, Any]:
        # The model's own distribution, before grammar and temperature: what vLLM reports.
        wide = logits.astype(np.float64)
        wide -= wide.max()
        values = wide - np.log(np.exp(wide).sum())

        def entry(index: int) -> dict[str, Any]:
            data = self.decoder.bytes[index] if index < len(self.decoder.bytes) else b""
            return {
                "token": data.decode(errors="replace"),
                "bytes": list(data),
                "logprob": float(values[index]),
            }

        count = self.request.logprobs or 0
        top = np.argsort(-values, kind="stable")[:count]
        return {**entry(token), "top_logprobs": [entry(int(index)) for index in top]}

    def result(self, prompt_tokens: int) -> ChatResult:
        return to_result(
            self.decoder.tokenizer.decode(self.tokens, skip_special_tokens=True),
            model=self.decoder.name,
            finish_reason=self.finish_reason or "length",
            prompt_tokens=int(prompt_tokens),
            answer_tokens=len(self.tokens),
            logprobs=self.logprobs if self.request.logprobs is not None else None,
        )


class _Referee(LogitsProcessor):
    """Chooses every row's next token itself and leaves `generate` no choice.

    So grammar, temperature and seed belong to the row, and `generate` keeps what it is good at: caches,
    position ids and left padding of whatever architecture the folder holds.
    """

    def __init__(self, decoder: _Decoder, rows: list[_Row]):
        self.decoder, self.rows = decoder, rows
        self.mask = llguidance.numpy.allocate_token_bitmask(len(rows), decoder.vocabulary)
        self.known = np.arange(decoder.vocabulary) < len(
            decoder.bytes
        )  # embeddings are padded beyond the tokenizer

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        for index, row in enumerate(self.rows):
            if row.matcher and not row.finish_reason:
                llguidance.numpy.fill_next_token_bitmask(row.matcher, self.mask, index)
        bits = np.unpackbits(self.mask.view(np.uint8), axis=1, bitorder="little").astype(bool)
        allowed = bits[:, : self.decoder.vocabulary] & self.known
        logits = scores.float().cpu().numpy()
        chosen = torch.full_like(scores, -torch.inf)
        for index, row in enumerate(self.rows):
            chosen[index, 0 if row.finish_reason else row.choose(logits[index], allowed[index])] = 0
        return chosen


class _AllDone(StoppingCriteria):
    """Ends `generate` when every row has its answer; the rows know, not the end token."""

    def __init__(self, rows: list[_Row]):
        self.rows = rows

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> Any:
        done = [row.finish_reason is not None for row in self.rows]
        return torch.tensor(done, device=input_ids.device)


def check_folder(model: str | Path) -> None:
    """Refuse a folder that holds no image-text-to-text model, before anything heavy is loaded.

    Raises:
        UserError: No config, or one of another kind of model.
    """
    config = Path(model) / "config.json"
    if not config.is_file():
        raise UserError(f"{model} holds no config.json: an LVLM is a transformers folder such as Idefics3's")
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    kind = json.loads(config.read_text(encoding="utf-8")).get("model_type")
    if kind not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        raise UserError(f"{model} holds a {kind!r} model: the critic needs one that takes images and text")
