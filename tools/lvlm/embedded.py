"""An LVLM inside this process: a LangChain chat model over any transformers image-text-to-text folder.

Concurrent calls coalesce into batches on one worker thread, since the loop asks for eight critiques at once
and one forward pass over eight rows costs little more than over one. The decoder is constrained by the JSON
schema of the request (llguidance, the engine that vLLM's "guidance" backend uses too), so an answer always
parses and both engines write the same text. A request's randomness is its own, drawn from its seed: company
never changes an answer.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, ClassVar

import llguidance
import llguidance.hf
import llguidance.numpy  # not llguidance.torch, which loads torch's compiler
import numpy as np
import torch
from langchain_core.messages import AIMessage, BaseMessage
from langchain_core.outputs import ChatResult
from PIL import Image
from pydantic import Field, PrivateAttr
from transformers import AutoModelForImageTextToText, AutoProcessor, GenerationConfig, PretrainedConfig
from transformers.generation.logits_process import LogitsProcessor, LogitsProcessorList
from transformers.generation.stopping_criteria import StoppingCriteriaList
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
from transformers.utils import logging as hf_logging

from ...domain import UserError
from ..images.batching import BatchWorker
from ..threads import set_threads_here
from .chat import LocalChat, image_from_url, to_openai, to_result, with_layout


class EmbeddedLVLM(LocalChat):
    """A chat model that runs in this process.

    With a grammar, `max_tokens` is where free text is cut short: the answer is then closed at once and still parses.

    Attributes:
        model: Folder (or hub id) of an image-text-to-text model with processor and chat template.
        batch_size: Rows of a forward pass at most.
        window_ms: How long a request waits for company, in milliseconds. A round's critiques come one after another
            from their threads, and a batch that leaves without some of them costs as much again.
        device: "auto" is cuda, then mps, then cpu.
        dtype: "auto" is bfloat16 on cuda, float32 elsewhere.
        threads: CPU threads of a forward pass; None is torch's number. A model of a few million weights does best
            with 1: waking a second thread takes longer than what it is woken for.
    """

    batch_size: int = Field(default=8, ge=1)
    window_ms: float = Field(default=20.0, ge=0)
    device: str = "auto"
    dtype: str = "auto"
    threads: int | None = Field(default=None, ge=1)

    _worker: BatchWorker[_Row, ChatResult] | None = PrivateAttr(default=None)
    _decoder: Decoder | None = PrivateAttr(default=None)

    def close(self) -> None:
        """Finish the batch that is running and free the model; the next call loads it again."""
        with self._lock:
            if self._worker is not None:
                self._worker.close()
            self._worker = self._decoder = None

    def _submit(self, messages: list[BaseMessage], **kwargs: Any) -> Future[ChatResult]:
        prompt = to_openai(messages)
        temperature = kwargs.get("temperature")
        row = _Row(
            images=[_take_image(part) for it in prompt for part in it["content"] if part["type"] != "text"],
            messages=prompt,
            continues=isinstance(messages[-1], AIMessage),
            grammar=_grammar(with_layout(kwargs.get("response_format")), kwargs.get("structured_outputs")),
            temperature=self.temperature if temperature is None else float(temperature),
            seed=kwargs.get("seed"),
            max_tokens=int(kwargs.get("max_tokens") or self.max_tokens),
            top=int(kwargs.get("top_logprobs") or 0) if kwargs.get("logprobs") else None,
        )
        with self._lock:
            if self._worker is None:
                self._worker = BatchWorker(
                    self._run,
                    size=self.batch_size,
                    window=self.window_ms / 1000,
                    key=lambda row: len(row.images),  # so that pixels stack without padding
                    name="emoloop-lvlm",
                )
            return self._worker.submit([row])[0]

    @property
    def decoder(self) -> Decoder:
        """Model and processor, loaded at the first use."""
        if self._decoder is None:
            self._decoder = Decoder(self.model, self.device, self.dtype)
        return self._decoder

    def _run(self, rows: list[_Row]) -> Sequence[ChatResult | Exception]:
        if self.threads:
            set_threads_here(self.threads)
        try:
            return self.decoder(rows)
        except Exception as error:
            if len(rows) == 1:
                return [error]
            # One bad request must not take its company with it.
            return [self._run([row])[0] for row in rows]


def _take_image(part: dict[str, Any]) -> Image.Image:
    """The image of a message part, which then only says that there is one."""
    if part["type"] != "image_url":
        raise ValueError(f"a message part of type {part['type']!r}: text and image_url are known")
    part["type"] = "image"
    return image_from_url(part.pop("image_url")["url"])


def _grammar(response_format: dict[str, Any] | None, structured: dict[str, Any] | None) -> str | None:
    kind = (response_format or {}).get("type", "text")
    if kind == "json_schema" and response_format:
        schema = response_format["json_schema"]["schema"]
        return llguidance.LLMatcher.grammar_from_json_schema(json.dumps(schema))
    if kind == "json_object":
        return llguidance.LLMatcher.grammar_from_json_schema('{"type": "object"}')
    if kind != "text":
        raise ValueError(f"response_format {kind!r} is not known here; json_schema is")
    return llguidance.LLMatcher.grammar_from_regex(structured["regex"]) if structured else None


class Decoder:
    """Model, processor and grammars; turns a batch of requests into answers."""

    def __init__(self, model: str, device: str, dtype: str):
        self.name = model
        if device == "auto":
            there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
            device = next((name for name, found in there.items() if found), "cpu")
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
        stops = self.model.generation_config.eos_token_id or self.tokenizer.eos_token_id
        self.stops = set(stops if isinstance(stops, list) else [stops])
        self.vocabulary = self.model.get_output_embeddings().weight.shape[0]
        self.grammar_tokens = llguidance.hf.from_tokenizer(
            self.tokenizer, n_vocab=self.vocabulary, eos_token=sorted(self.stops)
        )
        self.grammars: dict[str, llguidance.LLMatcher] = {}
        self.bytes = [self.grammar_tokens.decode_bytes([token]) for token in range(len(self.tokenizer))]
        #: Tokens that end a JSON string.
        closing = [token.startswith(b'"') for token in self.bytes]
        self.closing = np.pad(closing, (0, self.vocabulary - len(closing)))

    def matcher(self, grammar: str) -> llguidance.LLMatcher:
        """A fresh matcher; compiling happens once per grammar."""
        if grammar not in self.grammars:
            matcher = llguidance.LLMatcher(self.grammar_tokens, grammar, log_level=0)
            if matcher.is_error():
                raise ValueError(f"the response schema cannot be used: {matcher.get_error()}")
            self.grammars[grammar] = matcher
        return self.grammars[grammar].deep_copy()

    @torch.inference_mode()
    def __call__(self, rows: Sequence[_Row]) -> list[ChatResult]:
        """The answers of a batch of requests with as many pictures each."""

        def render(row: _Row) -> str:
            go_on = {"add_generation_prompt": not row.continues, "continue_final_message": row.continues}
            return self.processor.apply_chat_template(row.messages, tokenize=False, **go_on)

        for row in rows:
            row.begin(self)
        prompts = [render(row) for row in rows]
        images = [row.images for row in rows] if rows[0].images else None
        inputs = self.processor(text=prompts, images=images, padding=True, return_tensors="pt")
        inputs = inputs.to(self.model.device)
        referee = _Referee(self, rows)
        pad = self.tokenizer.pad_token_id
        self.model.generate(
            **inputs,
            generation_config=GenerationConfig(
                do_sample=False,
                max_new_tokens=max(row.hard_limit for row in rows),
                pad_token_id=pad if pad is not None else min(self.stops),
                eos_token_id=None,  # the rows know when they have their answers
            ),
            logits_processor=LogitsProcessorList([referee]),
            stopping_criteria=StoppingCriteriaList([referee.done]),
        )
        lengths = inputs["attention_mask"].sum(dim=1).tolist()
        return [row.result(length) for row, length in zip(rows, lengths, strict=True)]


@dataclass
class _Row:
    """One request, and how far it is decoded."""

    #: Tokens that a closing answer may take beyond its limit: what numbers and keys of a flat schema need.
    SLACK: ClassVar[int] = 256

    messages: list[dict[str, Any]]
    images: list[Image.Image]
    continues: bool
    grammar: str | None
    temperature: float
    seed: int | None
    max_tokens: int
    top: int | None  # alternatives that are reported for each token; None reports nothing

    def begin(self, decoder: Decoder) -> None:
        self.decoder = decoder
        self.matcher = decoder.matcher(self.grammar) if self.grammar else None
        self.hard_limit = self.max_tokens + (self.SLACK if self.matcher else 0)
        self.tokens: list[int] = []
        self.logprobs: list[dict[str, Any]] = []
        self.finish_reason: str | None = None
        self.random = np.random.default_rng(self.seed)

    def choose(self, logits: np.ndarray, allowed: np.ndarray) -> int:
        """The next token, of the model's logits and what the grammar allows, both of shape (vocabulary,)."""
        closing = allowed & self.decoder.closing
        if self.matcher and len(self.tokens) >= self.max_tokens and closing.any():
            allowed = closing
        permitted = np.where(allowed, logits, -np.inf)
        if self.temperature == 0:
            token = int(permitted.argmax())
        else:
            scaled = permitted.astype(np.float64) / self.temperature
            chances = np.exp(scaled - scaled.max()).cumsum()
            token = int(np.searchsorted(chances, self.random.random() * chances[-1], side="right"))
        if self.top is not None and token not in self.decoder.stops:
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
        wide = logits.astype(np.float64) - logits.max()
        values = wide - np.log(np.exp(wide).sum())

        def entry(index: int) -> dict[str, Any]:
            data = self.decoder.bytes[index] if index < len(self.decoder.bytes) else b""
            return {
                "token": data.decode(errors="replace"),
                "bytes": list(data),
                "logprob": float(values[index]),
            }

        top = np.argsort(-values, kind="stable")[: self.top]
        return {**entry(token), "top_logprobs": [entry(int(index)) for index in top]}

    def result(self, prompt_tokens: int) -> ChatResult:
        return to_result(
            self.decoder.tokenizer.decode(self.tokens, skip_special_tokens=True),
            model=self.decoder.name,
            finish_reason=self.finish_reason or "length",
            usage={"prompt_tokens": prompt_tokens, "completion_tokens": len(self.tokens)},
            logprobs=self.logprobs if self.top is not None else None,
        )


