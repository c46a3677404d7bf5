"""What is worth trying again.

LangGraph's own predicate gives up on exactly what happens here: a GPU out of memory (RuntimeError), a disk or
a socket (OSError), a timeout, a server that says 429; and it retries what never gets better. So ours decides.
"""

from __future__ import annotations

import sqlite3
import sys
from collections.abc import Iterator

import httpx
from langgraph.errors import NodeTimeoutError
from langgraph.types import RetryPolicy

from ..domain import UserError

#: Tries of a node, the first included.
ATTEMPTS = 3

#: Kinds of OSError that waiting does not mend.
_LASTING = (FileNotFoundError, FileExistsError, PermissionError, IsADirectoryError, NotADirectoryError)


def retryable(error: BaseException) -> bool:
    """Whether the same call may succeed a little later.

    Looks through the causes of an error, since libraries wrap what they meet.
    """
    return any(_passes(cause) for cause in _causes(error))


def _causes(error: BaseException) -> Iterator[BaseException]:
    cause: BaseException | None = error
    for _ in range(10):
        if cause is None or isinstance(cause, UserError | ValueError | TypeError):
            return
        yield cause
        cause = cause.__cause__


def _passes(error: BaseException) -> bool:
    status = getattr(error, "status_code", None) or getattr(
        getattr(error, "response", None), "status_code", None
    )
    if isinstance(status, int):
        return status in (408, 409, 425, 429) or status >= 500
    if isinstance(error, httpx.TransportError | NodeTimeoutError):
        return True
    # Never imported for the question: an error of a library that is not loaded cannot be here.
    openai = sys.modules.get("openai")
    if openai is not None and isinstance(error, openai.APIConnectionError):
        return True
    if isinstance(error, OSError):
        return not isinstance(error, _LASTING)
    text = str(error).lower()
    if isinstance(error, RuntimeError):
        return "out of memory" in text or "database is locked" in text
    return isinstance(error, sqlite3.OperationalError) and "locked" in text


def retry_policy() -> RetryPolicy:
    """The policy of every node."""
    return RetryPolicy(initial_interval=0.5, max_interval=30.0, max_attempts=ATTEMPTS, retry_on=retryable)
