"""Jobs: distillation, evaluation, collection and the online trainings, a process each.

A job is an entry of the log's queue and a folder of the home. This server starts what waits and supervises nothing:
each job has a supervisor of its own (`supervise`), which outlives the server, holds the job's lease and writes how it
ended. A job whose supervisor died is started again by the next look of any server and goes on from its checkpoint.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
import os
import subprocess
import sys
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, RootModel

from ..domain import EmotionTarget
from ..settings import Settings
from ..traces.database import StoreError
from ..traces.queue import ENDED, Item, State
from ..traces.store import TraceStore
from .documents import Document, JobId, Text
from .errors import Conflict, NotFound

#: Seconds between two looks at what waits, and at a log that grows.
_POLL = 1.0

#: The supervisor's command line, before the job's name.
PROGRAM = [sys.executable, "-m", "emoloop", "job"]

#: Bytes of a log that are read at once.
_LOG = 64_000

#: Bytes of a log that a page shows: its end.
_TAIL = 8_000

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,99}$")]
#: A condition on runs, as `emoloop distill --where` takes it.
Condition = Annotated[str, Field(max_length=300, pattern=r"^[a-z]+=[^\x00-\x1f]*$")]
#: An arm of an evaluation by its name, perhaps with another critic; never a path.
Arm = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,60}(\+critic)?$")]
Steps = Annotated[int, Field(ge=1, le=10_000_000)]


class DistillJob(Document):
    """Train the diffusion weights on logged runs."""

    kind: Literal["distill"] = "distill"
    objective: Literal["opd", "direct", "dpo", "contrast", "npo", "nft", "rwr", "sft"] = "opd"
    where: list[Condition] = Field(default=[], max_length=20, description="Which runs; all by default.")
    preset: Name | None = None
    steps: Steps | None = None
    sheet_every: int | None = Field(default=None, ge=0, description="Steps between two sheets of samples.")

    def words(self, folder: Path, home: Path) -> list[str]:
        """The command line."""
        knobs = {"train.steps": self.steps, "guard.sheet_every": self.sheet_every}
        return [
            "distill", self.objective, f"--out={folder / 'out'}", "--resume", "--json",
            *(f"--where={it}" for it in self.where),
            *([f"--preset={self.preset}"] if self.preset else []),
            *(f"--set={key}={value}" for key, value in knobs.items() if value is not None),
        ]  # fmt: skip


class EvalJob(Document):
    """Judge arms on a shipped suite."""

    kind: Literal["eval"] = "eval"
    suite: Name = "dev"
    limit: int | None = Field(default=None, ge=1, description="Only the first neutral prompts.")
    arms: list[Arm] = Field(default=[], max_length=50, description="Which arms; the suite's own by default.")
    adapter: JobId | None = Field(default=None, description="A distillation whose artifact is judged.")
    critic: JobId | None = Field(
        default=None, description="A critic training whose model is behind arms `NAME+critic`."
    )

    def words(self, folder: Path, home: Path) -> list[str]:
        """The command line."""
        return [
            "eval", self.suite, f"--out={folder / 'out'}", "--json",
            *([f"--limit={self.limit}"] if self.limit else []),
            *([f"--arms={','.join(self.arms)}"] if self.arms else []),
            *([f"--adapter={home / 'jobs' / self.adapter / 'out'}"] if self.adapter else []),
            *([f"--critic={home / 'jobs' / self.critic / 'out'}"] if self.critic else []),
        ]  # fmt: skip


class Line(Document):
    """One run of a collection."""

    prompt: Text
    target: EmotionTarget
    seed: int | None = Field(default=None, ge=0, lt=2**63)


class CollectJob(Document):
    """Run many requests."""

    kind: Literal["collect"] = "collect"
    lines: list[Line] = Field(min_length=1, max_length=10_000)
    rounds: int | None = Field(default=None, ge=1, le=50)
    images: int | None = Field(default=None, ge=1, le=256)
    concurrency: int = Field(default=8, ge=0, le=256)

    def words(self, folder: Path, home: Path) -> list[str]:
        """The command line; its prompts are written first."""
        lines = (it.model_dump(mode="json", exclude_none=True) for it in self.lines)
        source = folder / "prompts.jsonl"
        source.write_text("".join(json.dumps(it) + "\n" for it in lines))
        return [
            "collect", str(source), f"--concurrency={self.concurrency}", "--json",
            *([f"--rounds={self.rounds}"] if self.rounds else []),
            *([f"--images={self.images}"] if self.images else []),
        ]  # fmt: skip


class TrainJob(Document):
    """Teach the critic to read labelled pictures."""

    kind: Literal["train"] = "train"
    stage: Literal["critic"] = "critic"
    data: Annotated[str, Field(pattern=r"^[\w-][\w.-]*(/[\w-][\w.-]*)*$", max_length=300)] = Field(
        description="A folder of labelled pictures inside the home."
    )
    preset: Literal["miniature", "qwen25-vl-3b", "qwen25-vl-7b"] | None = None
    steps: Steps | None = None

    def words(self, folder: Path, home: Path) -> list[str]:
        """The command line."""
        return [
            "train", self.stage, str(home / self.data), f"--out={folder / 'out'}", "--resume", "--json",
            *([f"--preset={self.preset}"] if self.preset else []),
            *([f"--set=grpo.steps={self.steps}"] if self.steps else []),
        ]  # fmt: skip


class FlowGrpoJob(Document):
    """Teach the generator by the critic's word on pictures that it makes meanwhile."""

    kind: Literal["flow-grpo"] = "flow-grpo"
    where: list[Condition] = Field(
        default=[], max_length=20, description="Whose prompts; all runs by default."
    )
    start: JobId | None = Field(default=None, description="A training whose artifact is trained on.")
    preset: Name | None = None
    steps: Steps | None = None

    def words(self, folder: Path, home: Path) -> list[str]:
        """The command line."""
        return [
            "train", "flow-grpo", f"--out={folder / 'out'}", "--resume", "--json",
            *(f"--where={it}" for it in self.where),
            *([f"--from={home / 'jobs' / self.start / 'out'}"] if self.start else []),
            *([f"--preset={self.preset}"] if self.preset else []),
            *([f"--set=train.steps={self.steps}"] if self.steps else []),
        ]  # fmt: skip


