"""Encoded text and latents: computed once, kept on disk, shared by epochs, objectives, seeds and processes.

Encoding an image costs about half of a training step on a small model, so it must not happen twice. A file is
named by what was encoded and by what encoded it, so a cache cannot serve another model; files appear whole or
not at all (write beside, rename), so several processes may fill one. A copy stays in memory up to a limit.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import uuid
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ...domain import UserError
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
        image_path: Where an image lies, by address.
        memory: Bytes kept in memory.
    """

    def __init__(
        self,
        folder: Path,
        network: Family,
        identity: dict[str, Any],
        size: tuple[int, int],
        image_path: Callable[[str], Path],
        memory: int = 2 * 2**30,
    ) -> None:
        self._network, self._size, self._image_path = network, size, image_path
        dtypes = [str(next(network.module.parameters()).dtype), str(network.pipe.vae.dtype)]
        named = json.dumps([identity, network.call, list(size), dtypes], sort_keys=True, default=str)
        self.folder = folder / hashlib.sha256(named.encode()).hexdigest()[:16]
        self._memory: OrderedDict[str, _Item] = OrderedDict()
        self._used, self._limit = 0, memory
        #: How often something had to be encoded.
        self.encoded = 0

    def embeds(self, prompts: Sequence[str | None]) -> Conditioning:
        """Embeddings, a row per prompt; None is the missing negative prompt."""

        def encode(missing: list[str | None]) -> Iterable[_Item]:
            for prompt in missing:
                told = self._network.encode(prompt)
                yield {"prompt": told.prompt[0]} | ({} if told.pooled is None else {"pooled": told.pooled[0]})

        items = self._get("text", list(prompts), encode)
        pooled = [item["pooled"] for item in items if "pooled" in item]
        return Conditioning(
            torch.stack([item["prompt"] for item in items]), torch.stack(pooled) if pooled else None
        )

    def added(self, pairs: Sequence[tuple[str, str]]) -> Conditioning:
        """Embeddings of refined prompts (second of each pair), the rows in the order of `Family.added_last`."""
        told = self.embeds([refined for _, refined in pairs])
        orders = []
        for pair in pairs:
            key = f"order:{json.dumps(pair)}"
            item = self._memory.get(key) or {
                "order": torch.tensor(self._network.added_last(*pair, told.prompt.shape[1]))
            }
            self._remember(key, item)
            orders.append(item["order"])
        order = torch.stack(orders)
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

        return torch.stack([item["latent"] for item in self._get("latent", list(addresses), encode)])

    def _open(self, address: str) -> Image.Image:
        path = self._image_path(address)
        try:
            with Image.open(path) as image:
                picture = image.convert("RGB")
        except OSError as error:
            raise UserError(f"image {address[:12]} of the log cannot be read from {path}: {error}") from error
        height, width = self._size
        if picture.size != (width, height):
            picture = picture.resize((width, height), Image.Resampling.LANCZOS)
        return picture

    def _get(
        self, kind: str, names: list[Any], encode: Callable[[list[Any]], Iterable[_Item]]
    ) -> list[_Item]:
        found: dict[Any, _Item] = {}
        missing = []
        for name in dict.fromkeys(names):
            item = self._memory.get(self._key(kind, name))
            if item is None:
                item = self._read(kind, name)
            if item is None:
                missing.append(name)
            else:
                found[name] = item
        for name, item in zip(missing, encode(missing), strict=True):
            item = {key: tensor.detach().cpu().contiguous() for key, tensor in item.items()}
            self._write(self._path(kind, name), item)
            self.encoded += 1
            found[name] = item
        for name, item in found.items():
            self._remember(self._key(kind, name), item)
        return [found[name] for name in names]

    def _remember(self, key: str, item: _Item) -> None:
        if key in self._memory:
            self._memory.move_to_end(key)
            return
        self._memory[key] = item
        self._used += _bytes(item)
        while self._used > self._limit and len(self._memory) > 1:
            self._used -= _bytes(self._memory.popitem(last=False)[1])

    @staticmethod
    def _key(kind: str, name: str | None) -> str:
        return f"{kind}:{name}" if name is not None else f"{kind}"

    def _path(self, kind: str, name: str | None) -> Path:
        digest = hashlib.sha256(self._key(kind, name).encode()).hexdigest()
        return self.folder / kind / digest[:2] / f"{digest}.safetensors"

    def _read(self, kind: str, name: str | None) -> _Item | None:
        path = self._path(kind, name)
        if not path.exists():
            return None
        try:
            return load_file(path)
        except (SafetensorError, OSError):
            # Damaged by something outside: make it again.
            path.unlink(missing_ok=True)
            return None

    def _write(self, path: Path, item: _Item) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
        try:
            save_file(item, beside)
            os.replace(beside, path)
        except (OSError, SafetensorError):
            # The cache is a convenience: a full disk slows training down, it does not end it.
            with contextlib.suppress(OSError):
                beside.unlink(missing_ok=True)


def _bytes(item: _Item) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in item.values())
