"""The loop as a Python program uses it: models loaded once, many runs at the same time.

    async with open_loop() as loop:
        result = await loop.run("a dog by the sea", EmotionTarget(valence=2, arousal=-1))

`with open_loop() as loop: loop.run_sync(...)` does the same from a notebook or a script without asyncio.
"""

from __future__ import annotations

import asyncio
import inspect
import os
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from concurrent.futures import Future
from contextlib import AsyncExitStack, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from anyio.from_thread import BlockingPortal, start_blocking_portal
from langchain_core.language_models import BaseChatModel
from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.base import BaseCheckpointSaver
from langgraph.graph.state import CompiledStateGraph
from langgraph.types import Command

from ..agents.ask import Asker
from ..agents.critic import Critic
from ..agents.rewriter import Rewriter
from ..domain import Critique, EmotionTarget, RunResult, RunStatus, UserError
from ..events import Critiqued, Event, ImageGenerated, Rewarded, RunFinished, RunStarted
from ..settings import GeneratorSettings, LVLMSettings, Settings, load_settings, lvlm_settings, merged
from ..tools import presets
from ..tools.images.base import Generator
from ..tools.images.load import load_generator
from ..tools.reward import load_reward
from ..traces.reader import load_run
from ..traces.recorder import StoreRecorder, open_recorder
from .build import build_graph
from .checkpoint import open_checkpointer
from .nodes import Parts, check_request, new_run_id, read_review
from .progress import PROGRESS, Progress, ReviewWanted, RunEnded
from .state import Context, RunInput, State, read_run_id, read_seed, same_target

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


T = TypeVar("T")

#: Gets each progress message as it comes.
OnProgress = Callable[[Progress], object]

#: Answers a review: a comment, or an object with `prompt`, `comment`, `stop`; may be a coroutine function.
Reviewer = Callable[[dict[str, Any]], Any]


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
    reward: str | Callable[..., Any] | None = None,
    **overrides: Any,
) -> Loop:
    """A loop, to be entered with `async with` or `with`.

    Args:
        settings: Resolved settings; by default those of environment and `emoloop.toml`.
        generator: A preset, folder or hub id; settings; a diffusers pipeline or any `Generator`.
        lvlm: A preset, folder or hub id, the URL of a vLLM server; settings; any LangChain chat model that
            takes images.
        reward: A name, a dotted path or a callable `(critique, target) -> float`.
        **overrides: Any setting, nested by section: `home="runs"`, `loop={"rounds": 2}`.

    Raises:
        UserError: An unknown setting or a value out of range.
    """
    objects: dict[str, Any] = {}
    if isinstance(generator, str | Path):
        overrides = merged(overrides, {"generator": {"model": str(generator)}})
    elif isinstance(generator, Mapping | GeneratorSettings):
        overrides = merged(overrides, {"generator": _given(generator)})
    elif generator is not None:
        objects["generator"] = generator
    if isinstance(lvlm, str | Path):
        overrides = merged(overrides, {"lvlm": lvlm_settings(str(lvlm))})
    elif isinstance(lvlm, Mapping | LVLMSettings):
        overrides = merged(overrides, {"lvlm": _given(lvlm)})
    elif lvlm is not None:
        objects["lvlm"] = lvlm
    if isinstance(reward, str):
        overrides = merged(overrides, {"loop": {"reward": reward}})
    elif reward is not None:
        objects["reward"] = reward
    base = settings.model_dump(exclude_unset=True) if settings is not None else {}
    return Loop(load_settings(merged(base, overrides)), **objects)


