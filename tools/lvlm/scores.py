"""Score-only mode: valence and arousal from the probabilities of a few tokens, without a written critique.

The answer's beginning is put into the model's mouth and it says the two numbers, nothing before them. What
it says is the most likely number; what it *believes* is spread over signs and digits, and the expectation over
that is finer than one decimal. It costs a fifth of a critique's tokens and is less accurate, because the
reasoning that comes before the numbers is missing: a second, cheaper reward with an accuracy of its own. The
same reader takes full critiques that came with log-probabilities.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, BaseMessage
from langchain_core.runnables import Runnable, RunnableLambda

KEYS = ("valence", "arousal")

#: The answer is {"valence": "+1.2", "arousal": "-0.3"}: its given beginning, and what the model says of it.
BEGINNING = '{"valence": "'
REST = r'[+-][0-3]\.[0-9]", "arousal": "[+-][0-3]\.[0-9]'

#: Alternatives for each place. Those beyond weigh next to nothing, and cost a server as much as decoding does.
TOP = 3

#: Signs and digits that a number may be made of, place by place; the point is no choice.
PLACES = ("+-", "0123", "", "0123456789")


@dataclass(frozen=True)
class Score:
    """One axis: what the answer says, in [-3.9, 3.9]; its expectation over signs and digits, renormalised over those
    that the format allows; the probability of the number as written, in (0, 1], renormalised likewise.
    """

    value: float
    expected: float
    certainty: float


class _Unfit(Exception):
    """The answer is not of the format."""


def score_only(model: BaseChatModel) -> Runnable[list[BaseMessage], BaseMessage]:
    """One of our models, bound to answer with the two numbers only; `read_scores` reads what comes back.

    A grammar costs a server a quarter of such a short answer, and a model that knows the format needs none: it is
    asked freely first, and by the grammar only where the answer is not of the format.
    """
    free = model.bind(max_tokens=32, temperature=0.0, logprobs=True, top_logprobs=TOP)
    held = free.bind(structured_outputs={"regex": REST})
    begin: Runnable[Any, Any] = RunnableLambda(lambda messages: [*messages, AIMessage(BEGINNING)])
    return begin | (free | _fitting).with_fallbacks([held], exceptions_to_handle=(_Unfit,))


def _fitting(answer: BaseMessage) -> BaseMessage:
    if not re.match(REST, answer.text.removeprefix(BEGINNING)):
        raise _Unfit
    return answer


def read_scores(message: BaseMessage) -> dict[str, Score]:
    """Valence and arousal of an answer to `score_only`, or of a critique with `logprobs=True`, `top_logprobs=3`.

    Raises:
        ValueError: No log-probabilities, or a number that is missing from the answer.
    """
    tokens = (getattr(message, "response_metadata", {}).get("logprobs") or {}).get("content")
    if not tokens:
        raise ValueError("the answer has no log-probabilities: ask with logprobs=True, top_logprobs=3")
    if not message.text.startswith("{"):
        tokens = [{"token": BEGINNING, "logprob": 0.0, "top_logprobs": []}, *tokens]
    text = "".join(token["token"] for token in tokens)
    return {key: _score(text, tokens, key) for key in KEYS}


def _score(text: str, tokens: list[dict[str, Any]], key: str) -> Score:
    # A free text before the numbers may hold anything but an unescaped quote: the last such key is the key.
    marker = f'"{key}": "'
    start = text.rfind(marker)
    if start < 0:
        raise ValueError(f"the answer has no {key}: {text[:100]!r}")
    start += len(marker)
    written = text[start : start + len(PLACES)]
    chances = [
        _chances(tokens, start + place, allowed) if allowed else {written[place]: 1.0}
        for place, allowed in enumerate(PLACES)
    ]
    certainty = math.prod(place[character] for place, character in zip(chances, written, strict=True))
    return Score(value=float(written), expected=expectation(written, *chances), certainty=certainty)


def expectation(written: str, sign: Any, units: Any, point: Any, tenths: Any) -> Any:
    """The expectation over signs and digits.

    Args:
        written: The number as the model wrote it, "+1.2".
        sign: Probability of each sign, by its character.
        units: Of each digit before the point, after that sign.
        point: Is not asked.
        tenths: Of each digit behind it, after what is written.

    Returns:
        A float; a tensor where the probabilities are tensors.
    """
    # A digit is known only after the digits before it as they were written. Every branch that was not taken
    # stands for its number nearest to the branch that was: next to +1.9 the branch "2" is +2.0, and "-" is 0.
    taken = int(written[1])
    own = taken + sum(int(digit) * chance for digit, chance in tenths.items()) / 10
    nearest = {
        digit: own if int(digit) == taken else max(int(digit), min(int(digit) + 0.9, taken))
        for digit in units
    }
    magnitude = sum(chance * nearest[digit] for digit, chance in units.items())
    side = 1.0 if written[0] == "+" else -1.0
    return side * sign[written[0]] * magnitude


def _chances(tokens: list[dict[str, Any]], at: int, allowed: str) -> dict[str, float]:
    """Probability of each allowed character at place `at` of the text, given the text before it.

    A token may begin before the place (a quote that comes with its sign): only alternatives with the same
    beginning count, those that the format forbids don't.
    """
    position, token = 0, tokens[0]
    for token in tokens:
        if at < position + len(token["token"]):
            break
        position += len(token["token"])
    before = token["token"][: at - position]
    found = dict.fromkeys(allowed, 0.0)
    said = {other["token"]: other["logprob"] for other in [*token["top_logprobs"], token]}
    for text, logprob in said.items():
        character = text.removeprefix(before)[:1] if text.startswith(before) else ""
        if character in found:
            found[character] += math.exp(logprob)
    total = sum(found.values())
    return {character: chance / total for character, chance in found.items()}