AnyJob = Annotated[DistillJob | EvalJob | CollectJob | TrainJob | FlowGrpoJob, Field(discriminator="kind")]
KINDS = ("distill", "eval", "collect", "train", "flow-grpo")


class JobRequest(RootModel[AnyJob]):
    """What a job is asked for."""

    model_config = {
        "json_schema_extra": {"examples": [{"kind": "distill", "objective": "opd", "steps": 500}]}
    }


class JobDocument(Document):
    """A job as it stands.

    Attributes:
        id: Its name.
        state: `queued`, `running`, `done`, `failed` or `cancelled`.
        request: What it was asked for.
        attempts: How often it was begun.
        error: Why it failed; the log says more.
        created: When it was asked for.
        changed: When its state changed last.
        held: Whether its process is there; a cancelled one may take a while to save what it has.
        figures: The last value of each of its training's metrics.
        samples: Steps of which there is a sheet of pictures.
        report: Whether there is a report to read.
    """

    id: JobId
    state: State
    request: JobRequest
    attempts: int
    error: str | None
    created: datetime
    changed: datetime
    held: bool
    figures: dict[str, float] = Field(default={})
    samples: list[int] = Field(default=[])
    report: bool = False


class Jobs:
    """The jobs of a log; to be entered, where this server is to start them.

    Args:
        settings: The resolved settings; those that were set hold for the jobs.
        store: The log.
    """

    def __init__(self, settings: Settings, store: TraceStore) -> None:
        self._settings, self._queue, self._home = settings, store.queue, store.home
        self._children: dict[str, subprocess.Popen[bytes]] = {}

    async def __aenter__(self) -> Jobs:
        self._starting = asyncio.create_task(self._start_waiting())
        return self

    async def __aexit__(self, *_: object) -> None:
        # The supervisors live on.
        self._starting.cancel()
        await asyncio.gather(self._starting, return_exceptions=True)

    def folder(self, job_id: str) -> Path:
        """What a job leaves: `log.txt`, and its artifact or report in `out`."""
        return self._home / "jobs" / job_id

    # ---- what the API does

    def start(self, wanted: JobRequest, key: str | None) -> JobDocument:
        """Queue a job.

        Raises:
            Conflict: The key was used for another one.
        """
        name = hashlib.sha256(key.encode()).hexdigest() if key else uuid.uuid4().hex
        job_id, payload = f"j-{name[:20]}", wanted.model_dump(mode="json")
        known = self._queue.items([job_id])
        if known and known[0].payload != payload:
            raise Conflict("this Idempotency-Key was used for another request")
        if not known:
            self.folder(job_id).mkdir(mode=0o700, parents=True, exist_ok=True)
            (self.folder(job_id) / "log.txt").touch(mode=0o600)
            self._queue.add(wanted.root.kind, {job_id: payload})
        return self.get(job_id)

    def get(self, job_id: str) -> JobDocument:
        """A job.

        Raises:
            NotFound: There is none.
        """
        for item in self._queue.items([job_id]):
            if item.kind in KINDS:
                return self._document(item)
        raise NotFound(f"no job {job_id!r}")

    def list(self) -> list[JobDocument]:
        """All jobs, the newest first."""
        return [self._document(item) for item in self._queue.items(kinds=KINDS)]

    def cancel(self, job_id: str) -> JobDocument:
        """Stop a job; what it has saved stays.

        Raises:
            NotFound: There is none.
            Conflict: It has ended.
        """
        job = self.get(job_id)
        if not self._queue.cancel([job_id]):
            raise Conflict(f"job {job_id} is {job.state}")
        return self.get(job_id)

    def resume(self, job_id: str) -> JobDocument:
        """Queue a job again that failed or was cancelled; it goes on from what it has saved.

        Raises:
            NotFound: There is none.
            Conflict: It waits, runs or is done.
        """
        job = self.get(job_id)
        if not self._queue.requeue([job_id]):
            raise Conflict(f"job {job_id} is {job.state}")
        return self.get(job_id)

    def metrics(self, job_id: str) -> list[dict[str, float]]:
        """Figures of a training, a step each; none where it has none.

        Raises:
            NotFound: There is no such job.
        """
        self.get(job_id)
        return _metrics(self.folder(job_id))

    def sample(self, job_id: str, step: int) -> bytes:
        """A sheet of sample pictures, PNG.

        Raises:
            NotFound: There is none.
        """
        self.get(job_id)
        try:
            return (_training(self.folder(job_id)) / "samples" / f"step-{step:07d}.png").read_bytes()
        except FileNotFoundError as error:
            raise NotFound(f"job {job_id!r} has no samples of step {step}") from error

    def report(self, job_id: str) -> str:
        """The report of an evaluation, HTML that is whole in itself.

        Raises:
            NotFound: There is none.
        """
        self.get(job_id)
        try:
            return _report(self.folder(job_id)).read_text()
        except FileNotFoundError as error:
            raise NotFound(f"job {job_id!r} has no report") from error

    def artifact(self, job_id: str) -> Path:
        """What a training made that is done.

        Raises:
            NotFound: There is no such job.
            Conflict: It is not done, or trains no generator.
        """
        if not adapters([job := self.get(job_id)]):
            raise Conflict(f"job {job_id} is {job.state} and has no adapter to sample with")
        return self.folder(job_id) / "out"

    def tail(self, job_id: str) -> str:
        """The end of what a job said."""
        path = self.folder(job_id) / "log.txt"
        return _read(path, max(0, path.stat().st_size - _TAIL)).decode("utf-8", "replace")

    async def log(self, job_id: str, after: int) -> AsyncIterator[tuple[int, str]]:
        """What a job says, line by line, until it has ended: the bytes that were read, and new lines.

        Raises:
            NotFound: There is no such job.
        """
        job = await asyncio.to_thread(self.get, job_id)
        path = self.folder(job_id) / "log.txt"
        while True:
            ended = job.state in ENDED and not job.held
            text = await asyncio.to_thread(_read, path, after)
            # A line that is being written is told when it is whole, or will not be.
            whole = text if ended and len(text) < _LOG else text[: text.rfind(b"\n") + 1] or text[_LOG - 1 :]
            if whole:
                after += len(whole)
                yield after, whole.decode("utf-8", "replace")
            elif ended:
                return
            else:
                await asyncio.sleep(_POLL)
                job = await asyncio.to_thread(self.get, job_id)

    def _document(self, item: Item) -> JobDocument:
        folder = self.folder(item.id)
        sheets = sorted((_training(folder) / "samples").glob("step-*.png"))
        return JobDocument(
            id=item.id,
            state=item.state,
            request=JobRequest.model_validate(item.payload),
            attempts=item.attempts,
            error=item.error,
            created=datetime.fromtimestamp(item.created, UTC),
            changed=datetime.fromtimestamp(item.changed, UTC),
            held=item.held,
            figures={key: value for line in _metrics(folder, _LOG) for key, value in line.items()},
            samples=[int(it.stem.removeprefix("step-")) for it in sheets],
            report=_report(folder).is_file(),
        )

    # ---- starting

    async def _start_waiting(self) -> None:
        while True:
            with suppress(StoreError):
                await asyncio.to_thread(self._look)
            await asyncio.sleep(_POLL)

    def _look(self) -> None:
        """Start what waits, as far as there is room."""
        for job_id, child in list(self._children.items()):
            if child.poll() is not None:
                del self._children[job_id]
        self._queue.reap()
        if self._queue.control().paused:
            return
        items = self._queue.items(kinds=KINDS, states=("queued", "running"))
        busy = {it.id for it in items if it.state == "running"} | set(self._children)
        for item in reversed(items):
            if len(busy) < self._settings.service.jobs and item.id not in busy and not item.held:
                busy.add(item.id)
                self._children[item.id] = self._supervised(item.id)

    def _supervised(self, job_id: str) -> subprocess.Popen[bytes]:
        with (self.folder(job_id) / "log.txt").open("ab") as log:
            return subprocess.Popen(
                [*PROGRAM, job_id],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # it outlives this server, however that ends
                env={**os.environ, **environment(self._settings)},
            )


