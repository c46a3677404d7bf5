"""The nodes of the graph.

Each node first reads the log for what is already there and does only the rest, so it may be run again after
any crash, at any time, from any checkpoint or from none: an acknowledged picture is not made twice. What a
node decides follows from the log alone, which is why a resumed run picks what an undisturbed one would have.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections import Counter
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from langgraph.runtime import Runtime
from langgraph.types import interrupt

from ..agents.ask import one_line
from ..agents.critic import Critic, valued
from ..agents.generator import paint
from ..agents.rewriter import KEPT, Rewriter
from ..domain import (
    Candidate,
    Critique,
    EmotionTarget,
    Missing,
    Round,
    RunStatus,
    StopReason,
    UserError,
    read_target,
)
from ..events import (
    Critiqued,
    Event,
    GenerationFailed,
    HumanFeedback,
    ImageGenerated,
    Rewarded,
    Rewritten,
    RunFinished,
    RunStarted,
)
from ..settings import Settings
from ..tools.images.base import GenerationError, Generator, ImageRequest, unread_text
from ..tools.reward import Reward
from ..traces.reader import load_run
from ..traces.recorder import StoreRecorder
from . import policy
from .progress import ImageMade, Judged, RoundBegan, RoundEnded, RunBegan, Warned
from .retry import ATTEMPTS, retryable
from .state import Context, State, candidate_seed, read_prompt, read_run_id, read_seed, same_target

logger = logging.getLogger(__name__)

#: Keys of an answer to a review.
REVIEW_KEYS = {"prompt", "comment", "stop"}


@dataclass
class Parts:
    """What the nodes work with; shared by all runs of a loop.

    Attributes:
        generator: Makes the pictures.
        critic: Reads them.
        rewriter: Writes the next prompt.
        reward: Values a reading.
        recorder: The log.
        settings: The resolved settings.
        patient: Whether the chat model retries by itself, so that the graph should not.
        objects: Which of generator, lvlm and reward were handed over as objects: a log cannot name those.
    """

    generator: Generator
    critic: Critic
    rewriter: Rewriter
    reward: Reward
    recorder: StoreRecorder
    settings: Settings
    patient: bool = False
    objects: tuple[str, ...] = ()

    def snapshot(self, options: dict[str, Any]) -> dict[str, Any]:
        """The settings as a run's first event holds them: resolved, without secrets."""
        dumped = self.settings.model_dump(
            mode="json", exclude={"home": True, "traces": True, "lvlm": {"api_key"}}
        )
        dumped["loop"].update(options)
        return {**dumped, "objects": list(self.objects)} if self.objects else dumped


def new_run_id() -> str:
    """A fresh run id; ids sort by time."""
    return f"{datetime.now():%y%m%d-%H%M%S}-{secrets.token_hex(3)}"


