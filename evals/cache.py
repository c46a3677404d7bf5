"""A content-addressed cache of small JSON documents: what was made or read once is not made or read again.

One file for each key, written beside and renamed, so that several processes (one for each GPU) can fill one
cache and a kill leaves no half document. Within a process, those who ask for the same key at the same time
wait for one making.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any
from uuid import uuid4


def digest(*parts: Any) -> str:
    """SHA-256 of JSON values, whatever the order of their keys."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


class Cache:
    """JSON documents under a folder.

    Args:
        root: The folder; made when something is first put.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._making: dict[str, asyncio.Task[Any]] = {}

    def _path(self, key: str) -> Path:
        return self.root / key[:2] / f"{key}.json"

    def get(self, key: str) -> Any | None:
        """The document, or None; one that cannot be read counts as absent and is made again."""
        try:
            return json.loads(self._path(key).read_text(encoding="utf-8"))
        except (FileNotFoundError, json.JSONDecodeError):
            return None

    def put(self, key: str, document: Any) -> None:
        """Store a document."""
        path = self._path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_suffix(f".{uuid4().hex}")
        beside.write_text(json.dumps(document, ensure_ascii=False), encoding="utf-8")
        os.replace(beside, path)

    async def once(
        self,
        key: str,
        make: Callable[[], Awaitable[Any]],
        usable: Callable[[Any], bool] = lambda document: True,
    ) -> Any:
        """The document under `key`, made where it is not there yet.

        Args:
            key: From `digest`.
            make: Makes the document; its exceptions reach everybody who waits, and nothing is stored.
            usable: Looks at a stored document; False has it made again (an image file that is gone).
        """
        found = self.get(key)
        if found is not None and usable(found):
            return found
        if key not in self._making:
            self._making[key] = asyncio.ensure_future(self._make(key, make))
        # Shielded: the one who gives up must not take the work away from those who still wait.
        return await asyncio.shield(self._making[key])

    async def _make(self, key: str, make: Callable[[], Awaitable[Any]]) -> Any:
        try:
            document = await make()
            self.put(key, document)
            return document
        finally:
            del self._making[key]

    async def aclose(self) -> None:
        """Cancel what nobody waits for any more."""
        left = list(self._making.values())
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)