class Loop:
    """Generator, critic, rewriter and log around one compiled graph; made by `open_loop`.

    Attributes:
        settings: The resolved settings.
        graph: The compiled LangGraph, while the loop is open: `ainvoke({"prompt": …, "target": {…}},
            {"configurable": {"thread_id": …}})`, `astream`, `aget_state` as usual.
    """

    graph: CompiledStateGraph[State, Context, RunInput, State]

    def __init__(
        self, settings: Settings, *, generator: Any = None, lvlm: Any = None, reward: Any = None
    ) -> None:
        self.settings = settings
        self._given = {"generator": generator, "lvlm": lvlm, "reward": reward}
        self._parts: Parts | None = None
        self._stack: AsyncExitStack | None = None
        self._event_loop: asyncio.AbstractEventLoop | None = None
        self._portal: Any = None

    # ---- opening and closing

    async def __aenter__(self) -> Loop:
        """Load the models, then open the log: nothing is written before everything is known to be there.

        Raises:
            UserError: A model, an adapter, a server or the home cannot be used.
        """
        if self._stack is not None:
            raise RuntimeError("this loop is open already")
        await asyncio.to_thread(_check_home, self.settings.home)
        async with AsyncExitStack() as stack:
            self._parts = await self._open_parts(stack)
            saver = await stack.enter_async_context(open_checkpointer(self.settings))
            self.graph = build_graph(self._parts, saver)
            self._stack = stack.pop_all()
        self._event_loop = asyncio.get_running_loop()
        return self

    async def __aexit__(self, *_: object) -> None:
        stack, self._stack, self._parts = self._stack, None, None
        if stack is not None:
            await stack.aclose()

    def __enter__(self) -> Loop:
        """As `async with`, on an event loop in a thread of its own."""
        opening = start_blocking_portal()
        self._portal = (opening, opening.__enter__())
        try:
            self._portal[1].call(self.__aenter__)
        except BaseException:
            opening.__exit__(None, None, None)
            self._portal = None
            raise
        return self

    def __exit__(self, *_: object) -> None:
        opening, portal = self._portal
        self._portal = None
        try:
            portal.call(self.__aexit__)
        finally:
            opening.__exit__(None, None, None)

    async def _open_parts(self, stack: AsyncExitStack) -> Parts:
        # All of it in threads: whoever opens a loop inside a server must not stop its event loop.
        settings = self.settings
        reward = await asyncio.to_thread(load_reward, self._given["reward"] or settings.loop.reward)
        generator = await asyncio.to_thread(_load_generator, self._given["generator"], settings)
        if generator is not self._given["generator"]:
            stack.push_async_callback(generator.aclose)
        model: Any = self._given["lvlm"]
        own = model is None
        if own:
            model = await asyncio.to_thread(_load_lvlm, settings)
            stack.push_async_callback(asyncio.to_thread, model.close)
        critic, rewriter = await asyncio.to_thread(_agents, model, own, settings)
        recorder = await asyncio.to_thread(open_recorder, settings)
        stack.push_async_callback(recorder.aclose)
        return Parts(
            generator=generator,
            critic=critic,
            rewriter=rewriter,
            reward=reward,
            recorder=recorder,
            settings=settings,
            patient=own and settings.lvlm.engine != "embedded",
            objects=tuple(name for name, value in self._given.items() if value is not None),
        )

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
        on_progress: OnProgress | None = None,
        reviewer: Reviewer | None = None,
        **options: Any,
    ) -> RunResult:
        """Run the loop for one request.

        Args:
            prompt: The neutral prompt.
            target: The wanted emotion.
            seed: Makes the run repeatable; drawn at random, and logged, where it is left out.
            run_id: Name of the run. A run of this name that broke off is continued, one that is complete is
                returned as it is.
            on_progress: Called with each message of `stream`.
            reviewer: Answers reviews (`review=True`); without one, the run returns with status INTERRUPTED
                and waits for `resume`.
            **options: `rounds`, `images`, `tolerance`, `patience`, `review`, over the settings.

        Returns:
            The result; look at `status`. A run in which a round got no critique at all, or no image, is
            FAILED with a `stop_reason`, and keeps what it has.

        Raises:
            UserError: The request is wrong; nothing was written.
            Exception: What went wrong beyond retries; the run is saved and `resume` continues it.
        """
        messages = self.stream(prompt, target, seed=seed, run_id=run_id, **options)
        return await self._finish(messages, on_progress, reviewer)

    async def resume(
        self,
        run_id: str,
        answer: Any = None,
        *,
        on_progress: OnProgress | None = None,
        reviewer: Reviewer | None = None,
    ) -> RunResult:
        """Go on with a run that broke off, failed, or waits for a review; finished work is not repeated.

        Args:
            run_id: The run's id, an unambiguous beginning of it, or "last".
            answer: The answer to a review.
            on_progress: As for `run`.
            reviewer: As for `run`.

        Raises:
            UserError: No such run, it was made with another model or reward than this loop's, or the answer
                is none; the run waits as before.
        """
        return await self._finish(self.stream_resume(run_id, answer), on_progress, reviewer)

    async def stream(
        self,
        prompt: str,
        target: EmotionTarget | Mapping[str, Any],
        *,
        seed: int | None = None,
        run_id: str | None = None,
        **options: Any,
    ) -> AsyncIterator[Progress]:
        """As `run`, yielding typed messages; the last one is `RunEnded` (or `ReviewWanted`).

        Raises:
            UserError: The request is wrong; nothing was written.
        """
        text, wanted = await asyncio.to_thread(check_request, self.parts, prompt, target)
        context = _context(options)
        context.over(self.settings.loop)
        seed = read_seed(seed)
        asked = wanted.model_dump(mode="json", exclude_none=True)
        name = read_run_id(run_id) if run_id is not None else new_run_id()
        events = await self.recorder.events(name) if run_id is not None else []
        if events:
            started = _started(events)
            known = started.target.model_dump(mode="json")
            if started.prompt != text or not same_target(known, asked) or seed not in (None, started.seed):
                raise UserError(f"run {name!r} exists and was asked for something else: choose another id")
            async for message in self.stream_resume(name):
                yield message
            return
        begin: RunInput = {"prompt": text, "target": asked, "seed": seed}
        async for message in self._drive(begin, name, context):
            yield message

    async def stream_resume(self, run_id: str, answer: Any = None) -> AsyncIterator[Progress]:
        """As `resume`, yielding typed messages."""
        name = await asyncio.to_thread(self.recorder.store.resolve, run_id)
        events = await self.recorder.events(name)
        if any(isinstance(e, RunFinished) and e.status is RunStatus.COMPLETED for e in events):
            yield RunEnded(run_id=name, result=await self._result(name))
            return
        self._check_same_parts(events)
        snapshot = await self.graph.aget_state(_config(name))
        begin: Any = None
        if snapshot.interrupts:
            if answer is None:
                yield ReviewWanted(run_id=name, review=snapshot.interrupts[0].value)
                return
            # A wrong answer must not get into the saved state: every later try would meet it again.
            # LangGraph takes an empty object for no answer.
            begin = Command(resume=read_review(answer) or {"comment": ""})
        elif not snapshot.next:
            # No checkpoint, or a run that failed: the log knows the way from the start.
            started = _started(events)
            asked = started.target.model_dump(mode="json", exclude_none=True)
            begin = {"prompt": started.prompt, "target": asked, "seed": started.seed}
        async for message in self._drive(begin, name, None):
            yield message

    def run_sync(self, prompt: str, target: EmotionTarget | Mapping[str, Any], **options: Any) -> RunResult:
        """`run` for code without asyncio; takes the same arguments.

        Raises:
            RuntimeError: Called from inside the event loop that the loop lives in; use `await loop.run(…)`.
        """
        return self._sync(partial(self.run, prompt, target, **options))

    def resume_sync(self, run_id: str, answer: Any = None, **options: Any) -> RunResult:
        """`resume` for code without asyncio."""
        return self._sync(partial(self.resume, run_id, answer, **options))

    async def forget(self, run_id: str) -> None:
        """Drop a finished run's saved states; the log keeps the run."""
        saver = self.graph.checkpointer
        if isinstance(saver, BaseCheckpointSaver):
            await saver.adelete_thread(run_id)

    # ---- inside

    async def _drive(self, begin: Any, run_id: str, context: Context | None) -> AsyncIterator[Progress]:
        review: Any = None
        # Each step is saved before the next one begins: the default keeps an unbounded backlog.
        async for mode, chunk in self.graph.astream(
            begin, _config(run_id), context=context, stream_mode=["custom", "updates"], durability="sync"
        ):
            if mode == "custom":
                yield PROGRESS.validate_python(chunk)
            elif isinstance(chunk, dict) and "__interrupt__" in chunk:
                review = chunk["__interrupt__"][0].value
        if review is not None:
            yield ReviewWanted(run_id=run_id, review=review)
        else:
            yield RunEnded(run_id=run_id, result=await self._result(run_id))

    async def _finish(
        self, messages: AsyncIterator[Progress], on_progress: OnProgress | None, reviewer: Reviewer | None
    ) -> RunResult:
        while True:
            last: Progress | None = None
            async for message in messages:
                last = message
                if on_progress is not None:
                    on_progress(message)
            if isinstance(last, RunEnded):
                return last.result
            assert isinstance(last, ReviewWanted)
            if reviewer is None:
                result = await self._result(last.run_id)
                return result.model_copy(update={"status": RunStatus.INTERRUPTED})
            answer = reviewer(last.review)
            answer = await answer if inspect.isawaitable(answer) else answer
            messages = self.stream_resume(last.run_id, {} if answer is None else answer)

    async def _result(self, run_id: str) -> RunResult:
        return await asyncio.to_thread(load_run, self.recorder.store, run_id)

    def _check_same_parts(self, events: list[Event]) -> None:
        """Refuse to mix: what was made, read or valued is not comparable with another model's."""
        parts = self.parts
        made = (e for e in events if isinstance(e, ImageGenerated))
        read = (e for e in events if isinstance(e, Critiqued) and isinstance(e.critique, Critique))
        valued = (e for e in events if isinstance(e, Rewarded) and e.value is not None)
        keys = ("model", "revision", "adapter", "steps", "guidance", "height", "width")
        generator = parts.generator.describe()
        for what, before, now in (
            ("", made, {key: generator[key] for key in keys if key in generator}),
            ("critic ", read, {"model": parts.critic.model}),
            ("reward ", valued, {"name": parts.reward.name, "version": parts.reward.version}),
        ):
            first = next(before, None)
            for key, value in now.items() if first else ():
                if (then := getattr(first, key)) != value:
                    raise UserError(
                        f"run {events[0].run_id!r} was made with {what}{key} {then}, this loop has {value}: "
                        "resume it with the settings that it began with"
                    )

    def _sync(self, call: Callable[[], Coroutine[Any, Any, T]]) -> T:
        future: Future[T]
        if self._portal is not None:
            portal: BlockingPortal = self._portal[1]
            future = portal.start_task_soon(call)
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