class Nodes:
    """The nodes, bound to their parts."""

    def __init__(self, parts: Parts) -> None:
        self.parts = parts

    # ---- start

    async def start(self, state: State, runtime: Runtime[Context]) -> dict[str, Any]:
        """Check the request, name the run and log it; or find the run that it continues."""
        prompt, target = check_request(self.parts, state["prompt"], state["target"])
        options = (runtime.context or Context()).over(self.parts.settings.loop)
        seed = read_seed(state.get("seed"))
        asked = target.model_dump(mode="json", exclude_none=True)
        run_id, started = await self._find(runtime, prompt, asked, seed)
        if started is None:
            started = RunStarted(
                run_id=run_id,
                prompt=prompt,
                target=target,
                seed=secrets.randbelow(2**31) if seed is None else seed,
                settings=self.parts.snapshot(options),
            )
            await self.parts.recorder.record(started)
        else:
            # A run keeps the options that it began with, whatever the settings say by now.
            options = {
                **options,
                **{k: v for k, v in started.settings.get("loop", {}).items() if k in options},
            }
        runtime.stream_writer(
            RunBegan(
                run_id=run_id,
                prompt=prompt,
                target=target,
                seed=started.seed,
                rounds=options["rounds"],
                images=options["images"],
            ).model_dump(mode="json")
        )
        return {
            "run_id": run_id,
            "prompt": prompt,
            "target": asked,
            "options": {**options, "seed": started.seed},
            "round": 0,
            "current": prompt,
            "comment": "",
            "rounds": [],
            "best": None,
            "status": RunStatus.RUNNING.value,
            "stop_reason": None,
            "gain": None,
            "best_gain": None,
            "warnings": self._unknown(runtime, run_id, prompt, []),
        }

    async def _find(
        self, runtime: Runtime[Context], prompt: str, target: dict[str, Any], seed: int | None
    ) -> tuple[str, RunStarted | None]:
        """The run that the request begins or continues; a thread may hold several, one after the other."""
        execution = runtime.execution_info
        thread = execution.thread_id if execution else None
        base = read_run_id(thread or new_run_id())
        count = 1
        while True:
            run_id = base if count == 1 else f"{base}.{count}"
            events = await self.parts.recorder.events(run_id)
            started = next((e for e in events if isinstance(e, RunStarted)), None)
            if started is None:
                return run_id, None
            finished = any(isinstance(e, RunFinished) and e.status is RunStatus.COMPLETED for e in events)
            same = (
                started.prompt == prompt
                and same_target(started.target.model_dump(mode="json"), target)
                and seed in (None, started.seed)
            )
            if same and not finished:
                return run_id, started
            count += 1

    # ---- generate

    async def generate(self, state: State, runtime: Runtime[Context]) -> dict[str, Any]:
        """Make the round's pictures that are not there yet."""
        run_id, number, prompt = state["run_id"], state["round"], state["current"]
        events = await self.parts.recorder.events(run_id)
        node = _node("generate", events)
        rewritten = next((e for e in events if isinstance(e, Rewritten) and e.round == number), None)
        runtime.stream_writer(
            RoundBegan(
                run_id=run_id,
                round=number,
                prompt=prompt,
                changes=rewritten.changes if rewritten else "",
                why=rewritten.why if rewritten else "",
            ).model_dump(mode="json")
        )
        made = {e.index: e for e in events if isinstance(e, ImageGenerated) and e.round == number}
        given_up = {
            e.index: e.reason
            for e in events
            if isinstance(e, GenerationFailed) and e.round == number and e.node == node
        }
        for event in made.values():
            _tell_image(runtime, event)
        rest = [i for i in range(state["options"]["images"]) if i not in made and i not in given_up]
        target = read_target(state["target"])
        requests = [
            ImageRequest(
                prompt=prompt, seed=candidate_seed(state["options"]["seed"], number, index), target=target
            )
            for index in rest
        ]

        async def one(index: int, request: ImageRequest) -> ImageGenerated:
            event = await paint(
                self.parts.generator,
                request,
                self.parts.recorder,
                run_id=run_id,
                round=number,
                index=index,
                node=node,
            )
            _tell_image(runtime, event)
            return event

        results = await asyncio.gather(*map(one, rest, requests), return_exceptions=True)
        failed: dict[int, Exception] = {}
        for index, result in zip(rest, results, strict=True):
            if isinstance(result, ImageGenerated):
                made[index] = result
            elif isinstance(result, Exception):
                failed[index] = _cause(result)
            else:
                raise result
        for error in failed.values():
            if isinstance(error, UserError) or (retryable(error) and _may_retry(runtime)):
                raise error
        for (index, error), request in zip(
            failed.items(), (requests[rest.index(i)] for i in failed), strict=True
        ):
            logger.warning("image %d of round %d failed", index, number, exc_info=error)
            given_up[index] = one_line(error)
            await self.parts.recorder.record(
                GenerationFailed(
                    run_id=run_id,
                    round=number,
                    index=index,
                    node=node,
                    prompt=prompt,
                    seed=request.seed,
                    reason=given_up[index],
                )
            )
        warnings = state["warnings"]
        if given_up:
            total, reason = state["options"]["images"], _most_common(given_up.values())
            what = (
                "no image could be made"
                if not made
                else f"{len(given_up)} of {total} images could not be made"
            )
            warnings = self._warn(runtime, run_id, f"round {number}: {what}: {reason}", warnings)
        return {"warnings": warnings, "stop_reason": None if made else StopReason.ERROR.value}

    # ---- critique

    async def critique(self, state: State, runtime: Runtime[Context]) -> dict[str, Any]:
        """Read the round's pictures, value them, and decide whether to go on."""
        run_id, number = state["run_id"], state["round"]
        target, options = read_target(state["target"]), state["options"]
        events = await self.parts.recorder.events(run_id)
        node, reward_node = _node("critique", events), _node("reward", events)
        tried = {
            e.index for e in events if isinstance(e, Rewarded) and e.round == number and e.node == reward_node
        }
        rounds = (await self._history(run_id))[: number + 1]
        todo: list[Candidate] = []
        for candidate in rounds[number].candidates:
            if candidate.reward is not None or candidate.index in tried:
                _tell_judged(runtime, run_id, candidate)
            else:
                todo.append(candidate)
        errors = await asyncio.gather(
            *(self._judge(state, runtime, candidate, target, node, reward_node) for candidate in todo)
        )
        for error in errors:
            if error is not None:
                raise error
        rounds = (await self._history(run_id))[: number + 1]
        current = rounds[number]
        stop = policy.decide(
            rounds,
            target,
            rounds=options["rounds"],
            tolerance=options["tolerance"],
            patience=options["patience"],
        )
        best = policy.best_of(rounds)
        rewards = [c.reward for c in current.candidates if c.reward is not None]
        runtime.stream_writer(
            RoundEnded(
                run_id=run_id,
                round=number,
                mean_reward=current.mean_reward,
                best_reward=max(rewards) if rewards else None,
                best=best.reward if best else None,
                judged=len(rewards),
                images=len(current.candidates),
            ).model_dump(mode="json")
        )
        warnings = state["warnings"]
        lacking = [c for c in current.candidates if c.reward is None]
        if lacking:
            reasons = _missing_reasons(lacking, await self.parts.recorder.events(run_id))
            kind = "critique" if any(isinstance(c.critique, Missing) for c in lacking) else "reward"
            total = len(current.candidates)
            what = f"no {kind} at all" if not rewards else f"{len(lacking)} of {total} {kind}s missing"
            warnings = self._warn(
                runtime, run_id, f"round {number}: {what}: {_most_common(reasons)}", warnings
            )
        summary = {
            "prompt": current.prompt,
            "images": [c.sha256 for c in current.candidates],
            "mean_reward": current.mean_reward,
        }
        return {
            "rounds": [*state["rounds"][:number], summary],
            "best": _reference(best) if best else None,
            "stop_reason": stop.value if stop else None,
            "warnings": warnings,
        }

    async def _judge(
        self,
        state: State,
        runtime: Runtime[Context],
        candidate: Candidate,
        target: EmotionTarget,
        node: str,
        reward_node: str,
    ) -> Exception | None:
        """Read and value what one candidate lacks; an error means that the node should be tried again."""
        parts, run_id, critique = self.parts, state["run_id"], candidate.critique
        place = {
            "run_id": run_id,
            "round": candidate.round,
            "index": candidate.index,
            "sha256": candidate.sha256,
        }
        read: list[Critiqued] = []
        if not isinstance(critique, Critique):
            image = await parts.recorder.get_image(candidate.sha256)
            reading = await parts.critic.read(image, state["prompt"], target, seed=candidate.seed)
            if (
                reading.error is not None
                and not parts.patient
                and retryable(reading.error)
                and _may_retry(runtime)
            ):
                return reading.error
            critique = reading.critique
            read.append(
                Critiqued(
                    **place,
                    node=node,
                    critique=critique,
                    model=parts.critic.model,
                    prompt_version=parts.critic.prompt.id,
                    usage=reading.usage,
                    seconds=round(reading.seconds, 4),
                )
            )
        value, reason = valued(parts.reward, critique, target)
        await parts.recorder.record(
            *read,
            Rewarded(
                **place,
                node=reward_node,
                name=parts.reward.name,
                version=parts.reward.version,
                value=value,
                reason=reason,
            ),
        )
        _tell_judged(runtime, run_id, candidate.model_copy(update={"critique": critique, "reward": value}))
        return None

    # ---- review and rewrite

    async def review(self, state: State, runtime: Runtime[Context]) -> dict[str, Any]:
        """Wait for a person. The answer is a comment, or any of `prompt`, `comment` and `stop`."""
        answer = interrupt(
            {
                "run_id": state["run_id"],
                "round": state["round"],
                "prompt": state["prompt"],
                "target": state["target"],
                "tried": state["current"],
                "best": state["best"],
            }
        )
        given = read_review(answer)
        if comment := given.get("comment") or "":
            best = state.get("best")
            await self.parts.recorder.record(
                HumanFeedback(
                    run_id=state["run_id"],
                    round=state["round"],
                    sha256=best["sha256"] if best else None,
                    comment=comment,
                )
            )
        if given.get("stop"):
            return {"stop_reason": StopReason.STOPPED.value}
        if prompt := given.get("prompt"):
            await self.parts.recorder.record(
                Rewritten(
                    run_id=state["run_id"],
                    round=state["round"] + 1,
                    prompt=prompt,
                    why=comment,
                    model="human",
                    prompt_version="human",
                )
            )
        return {"comment": comment}

    async def rewrite(self, state: State, runtime: Runtime[Context]) -> dict[str, Any]:
        """Write the next round's prompt."""
        run_id, number = state["run_id"], state["round"] + 1
        events = await self.parts.recorder.events(run_id)
        event = next((e for e in events if isinstance(e, Rewritten) and e.round == number), None)
        if event is None:
            event = await self._write(state, runtime, number)
        warnings = state["warnings"]
        if event.why.startswith(KEPT):
            warnings = self._warn(runtime, run_id, f"round {number}: {event.why}", warnings)
        warnings = self._unknown(runtime, run_id, event.prompt, warnings, f"round {number}: ")
        return {"round": number, "current": event.prompt, "comment": "", "warnings": warnings}

    async def _write(self, state: State, runtime: Runtime[Context], number: int) -> Rewritten:
        parts, run_id = self.parts, state["run_id"]
        rounds = (await self._history(run_id))[:number]
        rewrite = await parts.rewriter.rewrite(
            state["prompt"],
            read_target(state["target"]),
            rounds,
            comment=state.get("comment", ""),
            seed=candidate_seed(state["options"]["seed"], number, -1),
        )
        if (
            rewrite.error is not None
            and not parts.patient
            and retryable(rewrite.error)
            and _may_retry(runtime)
        ):
            raise rewrite.error
        event = Rewritten(
            run_id=run_id,
            round=number,
            prompt=rewrite.prompt,
            changes=rewrite.changes,
            why=rewrite.why,
            model=parts.rewriter.model,
            prompt_version=parts.rewriter.prompt.id,
            usage=rewrite.usage,
            seconds=round(rewrite.seconds, 4),
        )
        await parts.recorder.record(event)
        return event

    # ---- finish

    async def finish(self, state: State, runtime: Runtime[Context]) -> dict[str, Any]:
        """Name the winner and close the run."""
        run_id, stop = state["run_id"], StopReason(state["stop_reason"] or StopReason.ERROR)
        failed = stop in (StopReason.NO_CRITIQUE, StopReason.ERROR)
        status = RunStatus.FAILED if failed else RunStatus.COMPLETED
        result = await asyncio.to_thread(load_run, self.parts.recorder.store, run_id)
        best = result.best
        events = await self.parts.recorder.events(run_id)
        await self.parts.recorder.record(
            RunFinished(
                run_id=run_id,
                node=_node("finish", events),
                status=status,
                stop_reason=stop,
                best=best.sha256 if best else None,
                best_round=best.round if best else None,
                gain=result.gain,
                best_gain=result.best_gain,
                warnings=state["warnings"],
            )
        )
        return {
            "status": status.value,
            "stop_reason": stop.value,
            "best": _reference(best) if best else None,
            "gain": result.gain,
            "best_gain": result.best_gain,
        }

    # ---- shared

    async def _history(self, run_id: str) -> list[Round]:
        return (await asyncio.to_thread(load_run, self.parts.recorder.store, run_id)).rounds

    def _warn(self, runtime: Runtime[Context], run_id: str, message: str, warnings: list[str]) -> list[str]:
        if message in warnings:
            return warnings
        runtime.stream_writer(Warned(run_id=run_id, message=message).model_dump(mode="json"))
        return [*warnings, message]

    def _unknown(
        self, runtime: Runtime[Context], run_id: str, prompt: str, warnings: list[str], where: str = ""
    ) -> list[str]:
        # A rewriter keeps the neutral prompt's words, and once is enough to be told of each.
        message = unknown_words(self.parts.generator, prompt, said="\n".join(warnings))
        warnings = self._warn(runtime, run_id, where + message, warnings) if message else warnings
        unread = unread_text(self.parts.generator, prompt)
        if not unread:
            return warnings
        message = f"the prompt is too long for the model, which does not read its end: {unread!r}"
        return self._warn(runtime, run_id, where + message, warnings)


