"""The graph's state: plain JSON that names things and holds none of them.

The checkpointer writes the whole state at every step, so pictures and critiques stay in the log and the state
says where to look. Everything here could be made again from the log, and a resumed run does so.
"""

from __future__ import annotations

import hashlib
import re
import secrets
import unicodedata
from dataclasses import dataclass, fields
from datetime import datetime
from typing import TYPE_CHECKING, Annotated, Any, NotRequired

from langgraph.channels import EphemeralValue
from typing_extensions import TypedDict

from ..domain import EmotionTarget, UserError, first_error
from ..events import RunStarted

if TYPE_CHECKING:
    from ..settings import LoopSettings

#: Longest neutral prompt, in characters: twice what the longest text encoder in use (T5, 512 tokens) reads.
LONGEST_PROMPT = 4000

#: Keys of an answer to a review.
REVIEW_KEYS = {"prompt", "comment", "stop"}


class RunInput(TypedDict):
    """What a run starts from.

    Attributes:
        prompt: The neutral prompt.
        target: `{"valence": 2.0, "arousal": -1.0, "category": "awe"}`, any of them left out.
        seed: Drawn at random, and logged, where it is left out.
    """

    prompt: str
    target: dict[str, Any]
    seed: NotRequired[int | None]


class State(TypedDict):
    """Where a run stands.

    Attributes:
        prompt: The neutral prompt.
        target: The wanted emotion.
        seed: As asked for; gone after the first step, so that the next run of a thread draws its own.
        run_id: The run's name in the log: the thread id, inside another graph with the calling task's digest, and
            with a number from the thread's second run on.
        options: What the run goes by: its seed, and what `Context` names.
        round: The current round.
        current: Its first prompt; the others stand in the log. Another one here is painted in place of them all.
        comment: What a person said in a review, for the next rewrite.
        answered: The rounds before this one had their reviews answered, when the run was last begun or gone on with.
        rounds: For each finished round its prompt, images (SHA-256) and mean reward.
        best: The best candidate so far: round, index, sha256, prompt, seed, reward, image (path), url (as
            `picture_url`).
        status: A `RunStatus`.
        stop_reason: A `StopReason`, once there is one.
        ended: Why no further round was begun, while the final one is under way.
        gain: Mean reward of the winning round minus that of round 0.
        best_gain: Best reward minus best reward of round 0.
        warnings: One line each.
    """

    prompt: str
    target: dict[str, Any]
    seed: Annotated[NotRequired[int | None], EphemeralValue]
    run_id: str
    options: dict[str, Any]
    round: int
    current: str
    comment: str
    answered: NotRequired[int]
    rounds: list[dict[str, Any]]
    best: dict[str, Any] | None
    status: str
    stop_reason: str | None
    ended: NotRequired[str | None]
    gain: float | None
    best_gain: float | None
    warnings: list[str]


@dataclass(frozen=True)
class Context:
    """Settings of one invocation, over those that the graph was built with; None leaves one as it is.

    Attributes:
        rounds: Most rounds.
        images: Candidates in a round.
        tolerance: How near is reached, on each wanted axis.
        patience: Rounds without a better candidate that end the run.
        review: Wait for a person before each rewrite.
        rewriter: Name or dotted path of the rewriter.
        personas: How many write, for `mc_agent`.
        rewrite_first: Round 0 paints a rewrite made without feedback.
        exhaust: Use all rounds whatever was reached.
        proposals: Distinct prompts in a round.
        neutral_images: Images of round 0 that show the neutral prompt, where there are several prompts.
        max_images: Most images of the run.
        max_calls: Questions to the LVLM after which no round begins.
        max_seconds: Seconds after which no round begins.
        finalists: Prompts that are painted and read again before one is delivered.
        oversample: Prompts that are written for each that is painted.
        memory: Rewrites of other runs that are shown to the rewriter.
    """

    rounds: int | None = None
    images: int | None = None
    tolerance: float | None = None
    patience: int | None = None
    review: bool | None = None
    rewriter: str | None = None
    personas: int | None = None
    rewrite_first: bool | None = None
    exhaust: bool | None = None
    proposals: int | None = None
    neutral_images: int | None = None
    max_images: int | None = None
    max_calls: int | None = None
    max_seconds: float | None = None
    finalists: int | None = None
    oversample: int | None = None
    memory: int | None = None

    def over(self, base: LoopSettings) -> dict[str, Any]:
        """The options of a run.

        Raises:
            UserError: A value is out of range.
        """
        from pydantic import ValidationError

        given = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) is not None}
        try:
            chosen = type(base).model_validate({**base.model_dump(), **given})
        except ValidationError as error:
            raise UserError(f"{first_error(error)} (got {error.errors()[0]['input']!r})") from error
        return chosen.model_dump(include={f.name for f in fields(self)})


