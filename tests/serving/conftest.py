"""One vLLM server for all tests of this folder; skipped where vLLM is not installed."""

import os
from pathlib import Path

import pytest
import tiny_lvlm
from emoloop.domain import UserError
from emoloop.tools import presets
from emoloop.tools.vllm.server import VLLMServer, find_python


@pytest.fixture(scope="session")
def python():
    try:
        return find_python(os.environ.get("EMOLOOP_LVLM__VLLM_PYTHON"))
    except UserError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """The miniature where its weights are there, else a random model of the same kind."""
    miniature = presets.LVLMS["miniature"].model
    assert isinstance(miniature, Path)
    if (miniature / "model.safetensors").is_file():
        return miniature
    return tiny_lvlm.build(tmp_path_factory.mktemp("model") / "lvlm")


@pytest.fixture(scope="session")
def server(python, folder, tmp_path_factory):
    log = tmp_path_factory.mktemp("server") / "vllm.log"
    with VLLMServer(str(folder), python=python, log=log) as running:
        yield running
