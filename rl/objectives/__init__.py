"""Objectives by name. Each is a file; the registry only names them, so that reading it imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ...domain import UserError, first_error
from ...tools.registry import resolve

if TYPE_CHECKING:
    from .base import Objective

OBJECTIVES: dict[str, str] = {
    "opd": ".rl.objectives.opd:OPD",
    "contrast": ".rl.objectives.contrast:Contrast",
    "dpo": ".rl.objectives.dpo:DPO",
    "npo": ".rl.objectives.npo:NPO",
    "nft": ".rl.objectives.nft:NFT",
    "rwr": ".rl.objectives.rwr:RWR",
    "direct": ".rl.objectives.direct:Direct",
    "sft": ".rl.objectives.sft:SFT",
    "flow-grpo": ".rl.online.objective:FlowGRPO",
}


def load_objective(spec: Any, knobs: dict[str, Any] | None = None) -> Objective:
    """An objective by registry name, dotted path or class.

    Args:
        spec: "opd", "my_pkg.my_mod:MyObjective", or a subclass of `Objective`.
        knobs: Its fields.

    Raises:
        UserError: Unknown name, not an objective, or a knob it does not have.
    """
    from pydantic import ValidationError

    from .base import Objective

    found = resolve(spec, OBJECTIVES, "objective")
    if not (isinstance(found, type) and issubclass(found, Objective)):
        raise UserError(f"objective {spec!r} is no subclass of emoloop.rl.objectives.base.Objective")
    try:
        return found(**(knobs or {}))
    except ValidationError as error:
        told = f"objective.{first_error(error)}; knobs of {found.__name__}: {', '.join(found.model_fields)}"
        raise UserError(told) from error
