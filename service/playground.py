"""The playground: what the loop found in many pictures, asked of the distilled model in one pass, with its base beside.

Nothing of it is logged: nobody asked for a run, and what is tried in passing is no evidence.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from ..graph.loop import Loop
from ..graph.parts import check_request
from ..settings import GeneratorSettings
from ..tools.images.base import GeneratedImage, Generator, ImageRequest, encoded
from ..tools.images.load import load_generator
from ..tools.lvlm.chat import image_url
from .documents import Play, Played
from .errors import Unavailable

#: The adapter that ships with the embedded models.
_SHIPPED = Path(__file__).parents[1] / "miniature" / "adapters" / "opd"


#: Models that are kept: the base and two adapters.
_KEPT = 3


class Playground:
    """Loads distilled models when they are first asked, and keeps the last ones.

    Attributes:
        adapter: The distilled artifact: the settings' own, or the one that ships with the embedded models.

    Args:
        settings: Those of the generator.
    """

    def __init__(self, settings: GeneratorSettings) -> None:
        shipped = str(_SHIPPED) if settings.model == "miniature" and settings.base_url is None else None
        self.adapter = settings.adapter or shipped
        self._settings = settings
        self._loaded: dict[str | None, Any] = {}
        # One pass at a time: the strength is the pipeline's, not the request's.
        self._lock = asyncio.Lock()

    async def play(
        self, loop: Loop, wanted: Play, adapter: Path | None = None, beside: Path | None = None
    ) -> list[Played]:
        """Two pictures from the same prompt, target and noise.

        Args:
            loop: Its critic reads them.
            wanted: What is asked for.
            adapter: The artifact; by default the server's own.
            beside: Another artifact; by default the base.

        Raises:
            UserError: The prompt is none, or an artifact does not fit the model.
            Unavailable: There is no adapter, or no pipeline in this process.
        """
        prompt, target = check_request(loop.parts, wanted.prompt, wanted.target)
        chosen = str(adapter) if adapter else self.adapter
        if chosen is None:
            raise Unavailable("no distilled adapter: start the server with --adapter FOLDER")
        request = ImageRequest(prompt=prompt, seed=wanted.seed, target=target)
        made: list[GeneratedImage] = []
        async with self._lock:
            for folder in (str(beside) if beside else None, chosen):
                model = await (self._base(loop) if folder is None else self._load(folder))
                if folder is not None:
                    await asyncio.to_thread(_rescale, model, wanted.scale)
                made += await model.generate([request])
        played: list[Played] = []
        for name, it in zip(("other" if beside else "base", "distilled"), made, strict=True):
            png, reading = await asyncio.to_thread(encoded, it.image, compress_level=1), None
            if wanted.read:
                reading = (await loop.parts.critic.read(png, prompt, target, seed=wanted.seed)).critique
            played.append(
                Played(name=name, image=image_url(png), seconds=it.provenance.get("seconds"), reading=reading)
            )
        return played

    async def _base(self, loop: Loop) -> Generator:
        """The loop's own generator where it is the bare pipeline; else one beside it."""
        own = loop.parts.generator
        return own if hasattr(own, "pipe") and self._settings.adapter is None else await self._load(None)

    async def _load(self, adapter: str | None) -> Any:
        generator = self._loaded.pop(adapter, None)
        if generator is None:
            settings = self._settings.model_copy(update={"adapter": adapter, "adapter_scale": 1.0})
            generator = await asyncio.to_thread(load_generator, settings)
            if not hasattr(generator, "pipe"):
                raise Unavailable("the playground needs a diffusers pipeline in this process")
        self._loaded[adapter] = generator  # the most recently used last
        while len(self._loaded) > _KEPT:
            await self._loaded.pop(next(iter(self._loaded))).aclose()
        return generator

    async def aclose(self) -> None:
        """Let go of the models."""
        for generator in self._loaded.values():
            await generator.aclose()


def _rescale(generator: Any, scale: float) -> None:
    from ..tools.diffusion.adapter import rescale

    generator.adapter = rescale(generator.pipe, generator.adapter, scale)
