"""What pages and API work with: the log, the loop once its models are loaded, and the runs under way.

The server keeps nothing that the log does not have: a run's name follows from its idempotency key, who works on a run
is in the lease table, and after a crash the runs whose worker is gone are gone on with.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, aclosing
from typing import Any

from sqlalchemy import select

from ..agents.ask import one_line
from ..agents.remake import remake_by
from ..domain import Failure, RunStatus, UserError
from ..events import Event, HumanFeedback
from ..graph.loop import Loop, open_loop
from ..graph.state import new_run_id
from ..settings import Settings
from ..tools.images.base import encoded
from ..tools.lvlm.chat import image_url
from ..traces.fold import Fold
from ..traces.queue import is_gone
from ..traces.recipe import find
from ..traces.schema import queue, runs
from ..traces.store import TraceStore, open_store
from . import images, reading
from .documents import (
    Again,
    Answer,
    Feedback,
    Listing,
    Play,
    Played,
    RunDocument,
    RunPage,
    RunRequest,
    RunSummary,
    Said,
    State,
)
from .errors import Busy, Conflict, NotFound, Unavailable
from .feed import Feed
from .jobs import Jobs
from .metrics import Metrics
from .playground import Playground

logger = logging.getLogger(__name__)

#: States after which nothing more comes.
ENDED = ("completed", "failed")


class Service:
    """See above; to be entered with `async with`.

    Attributes:
        settings: The resolved settings.
        store: The log.
        feed: Follows it.
        jobs: Distillations and other processes.
        metrics: What Prometheus scrapes.
        playground: One pass of the distilled model and of its base.
        problems: Why work on a run broke off, for runs that this server worked on.

    Args:
        settings: The resolved settings.
        loop: A loop to use, open or not; by default one of these settings.
        models: Load models and work on runs; without, the server only shows.
    """

    def __init__(self, settings: Settings, *, loop: Loop | None = None, models: bool = True) -> None:
        self.settings = settings
        self.problems: dict[str, str] = {}
        self._given = loop or (open_loop(settings) if models else None)
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._begun: dict[str, asyncio.Future[None]] = {}
        # What a run asked when it had so many events: it cannot begin to wait, nor ask anything else, without one.
        self._waits: dict[str, tuple[int, dict[str, Any] | None]] = {}
        self.playground = Playground(settings.generator)
        self._stack = AsyncExitStack()
        self._loading: asyncio.Task[Loop] | None = None

    async def __aenter__(self) -> Service:
        self.store: TraceStore = await asyncio.to_thread(open_store, self.settings)
        self._stack.callback(self.store.close)
        self._stack.push_async_callback(self.playground.aclose)
        self.feed = await self._stack.enter_async_context(Feed(self.store))
        self.jobs = await self._stack.enter_async_context(Jobs(self.settings, self.store))
        self.metrics = Metrics(self.store)
        if self._given is not None:
            self._loading = asyncio.create_task(self._load(self._given))
        return self

    async def __aexit__(self, *_: object) -> None:
        tasks = [*self._tasks.values(), *([self._loading] if self._loading else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._stack.aclose()

    async def _load(self, loop: Loop) -> Loop:
        await self._stack.enter_async_context(loop)
        self.feed.listen(loop.recorder.store)
        for run_id in await asyncio.to_thread(self._orphans):
            logger.warning("run %s lost its worker: going on with it", run_id)
            self._work(run_id, loop.stream_resume(run_id))
        return loop

    async def loop(self) -> Loop:
        """The loop; waits while its models are loaded.

        Raises:
            Unavailable: There is none, or it could not be opened.
        """
        if self._loading is None:
            raise Unavailable("this server only shows: start it without --no-models to run anything")
        try:
            return await asyncio.shield(self._loading)
        except (UserError, Failure, OSError, RuntimeError) as error:
            raise Unavailable(f"the models cannot be loaded: {one_line(error)}") from error

    @property
    def ready(self) -> bool:
        """Whether runs can be started at once, or are not to be started here at all."""
        return self._loading is None or (
            self._loading.done() and not self._loading.cancelled() and self._loading.exception() is None
        )

    # ---- reading

    def held(self) -> set[str]:
        """The runs that somebody works on now, in this process or another."""
        return {*self.store.queue.held(), *self._tasks}

    def figures(self) -> bytes:
        """What Prometheus scrapes."""
        return self.metrics.scrape(len(self._tasks), self.ready)

    def _orphans(self) -> list[str]:
        """The runs under way whose worker is a process of this machine that is no more."""
        query = select(queue.c.id, queue.c.owner).join(runs, runs.c.run_id == queue.c.id)
        with self.store.read() as connection:
            left = runs.c.status == RunStatus.RUNNING, queue.c.state.is_(None), queue.c.owner.is_not(None)
            rows = connection.execute(query.where(*left))
            return [run_id for run_id, owner in rows if is_gone(owner)]

    async def page(self, wanted: Listing) -> RunPage:
        """A page of the list."""
        page = await asyncio.to_thread(lambda: reading.page(self.store, wanted, self.held()))
        items = [await self._standing(row) for row in page.items]
        return page.model_copy(update={"items": items})

    async def _standing(self, row: RunSummary) -> RunSummary:
        """A row that also knows of work on a failed run that has said nothing yet, and of a wait for a person."""
        if row.state == "failed" and row.run_id in self._tasks:
            return row.model_copy(update={"state": "running"})
        # Whether a run waits is in its saved state, which is read only where it may and once there are models.
        if row.state != "stopped" or not self.ready:
            return row
        if self._waits.get(row.run_id, (0, None))[0] != row.events:
            self._waits[row.run_id] = row.events, await self._question(row.run_id)
        _, question = self._waits[row.run_id]
        return row if question is None else row.model_copy(update={"state": "waiting"})

    async def run(self, run_id: str) -> RunDocument:
        """A run with all that is known of it.

        Raises:
            NotFound: There is none.
        """
        events, held = await asyncio.to_thread(lambda: (self._events(run_id), self.held()))
        run = await asyncio.to_thread(reading.document, events, held)
        run.cost = reading.cost(run, self.settings.service)
        run.run = await self._standing(run.run)
        if run.state == "waiting":
            run.question = self._waits[run_id][1]
        elif run.state == "stopped":
            run.problem = self.problems.get(run_id)
        return run

    async def state(self, run_id: str) -> State:
        """How a run stands; without a look at its events, since many watchers ask at once.

        Raises:
            NotFound: There is no such run.
        """
        row = await asyncio.to_thread(lambda: reading.row(self.store, run_id, self.held()))
        if row is None:
            raise NotFound(f"no run {run_id!r}")
        return (await self._standing(row)).state

    async def labels(self) -> list[str]:
        """All labels of the log."""
        return await asyncio.to_thread(reading.labels, self.store)

    async def events(self, run_id: str) -> list[Event]:
        """All events of a run.

        Raises:
            NotFound: There is none.
        """
        return await asyncio.to_thread(self._events, run_id)

    def _events(self, run_id: str) -> list[Event]:
        events = self.store.events(run_id)
        if not events or events[0].type != "run_started":
            raise NotFound(f"no run {run_id!r}")
        return events

    async def _fold(self, run_id: str) -> Fold:
        return await asyncio.to_thread(self.store.fold, run_id)

    async def _question(self, run_id: str) -> dict[str, Any] | None:
        """What a run asks a person; None where it does not wait, or there are no models to go on with it."""
        if self._loading is None or run_id in self._tasks:
            return None
        return await self._loading.result().review(run_id)

    # ---- working

    async def start(self, wanted: RunRequest, key: str | None) -> str:
        """Start a run.

        Args:
            wanted: What is asked for.
            key: The request's idempotency key: the same one names the same run.

        Returns:
            Its id, once its first event is committed.

        Raises:
            UserError: The request is wrong, or the key was used for another one.
            Busy: As many runs as may be are under way.
            Unavailable: The models are not there.
        """
        run_id = new_run_id() if key is None else f"k-{hashlib.sha256(key.encode()).hexdigest()[:20]}"
        options = wanted.model_dump(exclude={"prompt", "target", "seed"}, exclude_none=True)
        loop = await self.loop()
        known = key is not None and (await self._fold(run_id)).started is not None
        # Nothing is awaited between the look and the start: the same key may come twice at a time.
        if not known and run_id not in self._tasks:
            events = loop.stream(wanted.prompt, wanted.target, seed=wanted.seed, run_id=run_id, **options)
            self._work(run_id, events)
        if begun := self._begun.get(run_id):
            await asyncio.shield(begun)
        started = (await self._fold(run_id)).started
        assert started is not None
        then, asked = started.settings.get("loop", {}), (" ".join(wanted.prompt.split()), wanted.target)
        if (started.prompt, started.target) != asked or any(then.get(it) != options[it] for it in options):
            raise Conflict("this Idempotency-Key was used for another request")
        return run_id

    async def resume(self, run_id: str, answer: Answer | None = None) -> None:
        """Go on with a run that stopped or failed; or answer the review that it waits for.

        Raises:
            NotFound: There is no such run.
            Conflict: It is complete or being worked on; or it waits for a review and none is given, or the reverse.
            Busy: As many runs as may be are under way.
            UserError: It was made with other models than this server's, or the answer is none.
        """
        loop, run = await self.loop(), await self.run(run_id)
        if (run.state == "waiting") != (answer is not None):
            raise Conflict(f"run {run_id} is {run.state}" + (": answer its review" if answer is None else ""))
        if run.state in ("running", "completed"):
            raise Conflict(f"run {run_id} is {run.state}")
        given = None if answer is None else answer.model_dump(exclude_defaults=True)
        self._work(run_id, loop.stream_resume(run_id, given))
        await asyncio.shield(self._begun[run_id])

    async def cancel(self, run_id: str) -> None:
        """Stop working on a run; what is done is in the log, and it can be resumed.

        Raises:
            NotFound: There is no such run.
            Conflict: Neither this server nor a worker of the queue works on it.
        """
        task = self._tasks.get(run_id)
        if task is None:
            await self.events(run_id)
            # A worker that has it from the queue sees that at its next look.
            if not await asyncio.to_thread(self.store.queue.cancel, [run_id]):
                raise Conflict(f"nobody who could be told works on run {run_id}")
            return
        task.cancel()
        await asyncio.wait([task])

    async def say(self, run_id: str, feedback: Feedback) -> Said:
        """Log what a person says.

        Raises:
            NotFound: There is no such run, or it has no such picture.
            UserError: Nothing is said.
        """
        given = feedback.model_dump(exclude_none=True, exclude_defaults=True)
        if not set(given) - {"sha256"}:
            raise UserError("feedback has a rating, valence, arousal, favourite, labels or a comment")
        events = await self.events(run_id)
        round_ = 0
        if feedback.sha256 is not None:
            shown = [it for it in events if it.type == "image_generated" and it.sha256 == feedback.sha256]
            if not shown:
                raise NotFound(f"run {run_id!r} has no picture {feedback.sha256}")
            round_ = shown[0].round
        event = HumanFeedback(run_id=run_id, round=round_, **given)
        [stands] = await asyncio.to_thread(self.store.append, event)
        return Said.model_construct(**stands.model_dump(include=set(Said.model_fields)))

    async def play(self, wanted: Play) -> list[Played]:
        """One pass of the distilled model and one of its base, or of another one.

        Raises:
            UserError: The prompt is none.
            NotFound: There is no such job.
            Conflict: The job has no adapter.
            Unavailable: There are no models, no adapter, or no pipeline in this process.
        """
        loop, names = await self.loop(), (wanted.adapter, wanted.beside)
        folders = [await asyncio.to_thread(self.jobs.artifact, name) if name else None for name in names]
        return await self.playground.play(loop, wanted, *folders)

    async def again(self, run_id: str, sha256: str) -> Again:
        """Make a picture again from its recipe, by this server's generator as it is set.

        Raises:
            NotFound: The run has no such picture, or it has no recipe.
            Unavailable: The models are not there.
            Failure: No picture could be made.
        """
        loop = await self.loop()
        found = await asyncio.to_thread(find, self.store, sha256, run_id)
        if found is None:
            raise NotFound(f"run {run_id!r} has no picture {sha256} with a recipe")
        original = await asyncio.to_thread(images.original, self.store, sha256)
        made = await remake_by(loop.parts.generator, found[0], original)
        png = await asyncio.to_thread(encoded, made.image, compress_level=1)
        told = {name: getattr(made, name) for name in ("same", "difference", "pixels", "changed", "seconds")}
        return Again(image=image_url(png), **told)

    def _work(self, run_id: str, events: AsyncGenerator[Event]) -> None:
        if len(self._tasks) >= self.settings.service.runs:
            raise Busy(
                f"{len(self._tasks)} runs are under way, and service.runs allows no more: try again later"
            )
        self.problems.pop(run_id, None)
        begun = self._begun[run_id] = asyncio.get_running_loop().create_future()
        # Nobody may be there to hear it.
        begun.add_done_callback(lambda it: it.cancelled() or it.exception())
        self._tasks[run_id] = asyncio.create_task(self._drive(run_id, events, begun))
        self.feed.nudge(run_id)

    async def _drive(self, run_id: str, events: AsyncGenerator[Event], begun: asyncio.Future[None]) -> None:
        try:
            async with aclosing(events):
                async for _ in events:
                    if not begun.done():
                        begun.set_result(None)
        except asyncio.CancelledError:
            begun.cancel()
            raise
        except Exception as error:
            if begun.done():
                logger.warning("run %s broke off: %s", run_id, one_line(error), exc_info=error)
                self.problems[run_id] = one_line(error)
            else:
                begun.set_exception(error)
        finally:
            del self._tasks[run_id], self._begun[run_id]
            self.feed.nudge(run_id)


async def watched(
    service: Service, run_id: str, after: int, state: State
) -> AsyncGenerator[tuple[list[Event], State | None]]:
    """A run's events after a cursor and how it stands, until it has ended.

    Args:
        service: Whose log it is.
        run_id: The run.
        after: The last cursor that was seen.
        state: How the run stood just now.

    Yields:
        New events, perhaps none; and the state, at first and where it has changed, an end after all events.
    """
    told = None
    async with aclosing(service.feed.follow(after, run_id)) as batches:
        events: list[Event] = []
        while state not in ENDED:
            yield events, None if state == told else state
            told = state
            events = await anext(batches)
            after = events[-1].cursor if events else after
            # Most events change nothing about how a run stands.
            if state != "running" or not events or any(it.type == "run_finished" for it in events):
                state = await service.state(run_id)
        # That it has ended is the last word: nobody who stops there misses an event.
        yield [*events, *await asyncio.to_thread(service.store.events, run_id, after)], state
