"""What critic and rewriter said, as chats that trainers of language models take: TRL's SFT and DPO without conversion.

    messages     the chat with its answer                        (SFTTrainer)
    completion   `prompt` and `completion`                       (SFTTrainer, on the answer alone)
    preference   `prompt`, `chosen` and `rejected`               (DPOTrainer)

Each comes with `images`, which `datasets.load_dataset` opens. The question is the one that was asked, made again from
the prompt file that the log names. A critic's answers teach as they are, or with the valence and arousal that a person
read (the latest word on each axis); only where a person read otherwise there is a preference. A rewriter's answers
teach where they gained: where their images have a higher mean reward than those of each prompt of the rounds before.
Its preferences are all pairs of a run: an answer against each later one, which is taken as another answer to the same
question.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from ...agents.prompt import Prompt, load_prompt
from ...agents.rewriters.base import KEPT, RewriteRequest
from ...agents.rewriters.simple import question
from ...agents.schemas import signed, target_text
from ...domain import BLIND, Critique, Round, RunResult, UserError
from ...domain import mean as mean_of
from ...events import Critiqued, Event, HumanFeedback, Rewritten, RunStarted
from ...tools.lvlm.chat import to_openai
from ...traces.exchange.export import write_parquet
from ...traces.rows import RunFilter
from ...traces.store import TraceStore

#: How TRL calls the columns of each layout that hold answers.
_LAYOUTS = {"messages": ("messages",), "completion": ("completion",), "preference": ("chosen", "rejected")}


class Turn(NamedTuple):
    """A question and what is known of its answers.

    Attributes:
        question: The chat so far, with `{"type": "image"}` where a picture belongs.
        images: Addresses of those pictures.
        good: Answers to learn from.
        pairs: (better answer, worse answer).
    """

    question: list[dict[str, Any]]
    images: list[str]
    good: list[str]
    pairs: list[tuple[str, str]]


def critic_turns(run: RunResult, events: list[Event]) -> Iterator[Turn]:
    """A turn for each picture that was read."""
    read: dict[str, dict[str, float]] = {}
    for event in events:
        if isinstance(event, HumanFeedback) and event.sha256:
            given = event.model_dump(include={"valence", "arousal"}, exclude_none=True)
            read.setdefault(event.sha256, {}).update(given)
    for event in events:
        # A critique without a category is nobody's answer: it came from elsewhere.
        if (
            not isinstance(event, Critiqued)
            or not isinstance(event.critique, Critique)
            or not event.critique.category
        ):
            continue
        messages = _prompt(event).messages(("",), prompt=run.prompt, target=target_text(run.target))
        said = _critic_answer(event.critique)
        better = _critic_answer(event.critique.model_copy(update=read.get(event.sha256, {})))
        pairs = [(better, said)] if better != said else []
        yield Turn(_plain(messages), [event.sha256], [better], pairs)


def rewriter_turns(run: RunResult, events: list[Event]) -> Iterator[Turn]:
    """A turn for each answer of a model: one rewrite, or several."""
    started = next(event for event in events if isinstance(event, RunStarted))
    alone = started.settings.get("loop", {}).get("rewriter") in BLIND
    several = started.settings.get("loop", {}).get("proposals", 1) > 1
    comments = {
        event.round: event.comment for event in events if isinstance(event, HumanFeedback) and event.comment
    }
    written = [
        event
        for event in events
        if isinstance(event, Rewritten) and "@" in event.prompt_version and event.changes + event.why
        if not event.why.startswith(KEPT) and event.round < len(run.rounds)
        # One that a person edited before it was painted is told by no picture.
        if event.prompt in {it.prompt for it in run.rounds[event.round].proposals}
    ]
    answers: list[list[Rewritten]] = []
    for event in written:
        # An answer that gave several is paid for by its first.
        if answers and _prompt(event).lists and not event.usage and answers[-1][0].round == event.round:
            answers[-1].append(event)
        else:
            answers.append([event])
    means = [_mean(run.rounds[it[0].round], {event.prompt for event in it}) for it in answers]
    tried = [
        (number, mean)
        for number, round in enumerate(run.rounds)
        for prompt in dict.fromkeys(it.prompt for it in round.candidates)
        if (mean := _mean(round, {prompt})) is not None
    ]
    for place, answer in enumerate(answers):
        first, mean = answer[0], means[place]
        before = run.rounds[: 0 if alone else first.round]
        file, comment = _prompt(first), comments.get(first.round - 1, "")
        request = RewriteRequest(run.prompt, run.target, before, comment, count=len(answer))
        asked = question(file, request, first.index if several else None, several=file.lists)
        known = [other for number, other in tried if number < first.round]
        said = _rewriter_answer(answer)
        good = [said] if mean is not None and all(mean > other for other in known) else []
        pairs = []
        for later, other in zip(answers[place + 1 :], means[place + 1 :], strict=True):
            if mean is not None and other is not None and mean != other:
                better, worse = (answer, later) if mean > other else (later, answer)
                pairs.append((_rewriter_answer(better), _rewriter_answer(worse)))
        yield Turn(_plain(asked), [], good, pairs)


def _mean(round: Round, prompts: set[str]) -> float | None:
    """Mean reward of the images of some of a round's prompts."""
    return mean_of([it.reward for it in round.candidates if it.prompt in prompts and it.reward is not None])


