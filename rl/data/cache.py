"""Encoded text and latents: computed once, kept on disk, shared by epochs, objectives, seeds and processes.

Encoding an image costs about half of a training step on a small model, so it must not happen twice. A file is
named by what was encoded and by what encoded it, so a cache cannot serve another model; files appear whole or
not at all, so several processes may fill one. A copy stays in memory up to a limit.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ...domain import UserError
from ...files import replacing
from ...tools.diffusion.families import Conditioning, Family

#: Images encoded in one forward pass.
_ENCODE_BATCH = 8

_Item = dict[str, Tensor]


class Cache:
    """Text embeddings by prompt, latents by image address.

    Args:
        folder: Where the files lie.
        network: What encodes.
        identity: What the encoders are: model, revision and the like; anything that JSON can hold.
        size: (height, width) that images are brought to.
        open_image: Gives an image by its address.
        memory: Bytes kept in memory.
    """

    def __init__(
        self,
        folder: Path,
        network: Family,
        identity: dict[str, Any],
        size: tuple[int, int],
        open_image: Callable[[str], Image.Image],
        memory: int = 2 * 2**30,
    ) -> None:
        self._network, self._size, self._open_image = network, size, open_image
        dtypes = [str(next(network.module.parameters()).dtype), str(network.pipe.vae.dtype)]
        named = json.dumps([identity, network.call, list(size), dtypes], sort_keys=True, default=str)
        self.folder = folder / hashlib.sha256(named.encode()).hexdigest()[:16]
        self._memory: OrderedDict[str, _Item] = OrderedDict()
        self._used, self._limit = 0, memory
        self._order = lru_cache(2**16)(network.added_last)

    def embeds(self, prompts: Sequence[str | None]) -> Conditioning:
        """Embeddings, a row per prompt; None is the missing negative prompt."""

        def encode(missing: list[str | None]) -> Iterable[_Item]:
            for prompt in missing:
                told = self._network.encode(prompt)
                yield {"prompt": told.prompt[0]} | ({} if told.pooled is None else {"pooled": told.pooled[0]})

        items = self._get("text", prompts, encode)
        pooled = [item["pooled"] for item in items if "pooled" in item]
        return Conditioning(
            torch.stack([item["prompt"] for item in items]), torch.stack(pooled) if pooled else None
        )

    def added(self, pairs: Sequence[tuple[str, str]]) -> Conditioning:
        """Embeddings of refined prompts (second of each pair), the rows in the order of `Family.added_last`."""
        told = self.embeds([refined for _, refined in pairs])
        order = torch.tensor([self._order(*pair, told.prompt.shape[1]) for pair in pairs])
        return Conditioning(told.prompt.gather(1, order[..., None].expand_as(told.prompt)), told.pooled)

    def latents(self, addresses: Sequence[str]) -> Tensor:
        """Latents (B, C, H, W), a row per image.

        Raises:
            UserError: An image is not in the blob store.
        """

        def encode(missing: list[str]) -> Iterable[_Item]:
            for start in range(0, len(missing), _ENCODE_BATCH):
                images = [self._open(address) for address in missing[start : start + _ENCODE_BATCH]]
                yield from ({"latent": latent} for latent in self._network.encode_images(images))

        return torch.stack([item["latent"] for item in self._get("latent", addresses, encode)])

    def _open(self, address: str) -> Image.Image:
        try:
            picture = self._open_image(address)
        except OSError as error:
            raise UserError(f"image {address[:12]} of the log cannot be read: {error}") from error
        size = (self._size[1], self._size[0])
        return picture if picture.size == size else picture.resize(size, Image.Resampling.LANCZOS)

    def _get(
        self, kind: str, names: Sequence[Any], encode: Callable[[list[Any]], Iterable[_Item]]
    ) -> list[_Item]:
        keys = {name: kind if name is None else f"{kind}:{name}" for name in names}
        found = {name: self._memory.get(key) or self._read(key) for name, key in keys.items()}
        missing = [name for name, item in found.items() if item is None]
        for name, item in zip(missing, encode(missing), strict=True):
            found[name] = item = {key: tensor.detach().cpu().contiguous() for key, tensor in item.items()}
            # The cache is a convenience: a full disk slows training down, it does not end it.
            with contextlib.suppress(OSError, SafetensorError), replacing(self._path(keys[name])) as beside:
                save_file(item, beside)
        items = {name: item for name, item in found.items() if item is not None}
        for name, item in items.items():
            if keys[name] not in self._memory:
                self._used += _bytes(item)
            self._memory[keys[name]] = item
            self._memory.move_to_end(keys[name])
        while self._used > self._limit and len(self._memory) > 1:
            self._used -= _bytes(self._memory.popitem(last=False)[1])
        return [items[name] for name in names]

    def _path(self, key: str) -> Path:
        digest = hashlib.sha256(key.encode()).hexdigest()
        return self.folder / key.partition(":")[0] / digest[:2] / f"{digest}.safetensors"

    def _read(self, key: str) -> _Item | None:
        try:
            return load_file(self._path(key))
        except (SafetensorError, OSError):
            # Not there, or damaged by something outside: make it again.
            return None


def _bytes(item: _Item) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in item.values())