def adapters(jobs: Sequence[JobDocument]) -> list[JobDocument]:
    """Those whose artifact can be sampled from."""
    return _done(jobs, "distill", "flow-grpo")


def critics(jobs: Sequence[JobDocument]) -> list[JobDocument]:
    """Those whose artifact reads pictures."""
    return _done(jobs, "train")


def _done(jobs: Sequence[JobDocument], *kinds: str) -> list[JobDocument]:
    return [it for it in jobs if it.state == "done" and it.request.root.kind in kinds]


def environment(settings: Settings) -> dict[str, str]:
    """Settings as the variables that give a child the same ones."""
    found = {"EMOLOOP_HOME": str(settings.home)}
    given = settings.model_dump(mode="json", exclude_unset=True, exclude={"home", "service"})
    for section, values in given.items():
        for key, value in values.items():
            if value is not None:
                text = value if isinstance(value, str) else json.dumps(value)
                found[f"EMOLOOP_{section}__{key}".upper()] = text
    return found


def _training(folder: Path) -> Path:
    return folder / "out" / "training"


def _report(folder: Path) -> Path:
    return folder / "out" / "report.html"


def _metrics(folder: Path, last: int | None = None) -> list[dict[str, float]]:
    """Figures of a training's steps; of those in the last bytes of the file."""
    path = _training(folder) / "metrics.jsonl"
    try:
        text = path.read_bytes() if last is None else _read(path, max(0, path.stat().st_size - last))
    except FileNotFoundError:
        return []
    found = []
    for line in text.splitlines():
        with suppress(ValueError):  # a line that is being written, or of which only the end was read
            figures = json.loads(line).items()
            # JSON knows no infinity, and a loss may be one.
            found.append({key: float(value) for key, value in figures if math.isfinite(value)})
    return found


def _read(path: Path, after: int) -> bytes:
    with path.open("rb") as file:
        file.seek(after)
        return file.read(_LOG)
