"""An evaluation on a Ray cluster: one pass of Ray Data over its shares, and a last look at the whole.

Ray Data keeps the actors, hands a share to who is free, and does one again whose actor died; what that one had made is
in the log and is not made again. The shares meet in the log and in the home's folder of readings, so that a cluster of
several machines needs both in a place that all of them reach.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from typing import Any

from ..agents.ask import one_line
from ..domain import Failure, UserError
from ..graph.ray_workers import needed, start_ray
from ..settings import Settings
from .records import Outcome


class _Maker:
    """What an actor does with a share."""

    def __init__(self, share: Callable[[int, int], Outcome], many: int) -> None:
        self._share, self._many = share, many

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        return {"made": self._share(row["id"], self._many).made}


def _whole(share: Callable[[int, int], Outcome]) -> Outcome:
    return share(0, 1)


def on_ray(settings: Settings, share: Callable[[int, int], Outcome]) -> Outcome:
    """Have actors do all shares.

    Args:
        settings: `ray` says how many actors there may be and what each needs.
        share: Does one of so many shares; the only one of one is the whole.

    Raises:
        UserError: Ray is not installed.
        Failure: A share failed; what is made is kept.
    """
    ray = start_ray()
    many, options = settings.ray.actors, needed(settings)
    ray.data.DataContext.get_current().enable_progress_bars = False
    actors = ray.data.ActorPoolStrategy(min_size=1, max_size=many)
    try:
        with redirect_stdout(sys.stderr):
            shares = ray.data.range(many, override_num_blocks=many)
            shares.map(_Maker, fn_constructor_args=(share, many), compute=actors, **options).materialize()
            return ray.get(ray.remote(_whole).options(**options).remote(share))
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, UserError | Failure):
            raise error.cause from None
        raise Failure(f"a share failed: {one_line(error.cause)}") from error
