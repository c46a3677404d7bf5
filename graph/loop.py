"""The loop as a Python program uses it: models loaded once, many runs at the same time.

    async with open_loop() as loop:
        result = await loop.run("a dog by the sea", EmotionTarget(valence=2, arousal=-1))

`with open_loop() as loop: loop.run_sync(...)` does the same from a notebook or a script without asyncio.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Mapping, Sequence
from concurrent.futures import Future
from contextlib import AsyncExitStack, ExitStack, aclosing, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from anyio.from_thread import BlockingPortal, start_blocking_portal
from langchain_core.language_models import BaseChatModel
from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.base import BaseCheckpointSaver
from langgraph.graph.state import CompiledStateGraph
from langgraph.types import Command, StateSnapshot
from pydantic import BaseModel
from typing_extensions import Unpack

from ..agents.ask import one_line
from ..domain import EmotionTarget, Failure, RunResult, RunStatus, UserError
from ..events import Event, RunStarted
from ..files import check_writable
from ..settings import (
    GeneratorSettings,
    LVLMSettings,
    Settings,
    SettingsOverrides,
    as_dict,
    generator_settings,
    load_settings,
    lvlm_settings,
    merged,
)
from ..tools.images.base import Generator
from ..traces.fold import Fold
from ..traces.recorder import StoreRecorder
from .build import build_graph
from .checkpoint import open_checkpointer
from .options import OnEvent, ResumeKeywords, Reviewer, RunKeywords, RunOptions
from .parts import Parts, check_chat_model, check_request, open_parts
from .state import Context, RunInput, State, asks_the_same, new_run_id, read_review, read_run_id, read_seed

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


logger = logging.getLogger(__name__)

T = TypeVar("T")

#: Begins nothing: the run waits for an answer that was not given.
_WAIT = object()


_OPEN = "this loop is open already: open another, or use this one for many runs at a time"


def open_loop(
    settings: Settings | None = None,
    *,
    generator: str
    | Path
    | Mapping[str, Any]
    | GeneratorSettings
    | DiffusionPipeline
    | Generator
    | None = None,
    lvlm: str | Path | Mapping[str, Any] | LVLMSettings | BaseChatModel | None = None,
    reward: str | Mapping[str, float] | Callable[..., Any] | type[Any] | None = None,
    checkpointer: BaseCheckpointSaver[Any] | None = None,
    **overrides: Unpack[SettingsOverrides],
) -> Loop:
    """A loop, to be entered with `async with` or `with`.

    Args:
        settings: Resolved settings; by default those of environment and `emoloop.toml`.
        generator: A preset, folder or hub id; settings; a diffusers pipeline or any `Generator`.
        lvlm: A preset, folder or hub id, the URL of a vLLM server; settings; any LangChain chat model that
            takes images.
        reward: A name or a dotted path; several with weights (`{"emotion": 1, "pickscore": 0.5}`); or a function of
            `(critique, target)`, `(picture, prompt, critique, target)` or `(pictures, prompts, critiques, targets)`,
            plain or async.
        checkpointer: Where the graph's states are saved, opened and closed by the caller; by default a file in the
            home, or the log's PostgreSQL.
        **overrides: Any other setting: `home="runs"`, `loop={"rounds": 2}`.

    Raises:
        UserError: An unknown setting, a value out of range, or an `lvlm` that is no chat model.
    """
    objects: dict[str, Any] = {}
    given: dict[str, Any] = {
        key: as_dict(it) if isinstance(it, Mapping | BaseModel) else it for key, it in overrides.items()
    }
    if generator is None or isinstance(generator, str | Path | Mapping | GeneratorSettings):
        given = merged(given, {"generator": generator_settings(generator)})
    else:
        objects["generator"] = generator
    if lvlm is None or isinstance(lvlm, str | Path | Mapping | LVLMSettings):
        given = merged(given, {"lvlm": lvlm_settings(lvlm)})
    else:
        check_chat_model(lvlm)
        objects["lvlm"] = lvlm
    if isinstance(reward, str | Mapping):
        given = merged(given, {"loop": {"reward": reward}})
    else:
        objects["reward"] = reward
    return Loop(load_settings(given, settings), checkpointer=checkpointer, **objects)


class Loop:
    """Generator, critic, rewriter and log around one compiled graph; made by `open_loop`.

    Attributes:
        settings: The resolved settings.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        generator: Any = None,
        lvlm: Any = None,
        reward: Any = None,
        checkpointer: BaseCheckpointSaver[Any] | None = None,
    ) -> None:
        self.settings = settings
        self._checkpointer = checkpointer
        self._given = {"generator": generator, "lvlm": lvlm, "reward": reward}
        self._parts: Parts | None = None
        self._stack: AsyncExitStack | None = None
        self._event_loop: asyncio.AbstractEventLoop | None = None
        self._portal: BlockingPortal | None = None
        self._closing = ExitStack()
        self._working: set[asyncio.Task[Any]] = set()

    # ---- opening and closing

    async def __aenter__(self) -> Loop:
        """Load the models, then open the log: nothing is written before everything is known to be there.

        Raises:
            UserError: A model, an adapter, a server or the home cannot be used.
        """
        if self._stack is not None:
            raise RuntimeError(_OPEN)
        # Before any model is loaded.
        await asyncio.to_thread(check_writable, self.settings.home, "home", "set another with EMOLOOP_HOME")
        async with AsyncExitStack() as stack:
            self._parts = await open_parts(self.settings, self._given, stack)
            saver = self._checkpointer or await stack.enter_async_context(open_checkpointer(self.settings))
            self._graph = build_graph(self._parts, saver)
            self._stack = stack.pop_all()
        self._event_loop = asyncio.get_running_loop()
        return self

    async def __aexit__(self, *_: object) -> None:
        stack, self._stack, self._parts = self._stack, None, None
        # What is still running ends first, with an error of its own and not with those of closed models.
        for work in self._working:
            work.cancel()
        if self._working:
            await asyncio.wait(self._working)
        if stack is not None:
            await stack.aclose()

    def __enter__(self) -> Loop:
        """As `async with`, on an event loop in a thread of its own."""
        if self._stack is not None or self._portal is not None:
            raise RuntimeError(_OPEN)
        with ExitStack() as stack:
            portal = stack.enter_context(start_blocking_portal())
            stack.enter_context(portal.wrap_async_context_manager(self))
            self._portal, self._closing = portal, stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._portal = None
        self._closing.close()

    @property
    def parts(self) -> Parts:
        """Generator, critic, rewriter, reward and recorder, for those who want one of them alone.

        Raises:
            RuntimeError: The loop is not open.
        """
        if self._parts is None:
            raise RuntimeError("the loop is not open: use `async with open_loop() as loop` (or plain `with`)")
        return self._parts

    @property
    def graph(self) -> CompiledStateGraph[State, Context, RunInput, State]:
        """The compiled LangGraph, which works while the loop is open: `aget_state`, `astream`, and
        `ainvoke({"prompt": …, "target": {…}}, {"configurable": {"thread_id": …}})` as usual.

        Raises:
            RuntimeError: The loop is not open.
        """
        _ = self.parts  # says so itself where the loop is not open
        return self._graph

    @property
    def recorder(self) -> StoreRecorder:
        """The log."""
        return self.parts.recorder

    # ---- running

    async def run(
        self,
        prompt: str,
        target: EmotionTarget | Mapping[str, Any],
        *,
        seed: int | None = None,
        run_id: str | None = None,
        on_event: OnEvent | None = None,
        reviewer: Reviewer | None = None,
        **options: Unpack[RunOptions],
    ) -> RunResult:
        """Run the loop for one request.

        Args:
            prompt: The neutral prompt.
            target: The wanted emotion.
            seed: Makes the run repeatable; drawn at random, and logged, where it is left out.
            run_id: Name of the run. A run of this name that broke off is continued, one that is complete is
                returned as it is.
            on_event: Called with each event of `stream`.
            reviewer: Answers reviews (`review=True`); without one, the run returns with status INTERRUPTED
                and waits for `resume`.
            **options: Those of `RunOptions`, over the settings.

        Returns:
            The result; look at `status`. A run in which a round got no critique at all, or no image, is
            FAILED with a `stop_reason`, and keeps what it has.

        Raises:
            UserError: The request is wrong; nothing was written.
            Exception: What went wrong beyond retries; the run is saved and `resume` continues it.
        """
        name = read_run_id(run_id) if run_id is not None else new_run_id()
        events = self.stream(prompt, target, seed=seed, run_id=name, **options)
        return await self._finish(name, events, on_event, reviewer)

    async def resume(
        self,
        run_id: str,
        answer: Any = None,
        *,
        on_event: OnEvent | None = None,
        reviewer: Reviewer | None = None,
    ) -> RunResult:
        """Go on with a run that broke off, failed, or waits for a review; finished work is not repeated.

        Args:
            run_id: The run's id, an unambiguous beginning of it, or "last".
            answer: The answer to a review.
            on_event: As for `run`.
            reviewer: As for `run`.

        Raises:
            UserError: No such run, it was made with another model or reward than this loop's, or the answer
                is none; the run waits as before.
        """
        name = await asyncio.to_thread(self.recorder.store.resolve, run_id)
        return await self._finish(name, self.stream_resume(name, answer), on_event, reviewer)

    async def stream(
        self,
        prompt: str,
        target: EmotionTarget | Mapping[str, Any],
        *,
        seed: int | None = None,
        run_id: str | None = None,
        **options: Unpack[RunOptions],
    ) -> AsyncGenerator[Event]:
        """As `run`, yielding the run's events as they are committed.

        A run that was begun before is told from its beginning. The last event is `run_finished`; without one, the
        run waits for a review (`loop.review(run_id)` has the question).

        Raises:
            UserError: The request is wrong; nothing was written.
        """
        text, wanted = await asyncio.to_thread(check_request, self.parts, prompt, target)
        context = _context(options)
        context.over(self.settings.loop)
        seed = read_seed(seed)
        name = read_run_id(run_id) if run_id is not None else new_run_id()
        fold = await self.recorder.fold(name)
        if fold.events:
            if not asks_the_same(_started(fold), text, wanted, seed):
                raise UserError(f"run {name!r} exists and was asked for something else: choose another id")
            events = self.stream_resume(name)
        else:
            events = self._drive(_request(text, wanted, seed), name, context)
        async with aclosing(events):
            async for event in events:
                yield event

    async def stream_resume(self, run_id: str, answer: Any = None) -> AsyncGenerator[Event]:
        """As `resume`, yielding all events of the run, those of before first."""
        name = await asyncio.to_thread(self.recorder.store.resolve, run_id)
        log = await self.recorder.events(name)
        fold = Fold(name, log)
        if fold.status is RunStatus.COMPLETED:
            for event in log:
                yield event
            return
        self.parts.check_same(name, log)
        if await self.review(name) is not None:
            # A wrong answer must not get into the saved state: every later try would meet it again.
            # LangGraph takes an empty object for no answer.
            begin = _WAIT if answer is None else Command(resume=read_review(answer) or {"comment": ""})
        else:
            started = _started(fold)
            begin = _request(started.prompt, started.target, started.seed)
        async with aclosing(self._drive(begin, name, None)) as events:
            async for event in events:
                yield event

    async def review(self, run_id: str) -> dict[str, Any] | None:
        """What a run asks a person: round, prompt, target, tried, best; None where it does not wait for one."""
        snapshot = await self._snapshot(run_id)
        if snapshot is None or not snapshot.interrupts:
            return None
        question, fold = snapshot.interrupts[0].value, await self.recorder.fold(run_id)
        # A log restored from an older copy does not hold all that the person was shown, and one that goes on beyond
        # has the answer. Such a run begins anew, and finds in the log what is done.
        stands = question.get("events", 0) <= fold.events and question["round"] + 1 not in fold.rewrites
        return question if stands else None

    def run_sync(
        self, prompt: str, target: EmotionTarget | Mapping[str, Any], **options: Unpack[RunKeywords]
    ) -> RunResult:
        """`run` for code without asyncio; takes the same arguments.

        Raises:
            RuntimeError: Called from inside the event loop that the loop lives in; use `await loop.run(…)`.
        """
        return self._sync(partial(self.run, prompt, target, **options))

    def resume_sync(self, run_id: str, answer: Any = None, **options: Unpack[ResumeKeywords]) -> RunResult:
        """`resume` for code without asyncio."""
        return self._sync(partial(self.resume, run_id, answer, **options))

    async def forget(self, run_id: str) -> None:
        """Drop a finished run's saved states; the log keeps the run."""
        saver = self.graph.checkpointer
        if isinstance(saver, BaseCheckpointSaver):
            await saver.adelete_thread(run_id)

    # ---- inside

    async def _drive(self, begin: Any, run_id: str, context: Context | None) -> AsyncGenerator[Event]:
        """Run the graph, yielding the run's events from its first one on.

        The graph runs in a task of its own, so that nothing of it is left in the caller's context between events.
        """
        loop, queue = asyncio.get_running_loop(), asyncio.Queue[Event | None]()

        def follow(events: Sequence[Event]) -> None:
            loop.call_soon_threadsafe(lambda: [queue.put_nowait(event) for event in events])

        if begin is _WAIT:
            for event in await self.recorder.events(run_id):
                yield event
            return
        with self.recorder.followed(run_id, follow):
            claimed = asyncio.Event()
            work = asyncio.create_task(self._invoke(begin, run_id, context, claimed))
            self._working.add(work)
            work.add_done_callback(self._working.discard)
            work.add_done_callback(lambda _: (claimed.set(), queue.put_nowait(None)))
            try:
                await claimed.wait()
                if work.done() and not work.cancelled():
                    await work  # somebody else works on the run
                seen = -1
                for event in await self.recorder.events(run_id):
                    yield event
                    seen = event.seq
                while (event := await queue.get()) is not None:
                    if event.seq > seen:
                        yield event
                # What a commit told just before the graph ended is on its way through the event loop.
                await asyncio.sleep(0)
                while not queue.empty():
                    if (event := queue.get_nowait()) is not None and event.seq > seen:
                        yield event
                if work.cancelled():
                    raise Failure(f"the loop was closed while run {run_id!r} was open: `resume` continues it")
                await work
            finally:
                await _cancelled(work)

    async def _invoke(self, begin: Any, run_id: str, context: Context | None, claimed: asyncio.Event) -> None:
        async with self.recorder.claimed(run_id):
            claimed.set()
            # The log knows each step; the state is saved where the graph stops, so that a review can be answered.
            await self.graph.ainvoke(begin, _config(run_id), context=context, durability="exit")

    async def _finish(
        self,
        run_id: str,
        events: AsyncIterator[Event],
        on_event: OnEvent | None,
        reviewer: Reviewer | None,
    ) -> RunResult:
        seen = -1
        while True:
            async for event in events:
                # After a review the run is told from its beginning again.
                if event.seq > seen and on_event is not None:
                    told = on_event(event)
                    if inspect.isawaitable(told):
                        await told
                seen = max(seen, event.seq)
            result = await self.recorder.result(run_id)
            review = await self.review(run_id) if result.status is RunStatus.RUNNING else None
            if review is None:
                return result
            if reviewer is None:
                return result.model_copy(update={"status": RunStatus.INTERRUPTED})
            answer = reviewer(review)
            answer = await answer if inspect.isawaitable(answer) else answer
            events = self.stream_resume(run_id, {} if answer is None else answer)

    async def _snapshot(self, run_id: str) -> StateSnapshot | None:
        """The run's saved state; None where there is none, or it cannot be read: the log is the truth."""
        try:
            return await self.graph.aget_state(_config(run_id))
        except Exception as error:
            logger.warning(
                "the saved state of run %s cannot be read, the log is used: %s", run_id, one_line(error)
            )
            await self.forget(run_id)
            return None

    def _sync(self, call: Callable[[], Coroutine[Any, Any, T]]) -> T:
        future: Future[T]
        if self._portal is not None:
            future = self._portal.start_task_soon(call)
        else:
            _ = self.parts
            assert self._event_loop is not None
            try:
                inside = asyncio.get_running_loop() is self._event_loop
            except RuntimeError:
                inside = False
            if inside:
                raise RuntimeError("inside asyncio, use `await loop.run(…)` rather than run_sync")
            future = asyncio.run_coroutine_threadsafe(call(), self._event_loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise


def _config(run_id: str) -> RunnableConfig:
    return {"configurable": {"thread_id": run_id}}


def _request(prompt: str, target: EmotionTarget, seed: int | None) -> RunInput:
    return {"prompt": prompt, "target": target.model_dump(mode="json", exclude_none=True), "seed": seed}


def _context(options: Mapping[str, Any]) -> Context:
    try:
        return Context(**options)
    except TypeError:
        known = ", ".join(Context.__dataclass_fields__)
        unknown = ", ".join(sorted(set(options) - set(Context.__dataclass_fields__)))
        raise UserError(f"a run has no option {unknown}: known are {known}") from None


def _started(fold: Fold) -> RunStarted:
    if fold.started is None:
        raise UserError(f"the log of run {fold.run_id!r} has no beginning")
    return fold.started


async def _cancelled(task: asyncio.Task[Any]) -> None:
    """End a task that may be done; its own error has been told, or nobody is there to be told."""
    task.cancel()
    with suppress(asyncio.CancelledError, Exception):
        await task
