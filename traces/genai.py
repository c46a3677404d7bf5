"""What an event is in OpenTelemetry's GenAI conventions: names, attributes, messages, evaluations.

The conventions are still in development and their Python constants private, so the strings live here. Of a question
the messages hold what the log knows: prompt, target, pictures, and what was tried; the words around them are those of
the prompt file that `emoloop.prompt_version` names.
"""

from __future__ import annotations

import json
import os
import re
from base64 import b64encode
from collections.abc import Callable, Iterator, Mapping, Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any

from ..domain import BLIND, Critique, EmotionTarget, Missing, RunStatus
from ..events import (
    Critiqued,
    Event,
    GenerationFailed,
    HumanFeedback,
    ImageGenerated,
    PersonaAnswered,
    Rewarded,
    Rewritten,
    RunFinished,
    RunStarted,
)
from .blobs import BlobStore
from .fold import Fold
from .labels import Labels

if TYPE_CHECKING:
    from opentelemetry.sdk.resources import Resource

#: The conventions that the names were taken from.
SCHEMA_URL = "https://opentelemetry.io/schemas/1.41.0"

#: Attributes that hold what people and models wrote; dropped unless `traces.capture_content`.
CONTENT = frozenset(
    {
        "gen_ai.input.messages",
        "gen_ai.output.messages",
        "gen_ai.evaluation.explanation",
        "input.value",
        "output.value",
    }
)

#: Calls that leave the agent for a model; everything else happens inside.
CLIENT = frozenset({"chat", "generate_content"})

#: What OpenInference calls the span of an operation; a "CHAIN" is any other step.
_KINDS = {"invoke_agent": "AGENT", "chat": "LLM", "generate_content": "LLM"}

#: Characters of one text; OpenTelemetry's own default is no limit.
_LONGEST = 32_768

#: How `one_line` writes an exception.
_EXCEPTION = re.compile(r"([A-Z]\w*)(: |$)")

#: A part of a message.
Part = dict[str, Any]


def operation(name: str) -> str:
    """The operation of a span's name."""
    return name.split(" ", 1)[0]


def flatten(attributes: Mapping[str, Any], capture_content: bool) -> dict[str, Any]:
    """What OpenTelemetry accepts: no None, nested values as JSON but for tuples of texts, content only if wanted, no
    text too long."""
    flat: dict[str, Any] = {}
    for key, value in attributes.items():
        if value is None or (key in CONTENT and not capture_content):
            continue
        if isinstance(value, str):
            value = value[:_LONGEST]
        elif not isinstance(value, bool | int | float | tuple):
            # Not cut: half a JSON text is none. Its texts are short already.
            value = json.dumps(value, ensure_ascii=False, default=str)
        flat[key] = value
    return flat


def defaults(name: str) -> dict[str, str]:
    """What the span of any name has."""
    kind = _KINDS.get(operation(name), "CHAIN")
    return {
        "gen_ai.operation.name": operation(name),
        "gen_ai.provider.name": "emoloop",
        "openinference.span.kind": kind,
    }


def resource() -> Resource:
    """Who sends: "emoloop", unless OpenTelemetry's own variables name the service."""
    from opentelemetry.sdk.resources import SERVICE_NAME, Resource

    named = "OTEL_SERVICE_NAME" in os.environ or SERVICE_NAME in os.environ.get(
        "OTEL_RESOURCE_ATTRIBUTES", ""
    )
    return Resource.create({} if named else {SERVICE_NAME: "emoloop"})


# ---- attributes


def workflow(log: Sequence[Event]) -> dict[str, Any]:
    """A run's attributes, without content."""
    attributes: dict[str, Any] = {"gen_ai.workflow.name": "emoloop"}
    labels = Labels()
    for event in log:
        if isinstance(event, RunStarted):
            target = {f"emoloop.target.{k}": v for k, v in event.target.model_dump(mode="json").items()}
            attributes |= {"gen_ai.request.seed": event.seed, **target}
        elif isinstance(event, RunFinished):
            failed = event.status is RunStatus.FAILED
            estimate = event.estimate.model_dump(include={"valence", "arousal"}) if event.estimate else {}
            attributes |= {
                "emoloop.status": event.status.value,
                "emoloop.stop_reason": event.stop_reason.value,
                "emoloop.gain": event.gain,
                "emoloop.best_gain": event.best_gain,
                **{f"emoloop.estimate.{axis}": value for axis, value in estimate.items()},
                "error.type": event.stop_reason.value if failed else None,
            }
        elif isinstance(event, HumanFeedback):
            labels.apply(event)
    return {**attributes, "tag.tags": tuple(labels.names) or None}