def check_request(parts: Parts, prompt: Any, target: Any) -> tuple[str, EmotionTarget]:
    """Read a request before anything is written for it.

    Raises:
        UserError: The prompt or target is none; or, in strict mode, a word that the generator does not know.
    """
    text, wanted = read_prompt(prompt), read_target(target)
    if parts.settings.generator.strict and (message := unknown_words(parts.generator, text)):
        raise UserError(message)
    return text, wanted


def unknown_words(generator: Generator, prompt: str, said: str = "") -> str | None:
    """One line that names the words which the generator does not know, with the nearest it does; or None.

    Words that `said` names in quotes are left out.
    """
    unknown = [u for u in generator.unknown_words(prompt) if repr(u.word) not in said]
    if not unknown:
        return None
    named = "; ".join(
        f"{u.word!r} (nearest: {', '.join(u.nearest)})" if u.nearest else repr(u.word) for u in unknown
    )
    return f"the model does not know {named}"


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


def _node(name: str, events: list[Event]) -> str:
    """A node's name in this attempt at the run.

    A run that failed may be resumed, and what failed is tried again: under another name, since the log skips
    what it knows.
    """
    failures = sum(isinstance(e, RunFinished) and e.status is not RunStatus.COMPLETED for e in events)
    return f"{name}.{failures + 1}" if failures else name