def export(
    turns: Callable[[RunResult, list[Event]], Iterable[Turn]],
    layout: str,
    store: TraceStore,
    where: RunFilter | None,
    path: Path,
) -> int:
    """Write the turns of the chosen runs as parquet, oldest run first.

    Args:
        turns: `critic_turns` or `rewriter_turns`.
        layout: "messages", "completion" or "preference".
        store: The log.
        where: Which runs.
        path: As for `write_parquet`.

    Returns:
        The number of rows.

    Raises:
        UserError: No chosen run has such a turn, or its question cannot be made again.
    """
    import pyarrow as pa

    text = pa.struct([("type", pa.string()), ("text", pa.string())])
    chat = pa.list_(pa.struct([("role", pa.string()), ("content", pa.list_(text))]))
    names = [*(["prompt"] if layout != "messages" else []), *_LAYOUTS[layout]]
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    word = {"dtype": "string", "_type": "Value"}
    told = [{"role": word, "content": [{"type": word, "text": word}]}]
    # What `datasets` reads to know that the structs of bytes are pictures.
    features = {"info": {"features": {**dict.fromkeys(names, told), "images": [{"_type": "Image"}]}}}
    schema = pa.schema(
        [*((name, chat) for name in names), ("images", pa.list_(image))],
        {"huggingface": json.dumps(features)},
    )

    def rows() -> Iterator[dict[str, Any]]:
        for row in reversed(store.runs(where)):
            for turn in turns(store.run(row.run_id), store.events(row.run_id)):
                images = [{"bytes": store.blobs.get_bytes(sha256), "path": None} for sha256 in turn.images]
                answers = turn.pairs if layout == "preference" else [(answer,) for answer in turn.good]
                for texts in answers:
                    said = [
                        [{"role": "assistant", "content": [{"type": "text", "text": text}]}] for text in texts
                    ]
                    if layout == "messages":
                        columns = {"messages": turn.question + said[0]}
                    else:
                        columns = {"prompt": turn.question, **dict(zip(_LAYOUTS[layout], said, strict=True))}
                    yield {**columns, "images": images}

    return write_parquet(path, rows(), schema, _NOTHING[turns.__name__, layout == "preference"])


_NOTHING = {
    ("critic_turns", False): "no chats: no picture of these runs was read by a critic",
    ("critic_turns", True): "no preferences: no picture of these runs was read otherwise by a person "
    "(bring readings in by `emoloop traces import FILE.csv`)",
    ("rewriter_turns", False): "no chats: no rewrite of these runs gained",
    ("rewriter_turns", True): "no preferences: no run has two rewrites with different rewards",
}

critic_messages = partial(export, critic_turns, "messages")
critic_completion = partial(export, critic_turns, "completion")
critic_preference = partial(export, critic_turns, "preference")
rewriter_messages = partial(export, rewriter_turns, "messages")
rewriter_completion = partial(export, rewriter_turns, "completion")
rewriter_preference = partial(export, rewriter_turns, "preference")


def _prompt(event: Critiqued | Rewritten) -> Prompt:
    """The prompt file that an answer was given to, of the same version."""
    name = event.prompt_version.partition("@")[0]
    try:
        found = load_prompt(name)
    except UserError as error:
        raise UserError(f"run {event.run_id} was asked by prompt {event.prompt_version}: {error}") from error
    if found.id != event.prompt_version:
        raise UserError(f"run {event.run_id} was asked by prompt {event.prompt_version}; here is {found.id}")
    return found


def _plain(messages: list[Any]) -> list[dict[str, Any]]:
    """Messages as `datasets` holds them: parts with the same fields, pictures without their bytes."""
    return [
        {
            "role": message["role"],
            "content": [
                {"type": part["type"].removesuffix("_url"), "text": part.get("text")}
                for part in message["content"]
            ],
        }
        for message in to_openai(messages)
    ]


def _critic_answer(critique: Critique) -> str:
    # Keys in the order of the schema.
    answer = {
        "analysis": critique.analysis,
        "valence": signed(critique.valence),
        "arousal": signed(critique.arousal),
        "category": critique.category,
        "alignment": f"{critique.alignment:.1f}",
        "suggestion": critique.suggestion,
    }
    return json.dumps(answer, ensure_ascii=False)


def _rewriter_answer(answer: list[Rewritten]) -> str:
    first = answer[0]
    if not _prompt(first).lists:
        said: dict[str, Any] = {"why": first.why, "changes": first.changes, "prompt": first.prompt}
    else:
        prompts = [{"changes": event.changes, "prompt": event.prompt} for event in answer]
        said = {"why": first.why, "prompts": prompts}
    return json.dumps(said, ensure_ascii=False)