def call(event: Event) -> tuple[str, dict[str, Any]]:
    """The name of an event's span, and its attributes without content."""
    match event:
        case ImageGenerated():
            return f"generate_content {event.model}", {
                "gen_ai.request.model": event.model,
                "gen_ai.request.seed": event.seed,
                "gen_ai.output.type": "image",
                "emoloop.index": event.index,
                "emoloop.image.sha256": event.sha256,
                "emoloop.image.steps": event.steps,
                "emoloop.image.guidance": event.guidance,
                "emoloop.adapter": event.adapter,
            }
        case GenerationFailed():
            return "generate_content", {
                "gen_ai.request.seed": event.seed,
                "gen_ai.output.type": "image",
                "emoloop.index": event.index,
                "error.type": _error_type(event.reason, "generation_failed"),
            }
        case Critiqued():
            missing = event.critique.reason if isinstance(event.critique, Missing) else None
            return f"chat {event.model}", {
                **_chat(event),
                "emoloop.index": event.index,
                "emoloop.image.sha256": event.sha256,
                "error.type": missing and _error_type(missing, "missing_critique"),
            }
        case PersonaAnswered():
            refused = problem(event)
            return f"chat {event.model}", {
                **_chat(event),
                "emoloop.index": event.index,
                "error.type": refused and _error_type(refused, "refused_draft"),
            }
        case Rewritten() if event.seconds:
            refused = problem(event)
            return f"chat {event.model}", {
                **_chat(event),
                "error.type": refused and _error_type(refused.partition(": ")[2], "refused_rewrite"),
            }
        case Rewritten():  # a person's, a rewriter's that asked no model, or one that another's answer gave too
            return "rewrite", {"emoloop.prompt_version": event.prompt_version}
        case _:
            return "human_feedback", {
                "emoloop.index": event.index,
                "emoloop.image.sha256": getattr(event, "sha256", None),
            }


def _chat(event: Critiqued | PersonaAnswered | Rewritten) -> dict[str, Any]:
    # LangChain says input_tokens and output_tokens, and so does the convention; it knows no total.
    usage = {
        f"gen_ai.usage.{key}": n for key, n in event.usage.items() if key in ("input_tokens", "output_tokens")
    }
    return {
        "gen_ai.request.model": event.model,
        "gen_ai.output.type": "json",
        **usage,
        "emoloop.prompt_version": event.prompt_version,
    }


def _error_type(reason: str, otherwise: str) -> str:
    named = _EXCEPTION.match(reason)
    return named[1] if named else otherwise


def problem(event: Event) -> str | None:
    """What went wrong in a call, in words; None where nothing did."""
    match event:
        case GenerationFailed():
            return event.reason
        case Critiqued(critique=Missing(reason=reason)):
            return reason
        case PersonaAnswered():
            return event.draft.reason
        case Rewritten() if event.why and event.why in event.warnings:
            return event.why
        case _:
            return None


# ---- evaluations


def evaluations(event: Event) -> Iterator[dict[str, Any]]:
    """The attributes of each `gen_ai.evaluation.result` that an event holds."""
    match event:
        case Critiqued(critique=Critique() as critique):
            why = critique.analysis or None
            for name in ("valence", "arousal", "alignment"):
                yield _evaluation(name, getattr(critique, name), why)
            if critique.category:
                named = {"gen_ai.evaluation.score.label": critique.category.value}
                yield {**_evaluation("category", None, why), **named}
        case Critiqued():
            yield {**_evaluation("critique", None, problem(event)), "error.type": "missing_critique"}
        case Rewarded():
            missing = "missing_reward" if event.value is None else None
            yield {
                **_evaluation(f"reward:{event.name}", event.value, event.reason),
                "error.type": missing,
            }
        case HumanFeedback():
            for name in ("valence", "arousal", "rating"):
                if (value := getattr(event, name)) is not None:
                    yield _evaluation(f"human:{name}", value, event.comment or None)
        case _:
            pass


def _evaluation(name: str, value: float | None, why: str | None) -> dict[str, Any]:
    return {
        "gen_ai.evaluation.name": name,
        "gen_ai.evaluation.score.value": value,
        "gen_ai.evaluation.explanation": why,
    }


# ---- content


def workflow_content(log: Sequence[Event], picture: Callable[[str], Part]) -> dict[str, Any]:
    """A run's question, and its best picture with the prompt that it was made for."""
    fold = Fold(log[0].run_id, log)
    best = fold.tried[fold.best].made if fold.finished and fold.best else None
    asked = [_text(fold.started.prompt)] if fold.started else []
    return _messages(asked, [_text(best.prompt), picture(best.sha256)] if best else [])


