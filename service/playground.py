"""The playground: what the loop found in many pictures, asked of the distilled model in one pass, with its base beside.

Nothing of it is logged: nobody asked for a run, and what is tried in passing is no evidence.
"""

from __future__ import annotations

import asyncio
import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..graph.loop import Loop
from ..graph.parts import check_request
from ..settings import GeneratorSettings
from ..tools.images.base import Generator, ImageRequest
from ..tools.images.load import load_generator
from ..tools.lvlm.chat import image_url
from .documents import Play, Played
from .errors import Unavailable

if TYPE_CHECKING:
    from PIL.Image import Image

#: The adapter that ships with the embedded models.
_SHIPPED = Path(__file__).parents[1] / "miniature" / "adapters" / "opd"


class Playground:
    """Loads the distilled model when it is first asked, and keeps it.

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

    async def play(self, loop: Loop, wanted: Play) -> list[Played]:
        """Both pictures from the same prompt, target and noise.

        Raises:
            UserError: The prompt is none.
            Unavailable: There is no adapter, or no pipeline in this process.
        """
        prompt, target = check_request(loop.parts, wanted.prompt, wanted.target)
        if self.adapter is None:
            raise Unavailable("no distilled adapter: start the server with --adapter FOLDER")
        request = ImageRequest(prompt=prompt, seed=wanted.seed, target=target)
        async with self._lock:
            base = await self._base(loop)
            distilled = await self._load(self.adapter)
            await asyncio.to_thread(_rescale, distilled, wanted.scale)
            made = [(await it.generate([request]))[0] for it in (base, distilled)]
        played: list[Played] = []
        for name, it in zip(("base", "distilled"), made, strict=True):
            png, reading = await asyncio.to_thread(_png, it.image), None
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
        if adapter not in self._loaded:
            settings = self._settings.model_copy(update={"adapter": adapter, "adapter_scale": 1.0})
            generator = await asyncio.to_thread(load_generator, settings)
            if not hasattr(generator, "pipe"):
                raise Unavailable("the playground needs a diffusers pipeline in this process")
            self._loaded[adapter] = generator
        return self._loaded[adapter]

    async def aclose(self) -> None:
        """Let go of the models."""
        for generator in self._loaded.values():
            await generator.aclose()


def _rescale(generator: Any, scale: float) -> None:
    from ..tools.diffusion.adapter import rescale

    generator.adapter = rescale(generator.pipe, generator.adapter, scale)


def _png(image: Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()
