"""Equal work is done once: a generator, a critic and a rewriter that look into the log before they ask a model.

The run ids of evaluations begin with `eval-WEIGHTS-READER-`, the digests of what decides an image and a reading, so
that a look-up finds only what the same models made. Base images thus serve as the loop's round 0 and as the first
third of best-of-N, a second evaluation makes only what is new, and one that was killed goes on by its log alone.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Awaitable, Callable, Hashable, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from PIL import Image
from pydantic import ValidationError
from sqlalchemy import ColumnElement, and_, select

from ..agents.critic import Critic, Reading
from ..agents.rewriters import KEPT, Rewrite, Rewriter, RewriteRequest
from ..domain import Critique, EmotionTarget
from ..events import EVENT, Critiqued, ImageGenerated, Rewritten
from ..graph.parts import Parts
from ..tools.images.base import GeneratedImage, Generator, ImageRequest, UnknownWord, gather_images
from ..traces.fold import hash_prompt
from ..traces.schema import candidates, events, runs
from ..traces.store import TraceStore

T = TypeVar("T")
E = TypeVar("E", ImageGenerated, Critiqued, Rewritten)

#: What does not count as another generator, out of `Generator.describe()`. An adapter's id says its scale.
_INCIDENTAL = {"base_url", "device", "micro_batch", "versions"}


def digest(*parts: Any) -> str:
    """SHA-256 of JSON values, whatever the order of their keys."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