def content(event: Event, before: Sequence[Event], picture: Callable[[str], Part]) -> dict[str, Any]:
    """The messages of a call.

    Args:
        event: Whose call.
        before: The run's events before it.
        picture: Gives the part for a picture's SHA-256.
    """
    match event:
        case ImageGenerated():
            return _messages([_text(event.prompt)], [picture(event.sha256)])
        case GenerationFailed():
            return _messages([_text(event.prompt)])
        case Critiqued():
            asked = [_text("\n".join(_request(before))), picture(event.sha256)]
            if isinstance(event.critique, Critique):
                return _messages(asked, [_text(event.critique.model_dump_json(exclude_none=True))])
            return _messages(asked, [_text(event.critique.raw)] if event.critique.raw else [], "error")
        case PersonaAnswered(draft=draft):
            said = json.dumps({**draft.said, "prompt": draft.prompt}, ensure_ascii=False)
            asked = [_text("\n".join([*_request(before), *_tried(before, event.round)]))]
            return _messages(
                asked, [_text(said)] if draft.prompt else [], "error" if draft.reason else "stop"
            )
        case Rewritten():
            answer = {"why": event.why, "changes": event.changes, "prompt": event.prompt}
            said = json.dumps(answer, ensure_ascii=False)
            asked = [_text("\n".join([*_request(before), *_tried(before, event.round)]))]
            return _messages(asked, [] if problem(event) else [_text(said)])
        case HumanFeedback() if event.comment:
            return _messages([_text(event.comment)])
        case _:
            return {}


def _request(before: Sequence[Event]) -> Iterator[str]:
    for event in before:
        if isinstance(event, RunStarted):
            yield f"prompt: {event.prompt}"
            yield f"target: {_words(event.target)}"


def _words(target: EmotionTarget) -> str:
    given = target.model_dump(mode="json", exclude_none=True)
    return ", ".join(f"{key} {value}" for key, value in given.items())


def _tried(before: Sequence[Event], number: int) -> Iterator[str]:
    """What a rewriter may look at: each prompt of a round with what was read, and a person's words on the last."""
    fold = Fold(before[0].run_id, before) if before else Fold("")
    if fold.started and fold.started.settings.get("loop", {}).get("rewriter") in BLIND:
        return  # they are shown no round
    for tried, round in zip(fold.numbers, fold.rounds(), strict=True):
        for prompt in dict.fromkeys(it.prompt for it in round.candidates if tried < number):
            shots = [it for it in round.candidates if it.prompt == prompt]
            read = [it.critique for it in shots if isinstance(it.critique, Critique)]
            rewards = [it.reward for it in shots if it.reward is not None]
            if read:
                means = [
                    f"{axis} {fmean(getattr(it, axis) for it in read):.2f}" for axis in ("valence", "arousal")
                ]
                yield f"round {tried}: {prompt}"
                yield f"read: {', '.join([*means, *([f'reward {fmean(rewards):.2f}'] if rewards else [])])}"
    for event in before:
        if isinstance(event, HumanFeedback) and event.comment and event.round == number - 1:
            yield f"comment: {event.comment}"


def _messages(asked: list[Part], said: Sequence[Part] = (), finish_reason: str = "stop") -> dict[str, Any]:
    attributes: dict[str, Any] = {"gen_ai.input.messages": [{"role": "user", "parts": asked}]}
    if said:
        answer = {"role": "assistant", "parts": said, "finish_reason": finish_reason}
        attributes["gen_ai.output.messages"] = [answer]
    # The words alone once more, as OpenInference names them: viewers of it have them as columns of their tables.
    for key, parts in (("input.value", asked), ("output.value", said)):
        if words := [part["content"] for part in parts if part["type"] == "text"]:
            attributes[key] = "\n".join(words)
    return attributes


def _text(text: str) -> Part:
    return {"type": "text", "content": text[:_LONGEST]}


def picture_part(sha256: str, blobs: BlobStore, most: int) -> Part:
    """A picture as part of a message: its bytes, so that it shows on another machine, or its address.

    Args:
        sha256: The picture.
        blobs: Where it lies.
        most: Bytes of a picture that goes along.
    """
    part = {"modality": "image", "mime_type": "image/png"}
    path = blobs.path(sha256)
    try:
        if path.stat().st_size <= most:
            data = b64encode(blobs.get_bytes(sha256)).decode()
            return {"type": "blob", **part, "content": data}
    except OSError:
        pass  # lost or damaged: its address still says which it was
    return {"type": "uri", **part, "uri": path.absolute().as_uri()}