class _Referee(LogitsProcessor):
    """Chooses every row's next token itself and leaves `generate` no choice.

    So grammar, temperature and seed belong to the row, and `generate` keeps what it is good at: caches,
    position ids and left padding of whatever architecture the folder holds.
    """

    def __init__(self, decoder: Decoder, rows: Sequence[_Row]):
        self.decoder, self.rows = decoder, rows
        self.mask = llguidance.numpy.allocate_token_bitmask(len(rows), decoder.vocabulary)
        # Embeddings are padded beyond the tokenizer.
        self.known = np.arange(decoder.vocabulary) < len(decoder.bytes)

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

    def done(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.tensor([row.finish_reason is not None for row in self.rows], device=input_ids.device)


def check_model(model: str) -> None:
    """Refuse a folder or hub id that is no image-text-to-text model by a `UserError`, before its weights are loaded."""
    try:
        kind = PretrainedConfig.get_config_dict(model)[0].get("model_type")
    except OSError as error:
        raise UserError(f"no LVLM {model!r}: {' '.join(str(error).split())[:200]}") from error
    if kind is None:
        raise UserError(f"{model} holds no config.json: an LVLM is a transformers folder such as Idefics3's")
    if kind not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        raise UserError(f"{model} holds a {kind!r} model: the critic needs one that takes images and text")
