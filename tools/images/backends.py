"""How a pipeline's network is run: eagerly, compiled, or by onnxruntime; and what was found fastest here.

A backend changes the last bits of a picture and no more (`emoloop bench generator` measures it), so `eager` is the
default, and a picture's recipe names any other. `emoloop bench generator --tune` remembers the fastest way for a model
on a machine in the user's cache, where what belongs to the machine lies; `generator.backend = "tuned"` takes it where
model, adapter, size, libraries and machine are those that were measured.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import tempfile
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ...domain import UserError, first_line
from ...files import write_atomic
from ...settings import GeneratorSettings
from ..presets import read_json

if TYPE_CHECKING:
    from .diffusers import DiffusersGenerator


class Way(NamedTuple):
    """How a network is run.

    Attributes:
        backend: "eager", "compile" or "onnxruntime".
        attention: One of diffusers' attention backends; None is its default.
        fuse_lora: Whether the LoRA is added to the weights.
    """

    backend: str = "eager"
    attention: str | None = None
    fuse_lora: bool = False

    @property
    def name(self) -> str:
        """For figures and recipes, such as "compile+flash+fused"."""
        return "+".join(filter(None, (self.backend, self.attention, "fused" if self.fuse_lora else None)))


def way_of(generator: DiffusersGenerator, settings: GeneratorSettings) -> Way:
    """What the settings ask for; of "tuned", what was remembered of such a generator, or the default."""
    if settings.backend == "tuned":
        return Way(*read_json(_file()).get(fingerprint(generator.describe()), ()))
    return Way(settings.backend, settings.attention, settings.fuse_lora)


def remember(fingerprint: str, way: Way) -> Path:
    """Keep the way that was found fastest; the file that holds it."""
    write_atomic(_file(), json.dumps({**read_json(_file()), fingerprint: way}, indent=2) + "\n")
    return _file()


def fingerprint(about: dict[str, Any]) -> str:
    """Of a generator, as it describes itself, on this machine."""
    device = torch.cuda.get_device_name() if about["device"].startswith("cuda") else _processor()
    keys = ("model", "revision", "adapter", "height", "width", "device", "dtype", "micro_batch", "versions")
    told = json.dumps([{key: about[key] for key in keys}, device, torch.get_num_threads()], sort_keys=True)
    return hashlib.sha256(told.encode()).hexdigest()


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    return next((line for line in lines if line.startswith("model name")), platform.processor())


def _file() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "emoloop" / "generators.json"


def use(generator: DiffusersGenerator, way: Way) -> Callable[[], object]:
    """Run a generator's network that way.

    Returns:
        What puts it back.

    Raises:
        UserError: A library is missing, the device does not do it, or there is no such attention backend.
    """
    module, undo = generator.family.module, list[Callable[[], object]]()
    if way.attention is not None:
        try:
            module.set_attention_backend(way.attention)
        except Exception as error:  # whatever the kernel's library says
            raise UserError(f"generator.attention {way.attention}: {first_line(error)}") from error
        undo.append(module.reset_attention_backend)
    if way.backend == "compile":
        # Every batch has the same shape.
        module.compile(dynamic=False)
        undo.append(lambda: setattr(module, "_compiled_call_impl", None))
    elif way.backend == "onnxruntime":
        eager = module.forward
        module.forward = _Onnx(module, eager)
        undo.append(lambda: delattr(module, "forward"))
    return lambda: [it() for it in reversed(undo)]


class _Onnx:
    """The forward of a network, exported once for each shape that it is given."""

    def __init__(self, module: nn.Module, eager: Callable[..., Any]) -> None:
        try:
            self._runtime = import_module("onnxruntime")
            import_module("onnxscript")
        except ImportError as error:
            raise UserError(
                f"generator.backend onnxruntime: {error.name} is not installed (pip install 'emoloop[onnx]')"
            ) from error
        if next(module.parameters()).device.type != "cpu":
            raise UserError("generator.backend onnxruntime runs on a CPU: set generator.device=cpu")
        self._module, self._eager = module, eager
        self._sessions: dict[str, Any] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        leaves, shape = pytree.tree_flatten((args, kwargs))
        tensors = [it for it in leaves if isinstance(it, Tensor)]
        constants = [None if isinstance(it, Tensor) else it for it in leaves]
        key = repr([constants, [(it.shape, it.dtype) for it in tensors], shape])
        if key not in self._sessions:
            self._sessions[key] = self._export(tensors, leaves, shape)
        session = self._sessions[key]
        given = {it.name: tensors[int(it.name[1:])].contiguous().numpy() for it in session.get_inputs()}
        # Pipelines ask for tuples.
        return tuple(torch.from_numpy(it) for it in session.run(None, given))

    def _export(self, tensors: Sequence[Tensor], leaves: list[Any], shape: Any) -> Any:
        places = [place for place, it in enumerate(leaves) if isinstance(it, Tensor)]
        network, eager = self._module, self._eager

        class Flat(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.network = network

            def forward(self, *given: Tensor) -> Any:
                filled = list(leaves)
                for place, tensor in zip(places, given, strict=True):
                    filled[place] = tensor
                args, kwargs = pytree.tree_unflatten(filled, shape)
                return eager(*args, **kwargs)

        names = [f"x{number}" for number in range(len(tensors))]
        with tempfile.TemporaryDirectory(prefix="emoloop-onnx-") as folder, torch.no_grad():
            file = Path(folder) / "network.onnx"
            program = torch.onnx.export(
                Flat().eval(), tuple(tensors), dynamo=True, input_names=names, verbose=False
            )
            assert program is not None
            program.save(str(file), external_data=True)
            options = self._runtime.SessionOptions()
            options.intra_op_num_threads = torch.get_num_threads()
            return self._runtime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