def _may_retry(runtime: Runtime[Context]) -> bool:
    execution = runtime.execution_info
    return execution is not None and execution.node_attempt < ATTEMPTS


def _cause(error: Exception) -> Exception:
    """What stands behind a generator's error, which speaks of a batch: we ask for one image at a time."""
    cause = error.__cause__ if isinstance(error, GenerationError) else None
    return cause if isinstance(cause, Exception) else error


def _missing_reasons(lacking: list[Candidate], events: list[Event]) -> list[str]:
    """Why each of the candidates has no reward; the log knows for those that were read."""
    logged = {(e.round, e.index): e.reason for e in events if isinstance(e, Rewarded)}
    return [
        it.critique.reason
        if isinstance(it.critique, Missing)
        else logged.get((it.round, it.index)) or "the reward could not be had"
        for it in lacking
    ]


def _most_common(reasons: Any) -> str:
    counts = Counter(reasons)
    reason, _ = counts.most_common(1)[0]
    return reason if len(counts) == 1 else f"{reason} (and {len(counts) - 1} other reasons)"


def _reference(candidate: Candidate) -> dict[str, Any]:
    return {
        "round": candidate.round,
        "index": candidate.index,
        "sha256": candidate.sha256,
        "image": str(candidate.path) if candidate.path else None,
        "prompt": candidate.prompt,
        "seed": candidate.seed,
        "reward": candidate.reward,
    }


def _tell_image(runtime: Runtime[Context], event: ImageGenerated) -> None:
    runtime.stream_writer(
        ImageMade(
            run_id=event.run_id, round=event.round, index=event.index, sha256=event.sha256, seed=event.seed
        ).model_dump(mode="json")
    )


def _tell_judged(runtime: Runtime[Context], run_id: str, candidate: Candidate) -> None:
    if candidate.critique is not None:
        runtime.stream_writer(
            Judged(
                run_id=run_id,
                round=candidate.round,
                index=candidate.index,
                critique=candidate.critique,
                reward=candidate.reward,
            ).model_dump(mode="json")
        )