def _context(options: dict[str, Any]) -> Context:
    try:
        return Context(**options)
    except TypeError:
        known = ", ".join(Context.__dataclass_fields__)
        unknown = ", ".join(sorted(set(options) - set(Context.__dataclass_fields__)))
        raise UserError(f"a run has no option {unknown}: known are {known}") from None


def _started(events: list[Event]) -> RunStarted:
    found = next((e for e in events if isinstance(e, RunStarted)), None)
    if found is None:
        raise UserError("the log of this run has no beginning")
    return found


def _load_generator(spec: Any, settings: Settings) -> Generator:
    return load_generator(settings.generator if spec is None else spec, settings.generator)


def _load_lvlm(settings: Settings) -> Any:
    from ..tools.lvlm.load import load_lvlm

    if settings.lvlm.samples > 1 and settings.lvlm.temperature == 0:
        raise UserError(
            "setting lvlm.samples above 1 needs lvlm.temperature above 0: equal answers tell nothing"
        )
    return load_lvlm(settings.lvlm)


def _agents(model: Any, own: bool, settings: Settings) -> tuple[Critic, Rewriter]:
    lvlm = settings.lvlm
    wanted: dict[str, Any] = {}
    if own:
        # A server may serve a model of which nothing is known here.
        with suppress(UserError):
            wanted = presets.defaults(lvlm.model, "lvlm")
    # Our own clients know their time limits; anybody else's model is held to the setting.
    timeout, name = (None, lvlm.model) if own else (lvlm.timeout, None)
    # A model in this process fills its next batch while one runs.
    slots = max(lvlm.concurrency, 2 * getattr(model, "batch_size", 0))
    asker = Asker(model, slots, timeout, name)
    critic = Critic(asker, lvlm.critic_prompt or wanted.get("critic_prompt", "critic"), lvlm.samples)
    return critic, Rewriter(asker, lvlm.rewriter_prompt or wanted.get("rewriter_prompt", "rewriter"))


def _check_home(home: Path) -> None:
    """Find out before any model is loaded that the home cannot be written; writes nothing."""
    folder = home.expanduser().absolute()
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir():
        raise UserError(f"cannot write to home {home}: {folder} is a file (set another with EMOLOOP_HOME)")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(
            f"cannot write to home {home}: no permission in {folder} (set another with EMOLOOP_HOME)"
        )


def _given(settings: Mapping[str, Any] | GeneratorSettings | LVLMSettings) -> dict[str, Any]:
    return dict(settings) if isinstance(settings, Mapping) else settings.model_dump(exclude_unset=True)
