"""The processes that train: their device and precision, and the signals that ask them to stop."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from ..domain import UserError, first_line
from .config import DistillConfig

#: A configuration of `accelerate launch` that splits the network among GPUs.
FSDP2 = Path(__file__).with_name("fsdp2.yaml")

#: How long a process waits for the others: as long as the first may wait for a critic that is away, and more.
_PATIENCE = timedelta(hours=2)


def make_accelerator(config: DistillConfig, folder: Path) -> Any:
    """One process, or all that `accelerate launch` started.

    Raises:
        UserError: The wanted device is not there, or precision does not go with it.
    """
    from accelerate import Accelerator
    from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs

    knobs = config.train
    wanted = None if knobs.device == "auto" else _device(knobs.device)
    precision = "no" if knobs.precision == "fp32" else knobs.precision
    log_with = "tensorboard" if knobs.tensorboard else None
    # Buffers are constants here, and processes that sample need not do so in step.
    processes = [
        InitProcessGroupKwargs(timeout=_PATIENCE),
        DistributedDataParallelKwargs(broadcast_buffers=False),
    ]
    try:
        accelerator = Accelerator(
            mixed_precision=precision, cpu=knobs.device == "cpu", log_with=log_with, project_dir=folder,
            kwargs_handlers=processes,
        )  # fmt: skip
    except (ValueError, RuntimeError) as error:
        raise UserError(f"train.precision {knobs.precision} on this device: {first_line(error)}") from error
    if wanted is not None and accelerator.device.type != wanted.type:
        raise UserError(
            f"train.device {knobs.device}: accelerate takes {accelerator.device} here; set train.device=auto, "
            "or say otherwise by `accelerate config`"
        )
    return accelerator


def whole(tensor: Tensor) -> Tensor:
    """A tensor in one piece, where FSDP has split it; then all processes have to ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _device(name: str) -> torch.device:
    """A device that answers; an index becomes the current one, which accelerate takes."""
    try:
        device = torch.device(name)
        torch.empty(1, device=device).cpu()
        if device.index is not None and device.type != "cpu":
            torch.accelerator.set_device_index(device.index)
    except (RuntimeError, AssertionError, ValueError) as error:
        raise UserError(
            f"train.device {name} is not on this machine ({first_line(error)[:120]}): "
            "set train.device to auto, cpu, cuda or cuda:N"
        ) from error
    return device


@contextmanager
def listening() -> Iterator[list[int]]:
    """Gather the first Ctrl-C or SIGTERM instead of dying of it: half an optimizer step cannot be resumed."""
    heard: list[int] = []

    def hear(number: int, frame: Any) -> None:
        heard.append(number)
        if len(heard) > 1:
            raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield heard
        return
    before = {number: signal.signal(number, hear) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield heard
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
