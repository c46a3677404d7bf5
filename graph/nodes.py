"""The nodes of the graph.

Each node first reads the log for what is already there and does only the rest, so it may be run again after
any crash, at any time, from any checkpoint or from none: an acknowledged picture is not made twice. What a
node decides follows from the log alone, which is why a resumed run picks what an undisturbed one would have.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import secrets
from functools import partial
from typing import Any

from langgraph.runtime import Runtime
from langgraph.types import interrupt

from ..agents.ask import one_line
from ..agents.critic import Reading, valued
from ..agents.generator import paint
from ..agents.rewriters import RewriteRequest, propose
from ..domain import (
    Critique,
    EmotionTarget,
    Missing,
    RunStatus,
    StopReason,
    UserError,
    read_target,
)
from ..events import (
    Critiqued,
    Event,
    GenerationFailed,
    ImageGenerated,
    Rewarded,
    RunFinished,
    RunStarted,
)
from ..tools.images.base import GenerationError, ImageRequest
from ..traces.fold import Fold, Tried
from . import policy
from .edits import answered, check_prompt_stands, follow
from .finals import DELIVERS, final_round, finalists
from .panel import LoggedPanel
from .parts import Parts, check_request, prompt_notes
from .retry import ATTEMPTS, retryable
from .rounds import rewritten, shown, wanted
from .state import (
    Context,
    State,
    asks_the_same,
    candidate_seed,
    new_run_id,
    picture_url,
    read_review,
    read_seed,
    thread_run_id,
)

logger = logging.getLogger(__name__)


class Nodes:
    """The nodes, bound to their parts."""

    def __init__(self, parts: Parts) -> None:
        self.parts = parts

    # ---- start

    async def start(self, state: State, runtime: Runtime[Context]) -> dict[str, Any]:
        """Check the request, name the run and log it; or find the run that it continues."""
        # A server's client may leave one out.
        prompt, target = check_request(self.parts, state.get("prompt"), state.get("target"))
        # Inside another graph, the context is that graph's own.
        context: Any = runtime.context
        options = (context if isinstance(context, Context) else Context()).over(self.parts.settings.loop)
        await asyncio.to_thread(self.parts.rewriter, options["rewriter"])
        seed = read_seed(state.get("seed"))
        asked = target.model_dump(mode="json", exclude_none=True)
        run_id, started = await self._find(runtime, prompt, target, seed)
        options = self.parts.resolved(options)
        while started is None:
            begun = RunStarted(
                run_id=run_id,
                prompt=prompt,
                target=target,
                seed=secrets.randbelow(2**31) if seed is None else seed,
                settings=self.parts.snapshot(options),
                warnings=prompt_notes(self.parts.generator, prompt, []),
            )
            [stands] = await self._record(runtime, begun)
            assert isinstance(stands, RunStarted)
            if asks_the_same(stands, prompt, target, seed):
                started = stands
            else:  # another request took the name at the same moment
                run_id, started = await self._find(runtime, prompt, target, seed)
        # A run keeps the options that it began with, whatever the settings say by now; one from before there were
        # several prompts in a round has one.
        kept = {"proposals": 1, "oversample": 1, **started.settings.get("loop", {})}
        options = self.parts.resolved(options | {k: v for k, v in kept.items() if k in options})
        fold = await self.parts.recorder.fold(run_id, fresh=False)
        return {
            "run_id": run_id,
            "prompt": prompt,
            "target": asked,
            "options": {**options, "seed": started.seed},
            "round": 0,
            "current": fold.prompt(0),
            "comment": "",
            "answered": max(fold.rewrites, default=0),
            "rounds": [],
            "best": None,
            "status": RunStatus.RUNNING.value,
            "stop_reason": None,
            "gain": None,
            "best_gain": None,
            "warnings": started.warnings,
        }

    async def _find(
        self, runtime: Runtime[Context], prompt: str, target: EmotionTarget, seed: int | None
    ) -> tuple[str, RunStarted | None]:
        """The run that the request begins or continues; a thread may hold several, one after the other."""
        execution = runtime.execution_info
        thread = execution.thread_id if execution else None
        base = new_run_id() if thread is None else thread_run_id(thread)
        # Inside another graph the thread is that graph's, and the namespace names the task that called us: the
        # branches of a fan-out share the one and differ in the other.
        if execution and (caller := execution.checkpoint_ns.rpartition("|")[0]):
            base += f":{hashlib.sha256(caller.encode()).hexdigest()[:8]}"
        count = 1
        while True:
            run_id = base if count == 1 else f"{base}.{count}"
            fold = await self.parts.recorder.fold(run_id)
            started = fold.started
            if started is None:
                return run_id, None
            if asks_the_same(started, prompt, target, seed) and fold.status is not RunStatus.COMPLETED:
                return run_id, started
            count += 1

    # ---- generate

    async def generate(self, state: State, runtime: Runtime[Context]) -> dict[str, Any]:
        """Make the round's pictures that are not there yet."""
        number, options = state["round"], state["options"]
        run_id, edits = await follow(self.parts.recorder, state)
        await self._record(runtime, *edits)
        fold = await self.parts.recorder.fold(run_id, fresh=False)
        node, target = _node("generate", fold), read_target(state["target"])
        row, prompt = fold.round(number), fold.prompt(number)
        made = {index for index, tried in row.items() if tried.made}
        given_up = {index for index, tried in row.items() if tried.failed and tried.failed.node == node}
        prompts = [it.prompt for it in fold.proposals(number)]
        show = prompts * 2 if number == fold.final else shown(prompts, number, options)
        requests = {
            index: ImageRequest(prompt=it, seed=candidate_seed(options["seed"], number, index), target=target)
            for index, it in enumerate(show)
            if index not in made | given_up
        }

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
            _tell(runtime, event)
            return event

        results = await asyncio.gather(
            *(one(index, request) for index, request in requests.items()), return_exceptions=True
        )
        failed: dict[int, Exception] = {}
        for index, result in zip(requests, results, strict=True):
            if isinstance(result, ImageGenerated):
                made.add(index)
            elif isinstance(result, Exception):
                failed[index] = _cause(result)
            else:
                raise result
        for error in failed.values():
            if isinstance(error, UserError) or (retryable(error) and _may_retry(runtime)):
                raise error
        for index, error in failed.items():
            logger.warning("image %d of round %d failed", index, number, exc_info=error)
        await self._record(
            runtime,
            *(
                GenerationFailed(
                    run_id=run_id,
                    round=number,
                    index=index,
                    node=node,
                    prompt=requests[index].prompt,
                    seed=requests[index].seed,
                    reason=one_line(error),
                )
                for index, error in failed.items()
            ),
        )
        fold = await self.parts.recorder.fold(run_id, fresh=False)
        # Without final pictures there is still what was to be delivered.
        stop = None if made or number == fold.final else StopReason.ERROR.value
        return {"run_id": run_id, "current": prompt, "warnings": fold.warnings(), "stop_reason": stop}

    # ---- critique

    async def critique(self, state: State, runtime: Runtime[Context]) -> dict[str, Any]:
        """Read the round's pictures, value them, and decide whether to go on."""
        number, options = state["round"], state["options"]
        fold = await self.parts.recorder.fold(state["run_id"], fresh=False)
        check_prompt_stands(state, fold)
        nodes = _node("critique", fold), _node("reward", fold)
        todo = [
            tried
            for _, tried in sorted(fold.round(number).items())
            if tried.made
            and tried.reward is None
            and (tried.rewarded is None or tried.rewarded.node != nodes[1])
        ]
        errors = await asyncio.gather(*(self._judge(state, runtime, tried, nodes) for tried in todo))
        for error in errors:
            if error is not None:
                raise error
        fold = await self.parts.recorder.fold(state["run_id"], fresh=False)
        stop = policy.decide(
            fold,
            number,
            read_target(state["target"]),
            rounds=options["rounds"],
            tolerance=options["tolerance"],
            patience=options["patience"],
            exhaust=options["exhaust"],
            spent=policy.is_spent(fold, options),
        )
        if number == fold.final:
            stop = StopReason(state.get("ended") or StopReason.ROUNDS_USED)
        more = stop in DELIVERS and number != fold.final and finalists(fold, options) > 0
        ended = stop if more else None
        summary = {
            "prompt": fold.prompt(number),
            "images": [tried.made.sha256 for _, tried in sorted(fold.round(number).items()) if tried.made],
            "mean_reward": fold.mean_reward(number),
        }
        return {
            "rounds": [*state["rounds"][:number], summary],
            "best": self._best(fold),
            "stop_reason": stop.value if stop and not ended else None,
            "ended": ended.value if ended else None,
            "warnings": fold.warnings(),
        }

    async def _judge(
        self, state: State, runtime: Runtime[Context], tried: Tried, nodes: tuple[str, str]
    ) -> Exception | None:
        """Read and value what one candidate lacks; an error means that the node should be tried again."""
        parts, made, critique = self.parts, tried.made, tried.critique
        assert made is not None
        target = read_target(state["target"])
        place: dict[str, Any] = {
            "run_id": made.run_id,
            "round": made.round,
            "index": made.index,
            "sha256": made.sha256,
        }
        read: list[Critiqued] = []
        png, lost = None, Missing(reason="")
        if parts.reward.sees or not isinstance(critique, Critique):
            try:
                png = await self._picture(made, target)
            except _Lost as error:
                lost = Missing(reason=str(error))
        if not isinstance(critique, Critique):
            if png is None:
                reading = Reading(lost)
            else:
                reading = await parts.critic.read(png, state["prompt"], target, seed=made.seed or 0)
            if self._try_again(reading.error, runtime):
                return reading.error
            critique = reading.critique
            read.append(
                Critiqued(
                    **place,
                    node=nodes[0],
                    critique=critique,
                    model=parts.critic.model,
                    prompt_version=parts.critic.prompt.id,
                    usage=reading.usage,
                    seconds=round(reading.seconds, 4),
                )
            )
        unseen = parts.reward.sees and png is None
        values = await valued(parts.reward, lost if unseen else critique, target, state["prompt"], png)
        await self._record(
            runtime,
            *read,
            *(
                Rewarded(**place, node=nodes[1] if it.weight is None else f"{nodes[1]}:{it.name}", **vars(it))
                for it in values
            ),
        )
        return None

    async def _picture(self, made: ImageGenerated, target: EmotionTarget) -> bytes:
        """A logged picture; one that is lost or damaged is made again from its event.

        Raises:
            _Lost: It cannot be made again.
        """
        recorder = self.parts.recorder
        try:
            return await recorder.get_png(made.sha256)
        except OSError as error:
            logger.warning("picture %s of run %s: %s; making it again", made.sha256, made.run_id, error)
            if made.seed is None:
                raise _Lost(f"the picture is lost ({one_line(error)}) and its seed is not known") from error
            request = ImageRequest(prompt=made.prompt, seed=made.seed, target=target)
            [again] = await self.parts.generator.generate([request])
            if await recorder.put_image(again.image) != made.sha256:
                raise _Lost(f"the picture is lost ({one_line(error)}) and comes out otherwise now") from error
            return await recorder.get_png(made.sha256)

    # ---- review and rewrite

    async def review(self, state: State, runtime: Runtime[Context]) -> dict[str, Any]:
        """Wait for a person. The answer is a comment, or any of `prompt`, `comment` and `stop`.

        A wrong answer is asked again, with the reason as `wrong`.
        """
        fold = await self.parts.recorder.fold(state["run_id"], fresh=False)
        check_prompt_stands(state, fold)
        if state["round"] < state.get("answered", 0):
            return {}  # answered before the run broke off
        question = {
            "run_id": state["run_id"],
            "events": fold.events,
            "round": state["round"],
            "prompt": state["prompt"],
            "target": state["target"],
            "tried": state["current"],
            "best": state["best"],
        }
        given = None
        while given is None:
            try:
                given = read_review(interrupt(question))
            except UserError as error:  # the answer is saved, so the person is asked once more
                question = {**question, "wrong": str(error)}
        run_id, told = await answered(self.parts.recorder, state, given)
        await self._record(runtime, *told)
        if given.get("stop"):
            return {"run_id": run_id, "stop_reason": StopReason.STOPPED.value}
        return {"run_id": run_id, "comment": given.get("comment") or ""}

    async def rewrite(self, state: State, runtime: Runtime[Context]) -> dict[str, Any]:
        """Write the next round's prompts."""
        # Before anything was painted, the rewrite is for round 0 itself.
        number = state["round"] + 1 if state["rounds"] else 0
        fold = await self.parts.recorder.fold(state["run_id"], fresh=False)
        check_prompt_stands(state, fold)
        # They are committed together, so that there are all or none.
        if number not in fold.rewrites:
            await self._write(state, runtime, fold, number)
        fold = await self.parts.recorder.fold(state["run_id"], fresh=False)
        return {
            "round": number,
            "current": fold.prompt(number),
            "comment": "",
            "warnings": fold.warnings(),
        }

    async def _write(self, state: State, runtime: Runtime[Context], fold: Fold, number: int) -> None:
        parts, options, target = self.parts, state["options"], read_target(state["target"])
        rewriter, count = parts.rewriter(options["rewriter"]), wanted(number, options)
        panel = LoggedPanel(
            *(fold, number, _node("persona", fold), options, parts.settings.loop.persona_folder),
            record=partial(self._record, runtime),
            again=partial(self._try_again, runtime=runtime),
        )
        request = RewriteRequest(
            *(state["prompt"], target, fold.rounds(parts.recorder.store.blobs.path)[:number]),
            comment=state.get("comment", ""),
            seed=candidate_seed(options["seed"], number, -1),
            count=count,
            panel=panel,
            **await parts.knowledge.advice(fold, target, number, options, count),
        )
        rewrites = await propose(rewriter, request)
        for error in (panel.error, rewrites[0].error):
            if error is not None and self._try_again(error, runtime):
                raise error
        await self._record(runtime, *rewritten(rewrites, rewriter, parts.generator, state, number))

    # ---- finish

    async def final(self, state: State, runtime: Runtime[Context]) -> dict[str, Any]:
        """Begin the round in which the best prompts are painted and read again."""
        fold = await self.parts.recorder.fold(state["run_id"], fresh=False)
        await self._record(runtime, *(begun := final_round(fold, finalists(fold, state["options"]))))
        return {"round": begun[0].round, "current": begun[0].prompt}

    async def finish(self, state: State, runtime: Runtime[Context]) -> dict[str, Any]:
        """Name the winner and close the run."""
        stop = StopReason(state["stop_reason"] or StopReason.ERROR)
        failed = stop in (StopReason.NO_CRITIQUE, StopReason.NO_REWARD, StopReason.ERROR)
        status = RunStatus.FAILED if failed else RunStatus.COMPLETED
        fold = await self.parts.recorder.fold(state["run_id"], fresh=False)
        best = self._best(fold)
        await self._record(
            runtime,
            RunFinished(
                run_id=state["run_id"],
                node=_node("finish", fold),
                status=status,
                stop_reason=stop,
                best=best["sha256"] if best else None,
                best_round=best["round"] if best else None,
                gain=fold.gain,
                best_gain=fold.best_gain,
                estimate=fold.estimate,
                warnings=fold.warnings(),
            ),
        )
        return {
            "status": status.value,
            "stop_reason": stop.value,
            "best": best,
            "gain": fold.gain,
            "best_gain": fold.best_gain,
        }

    # ---- shared

    async def _record(self, runtime: Runtime[Context], *events: Event) -> list[Event]:
        """Commit events and tell the stream; what stands in the log is returned, not what was given."""
        stand = await self.parts.recorder.record(*events)
        for event in stand:
            _tell(runtime, event)
        return stand

    def _try_again(self, error: Exception | None, runtime: Runtime[Context]) -> bool:
        return error is not None and not self.parts.patient and retryable(error) and _may_retry(runtime)

    def _best(self, fold: Fold) -> dict[str, Any] | None:
        """The best candidate as the state names it."""
        best = fold.candidate(fold.best, self.parts.recorder.store.blobs.path) if fold.best else None
        if best is None:
            return None
        named = best.model_dump(include={"round", "index", "sha256", "prompt", "seed", "reward"})
        return {**named, "image": str(best.path), "url": picture_url(best.sha256)}


class _Lost(Exception):
    """A logged picture is gone."""


def _node(name: str, fold: Fold) -> str:
    """A node's name in this attempt at the run.

    A run that failed may be resumed, and what failed is tried again: under another name, since the log skips
    what it knows.
    """
    return f"{name}.{fold.failures + 1}" if fold.failures else name


def _may_retry(runtime: Runtime[Context]) -> bool:
    execution = runtime.execution_info
    return execution is not None and execution.node_attempt < ATTEMPTS


def _cause(error: Exception) -> Exception:
    """What stands behind a generator's error, which speaks of a batch: we ask for one image at a time."""
    cause = error.__cause__ if isinstance(error, GenerationError) else None
    return cause if isinstance(cause, Exception) else error


def _tell(runtime: Runtime[Context], event: Event) -> None:
    # LangGraph's `custom` stream is for clients of a server, so it is plain JSON, with an address for a picture.
    sha256 = getattr(event, "sha256", None)
    url = {"url": picture_url(sha256)} if sha256 else {}
    runtime.stream_writer({**event.model_dump(mode="json"), **url})