class Kept:
    """JSON documents by digest, one file each: what judges read and how fast a device is, which no run logs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.json"

    def get(self, key: str) -> Any | None:
        """The document, or None; one that cannot be read counts as absent."""
        with suppress(FileNotFoundError, ValueError):
            return json.loads(self._path(key).read_text(encoding="utf-8"))
        return None

    def put(self, key: str, document: Any) -> None:
        """Store a document. Half of one, after a crash, cannot be read, so it is made again."""
        path = self._path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(document, ensure_ascii=False), encoding="utf-8")


class Reuse:
    """Makes a loop's parts look into its log; `fresh` counts the images that had to be made.

    Args:
        parts: The parts of an open loop; its generator, critic and rewriters are wrapped.
        reader: What decides a critique or a rewrite besides its question.
    """

    def __init__(self, parts: Parts, reader: dict[str, Any]) -> None:
        self.store: TraceStore = parts.recorder.store
        about = parts.generator.describe()
        self.weights = {key: value for key, value in about.items() if key not in _INCIDENTAL}
        self.reader = reader
        self.prefix = f"eval-{digest(self.weights)[:8]}-{digest(reader)[:8]}"
        self.fresh = 0
        self.generator, self.critic, self.rewriter = parts.generator, parts.critic, parts.rewriter
        self._known: dict[Hashable, asyncio.Task[Any]] = {}
        parts.generator = _Generator(parts.generator, self)
        parts.critic = _Critic(parts.critic, self)
        parts.rewriter = cache(lambda name: _Rewriter(self.rewriter(name), self))

    async def once(
        self,
        key: Hashable,
        find: Callable[[], T | None],
        make: Callable[[], Awaitable[T]],
        good: Callable[[T], bool] = lambda _: True,
    ) -> T:
        """What the log holds, else what `make` gives; asked for several times at once, it is made once.

        Args:
            key: Tells one piece of work from another.
            find: Looks into the log, in a thread.
            make: Makes what is not there; its exceptions reach everybody who waits.
            good: Whether the result stands; one that does not is made again for the next who asks.
        """

        async def work() -> T:
            found = await asyncio.to_thread(find)
            return await make() if found is None else found

        if key not in self._known:
            self._known[key] = asyncio.ensure_future(work())
        task = self._known[key]
        try:
            # Shielded: the one who gives up must not take the work away from those who still wait.
            result = await asyncio.shield(task)
        except Exception:
            self._known.pop(key, None)
            raise
        if not good(result):
            self._known.pop(key, None)
        return result

    async def aclose(self) -> None:
        """Cancel what nobody waits for any more."""
        for task in self._known.values():
            task.cancel()
        await asyncio.gather(*self._known.values(), return_exceptions=True)

    # ---- the log

    def image(self, prompt: str, seed: int, target: EmotionTarget | None) -> ImageGenerated | None:
        """An image of this prompt, seed and, for weights that know targets, target."""
        where = [candidates.c.prompt_hash == hash_prompt(prompt), candidates.c.seed == seed, *_aimed(target)]
        for event in self._events(ImageGenerated, self.prefix[:13], *where):
            with suppress(OSError):  # gone or damaged since
                self.store.blobs.get_bytes(event.sha256)
                return event
        return None

    def reading(self, sha256: str, prompt: str, target: EmotionTarget) -> Reading | None:
        """What this critic read in an image for a request."""
        where = candidates.c.sha256 == sha256, runs.c.prompt_hash == hash_prompt(prompt), *_aimed(target)
        for event in self._events(Critiqued, f"eval-________{self.prefix[13:]}", *where):
            if isinstance(event.critique, Critique):
                return Reading(event.critique, event.usage, event.seconds or 0.0)
        return None

    def rewrite(self, rewriter: Rewriter, prompt: str, target: EmotionTarget) -> Rewrite | None:
        """What this rewriter made of a neutral prompt without feedback."""
        where = events.c.round == 0, runs.c.prompt_hash == hash_prompt(prompt), *_aimed(target)
        for event in self._events(Rewritten, f"eval-________{self.prefix[13:]}", *where):
            own = (event.model, event.prompt_version) == (rewriter.model, rewriter.prompt_id)
            # One of several was asked for at another temperature.
            if own and not event.why.startswith(KEPT) and not self._several(event.run_id):
                return Rewrite(
                    event.prompt, event.changes, event.why, None, event.usage, event.seconds or 0.0
                )
        return None

    def _several(self, run_id: str) -> bool:
        started = self.store.fold(run_id).started
        return started is not None and (started.settings.get("loop", {}).get("proposals") or 1) > 1

    def _events(self, kind: type[E], prefix: str, *where: ColumnElement[bool]) -> list[E]:
        query = select(events.c.body).join(runs, runs.c.run_id == events.c.run_id)
        if kind is not Rewritten:
            place = (
                getattr(candidates.c, key) == getattr(events.c, key) for key in ("run_id", "round", "index")
            )
            query = query.join(candidates, and_(*place))
        name = kind.model_fields["type"].default
        query = query.where(events.c.type == name, events.c.run_id.like(f"{prefix}-%"), *where)
        with self.store.read() as connection:
            bodies = connection.scalars(query).all()
        found: list[E] = []
        for body in bodies:
            with suppress(ValidationError):  # one that is damaged was made by nobody
                event = EVENT.validate_json(body)
                found += [event] if isinstance(event, kind) else []
        return found


def _aimed(target: EmotionTarget | None) -> list[ColumnElement[bool]]:
    if target is None:
        return []
    return [getattr(runs.c, key).is_not_distinct_from(value) for key, value in target]


class _Generator:
    def __init__(self, inner: Generator, reuse: Reuse) -> None:
        self.inner, self.reuse = inner, reuse
        self.describe, self.aclose = inner.describe, inner.aclose
        self.unread: Callable[[str], str] = getattr(inner, "unread", lambda _: "")

    def unknown_words(self, prompt: str) -> list[UnknownWord]:
        return self.inner.unknown_words(prompt)

    async def generate(self, requests: Sequence[ImageRequest]) -> list[GeneratedImage]:
        return await gather_images(map(self._one, requests))

    async def _one(self, request: ImageRequest) -> GeneratedImage:
        reuse, blobs = self.reuse, self.reuse.store.blobs
        target = request.target if reuse.weights.get("adapter") else None

        def find() -> tuple[str, dict[str, Any]] | None:
            event = reuse.image(request.prompt, request.seed, target)
            return None if event is None else (event.sha256, event.model_dump())

        async def make() -> tuple[str, dict[str, Any]]:
            [made] = await self.inner.generate([request])
            reuse.fresh += 1
            return await asyncio.to_thread(blobs.put_image, made.image), made.provenance

        key = ("image", request.prompt, request.seed, request.negative_prompt, target)
        sha256, provenance = await reuse.once(key, find, make)
        return GeneratedImage(await asyncio.to_thread(blobs.get_image, sha256), request, provenance)


class _Critic(Critic):
    def __init__(self, inner: Critic, reuse: Reuse) -> None:
        vars(self).update(vars(inner))
        self._inner, self._reuse = inner, reuse

    async def read(
        self, image: Image.Image | bytes, prompt: str, target: EmotionTarget, *, seed: int = 0
    ) -> Reading:
        if not isinstance(image, bytes):
            return await self._inner.read(image, prompt, target, seed=seed)
        sha256 = hashlib.sha256(image).hexdigest()
        return await self._reuse.once(
            ("critique", sha256, prompt, target),
            lambda: self._reuse.reading(sha256, prompt, target),
            lambda: self._inner.read(image, prompt, target, seed=seed),
            good=lambda reading: isinstance(reading.critique, Critique),
        )


class _Rewriter:
    def __init__(self, inner: Rewriter, reuse: Reuse) -> None:
        self._inner, self._reuse = inner, reuse
        self.name, self.model, self.prompt_id = inner.name, inner.model, inner.prompt_id

    def __getattr__(self, name: str) -> Any:
        # `propose` and `one_prompt`, where the rewriter has them. Several prompts are sampled with the run's own
        # seed, so the run's own log is the only place to find them again.
        return getattr(self._inner, name)

    async def rewrite(self, request: RewriteRequest) -> Rewrite:
        if request.rounds or request.comment:
            return await self._inner.rewrite(request)
        return await self._reuse.once(
            ("rewrite", self.model, self.prompt_id, request.neutral, request.target),
            lambda: self._reuse.rewrite(self._inner, request.neutral, request.target),
            lambda: self._inner.rewrite(request),
            good=lambda rewrite: rewrite.refused is None,
        )