def read_prompt(prompt: Any) -> str:
    """A neutral prompt on one line.

    Raises:
        UserError: Empty, too long, or not text.
    """
    if not isinstance(prompt, str):
        raise UserError(f"the prompt must be text, not {type(prompt).__name__}")
    text = " ".join(prompt.split())
    if not text:
        raise UserError("the prompt is empty: say what the picture should show")
    if len(text) > LONGEST_PROMPT:
        raise UserError(f"the prompt has {len(text)} characters; {LONGEST_PROMPT} are the most that is read")
    if any(unicodedata.category(character) in ("Cc", "Cs") for character in text):
        raise UserError("the prompt has control characters or broken bytes in it: give plain text")
    return text


def read_seed(seed: Any) -> int | None:
    """A run's seed, or None.

    Raises:
        UserError: It is no whole number from 0 to 2^63 - 1.
    """
    if seed is None or (isinstance(seed, int) and not isinstance(seed, bool) and 0 <= seed < 2**63):
        return seed
    raise UserError(f"seed {seed!r}: a whole number from 0 to 2^63 - 1 is wanted")


def new_run_id() -> str:
    """A fresh run id; ids sort by time."""
    return f"{datetime.now():%y%m%d-%H%M%S}-{secrets.token_hex(3)}"


def read_run_id(run_id: str) -> str:
    """A run id that is safe as a file name.

    Raises:
        UserError: It is not.
    """
    if not re.fullmatch(r"[\w:@+-][\w.:@+-]{,119}", run_id):
        raise UserError(f"run id {run_id!r}: letters, digits and . : @ + - _ are allowed, 120 at most")
    return run_id


def thread_run_id(thread: Any) -> str:
    """The run id of a LangGraph thread, whose id may be a number, a UUID or any text of the host's.

    What cannot be a run id is named by its readable part and a digest.
    """
    name = str(thread)
    try:
        return read_run_id(name)
    except UserError:
        readable = re.sub(r"[^\w:@+-]+", "-", name).strip("-")[:100]
        return f"{readable or 'thread'}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def picture_url(sha256: str) -> str:
    """Where LangGraph's server gives a picture, as `dev_http` serves it; relative to the server's address."""
    return f"/images/{sha256}"


def candidate_seed(seed: int, round: int, index: int) -> int:
    """The seed of a candidate's noise, in [0, 2³¹): the same on every machine and in every version.

    Args:
        seed: The run's seed.
        round: Round number, from 0.
        index: Place in the round, from 0.
    """
    return int.from_bytes(hashlib.sha256(f"{seed}:{round}:{index}".encode()).digest()[:4]) >> 1


def asks_the_same(started: RunStarted, prompt: str, target: EmotionTarget, seed: int | None) -> bool:
    """Whether a request is the one that a run began with; a seed that is left out is any."""
    return started.prompt == prompt and started.target == target and seed in (None, started.seed)


def read_review(answer: Any) -> dict[str, Any]:
    """A person's answer to a review.

    Raises:
        UserError: It is neither text nor an object with known keys and usable values.
    """
    if answer is None:
        return {}
    if isinstance(answer, str):
        return {"comment": answer.strip()}
    if not isinstance(answer, dict) or not set(answer) <= REVIEW_KEYS:
        raise UserError(f"a review is a comment, or an object with {', '.join(sorted(REVIEW_KEYS))}")
    if not isinstance(answer.get("comment") or "", str):
        raise UserError(f"a review's comment is text, not {answer['comment']!r}")
    return {**answer, "prompt": read_prompt(answer["prompt"])} if answer.get("prompt") else answer
