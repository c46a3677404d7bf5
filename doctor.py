"""The doctor: what is installed, found and reachable, which settings hold, and what to do about the rest.

Each check is a small function that says what it found and, where that will not do, one remedy. Nothing is
loaded that takes long and nothing is changed; only what the settings in force need can make the verdict bad.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any, Literal

from .domain import UserError, first_line
from .files import check_writable
from .settings import SECRETS, Settings, load_settings
from .tools import presets
from .tools.urls import base_urls, is_local, redact
from .tools.vllm.server import find_python

State = Literal["ok", "missing", "optional"]

#: Seconds to wait for a server.
PATIENCE = 3.0


@dataclass(frozen=True)
class Check:
    """One finding.

    Attributes:
        name: What was looked at.
        state: "missing" is needed and not there; "optional" is not there and only some work needs it.
        found: What was found.
        remedy: What to do; empty where nothing is to be done.
    """

    name: str
    state: State
    found: str
    remedy: str = ""


def examine(settings: Settings | None = None) -> dict[str, Any]:
    """Everything the doctor knows.

    Args:
        settings: Instead of those of environment and `emoloop.toml`.

    Returns:
        `ok`, `checks` (name, state, found, remedy) and `settings` (name, value, set: whether it is not the default).

    Raises:
        UserError: The settings themselves are wrong.
    """
    settings = settings or load_settings()
    checks = [
        replace(check, found=redact(check.found), remedy=redact(check.remedy))
        for examiner in EXAMINERS
        for check in examiner(settings)
    ]
    return {
        "ok": all(check.state != "missing" for check in checks),
        "checks": [asdict(check) for check in checks],
        "settings": list(_in_force(settings)),
    }


def _python(settings: Settings) -> Iterator[Check]:
    yield Check("python", "ok", f"{platform.python_version()} on {platform.system()} {platform.machine()}")


def _packages(settings: Settings) -> Iterator[Check]:
    from packaging.requirements import Requirement

    try:
        needed = [Requirement(line) for line in requires("emoloop") or []]
    except PackageNotFoundError:
        yield Check(
            "packages", "missing", "emoloop itself is not installed", "pip install -e . in its folder"
        )
        return
    unmet: dict[str, list[str]] = {}
    for requirement in needed:
        if requirement.name == "emoloop":
            continue
        try:
            installed = version(requirement.name)
        except PackageNotFoundError:
            installed = None
        if installed is None or not requirement.specifier.contains(installed, prereleases=True):
            extra = re.search(r"extra == ['\"]([\w-]+)['\"]", str(requirement.marker or ""))
            found = requirement.name + (f" {installed} (wanted {requirement.specifier})" if installed else "")
            unmet.setdefault(extra[1] if extra else "", []).append(found)
    if wrong := unmet.pop("", None):
        remedy = "pip install emoloop"
        yield Check("packages", "missing", f"not as needed: {', '.join(wrong)}", remedy)
    else:
        main = ("torch", "diffusers", "transformers", "langgraph")
        yield Check("packages", "ok", ", ".join(f"{name} {version(name)}" for name in main))
    for extra, problems in unmet.items():
        remedy = "see docs/serving.md" if extra == "vllm" else f"pip install 'emoloop[{extra}]'"
        yield Check(f"extra {extra}", "optional", f"not installed: {', '.join(problems)}", remedy)


def _device(settings: Settings) -> Iterator[Check]:
    import torch

    found = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        found.append("Apple GPU")
    found = found or ["no GPU: right for the miniature, slow for real models"]
    yield Check("device", "ok", ", ".join([*found, f"{os.cpu_count()} CPU cores"]))
    wanted = settings.generator.device
    if wanted != "auto":
        try:
            torch.empty(0, device=wanted)
        except (RuntimeError, AssertionError) as error:
            found = f"{wanted}: {first_line(error)}"
            yield Check("setting generator.device", "missing", found, 'set it to "auto"')


def _home(settings: Settings) -> Iterator[Check]:
    folder = home = settings.home
    try:
        check_writable(home, "home")
    except UserError as error:
        yield Check("home", "missing", str(error), "set another with EMOLOOP_HOME")
        return
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free / 2**30
    there = "there" if home.is_dir() else "made when first needed"
    found = f"{home}, {there}; {free:.0f} GiB free"
    if free < 1:
        yield Check("home", "missing", found, "less than 1 GiB is left: make room, or set EMOLOOP_HOME")
    else:
        yield Check("home", "ok", found)


def _model(name: str, kind: presets.Kind) -> Check:
    if re.fullmatch(r"[\w.]+:[\w.]+", name):
        return Check(kind, "ok", f"{name}, your own code, which is not run here")
    try:
        found = presets.resolve(name, kind)
    except UserError as error:
        return Check(kind, "missing", str(error), f"set {kind}.model to a folder, a preset or a hub id")
    if isinstance(found, Path):
        size = sum(file.stat().st_size for file in found.rglob("*") if file.is_file()) / 2**20
        return Check(kind, "ok", f"{name}: {found} ({size:.0f} MiB)")
    from huggingface_hub import scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    with suppress(CacheNotFound):
        if found in {repo.repo_id for repo in scan_cache_dir().repos}:
            return Check(kind, "ok", f"{name}: {found}, in the hub's cache")
    remedy = f"hf download {found}, or name a folder"
    return Check(kind, "missing", f"{name}: {found} is not on this machine", remedy)


def _generator(settings: Settings) -> Iterator[Check]:
    url, adapter = settings.generator.base_url, settings.generator.adapter
    if url:
        yield _server("generator", url, "start the images server, or unset generator.base_url")
    else:
        yield _model(settings.generator.model, "generator")
    if adapter is not None and Path(adapter).expanduser().exists():
        yield Check("adapter", "ok", adapter)
    elif adapter is not None:
        remedy = "name a LoRA or a distilled artifact in generator.adapter"
        yield Check("adapter", "missing", f"{adapter} is not there", remedy)


def _lvlm(settings: Settings) -> Iterator[Check]:
    lvlm = settings.lvlm
    if lvlm.engine == "vllm":
        try:
            for url in base_urls(lvlm.base_url, "lvlm.base_url"):
                yield _server("vLLM server", url, "emoloop lvlm serve", lvlm.model)
        except UserError as error:
            yield Check("vLLM server", "missing", str(error), "set lvlm.base_url")
    else:
        yield _model(lvlm.model, "lvlm")
    yield _vllm(
        lvlm.vllm_python, "missing" if lvlm.engine == "vllm-offline" or lvlm.vllm_python else "optional"
    )


def _vllm(setting: str | None, absent: State) -> Check:
    remedy = (
        "`emoloop lvlm install` (CPU), or the extra vllm in an environment of its own and lvlm.vllm_python"
    )
    try:
        python = find_python(setting)
    except UserError:
        return Check("vllm", absent, f"{setting} is no interpreter" if setting else "not installed", remedy)
    # Looked up, never run: the settings file of any folder may name a program.
    found = sorted(python.absolute().parent.parent.glob("lib/python3*/site-packages/vllm-*.dist-info"))
    if not found:
        return Check("vllm", absent, f"{python} has no vllm beside it", remedy)
    return Check("vllm", "ok", f"vllm {found[-1].name.split('-')[1].removesuffix('.dist')} ({python})")


def _server(name: str, url: str, remedy: str, model: str | None = None) -> Check:
    import httpx

    try:
        answer = httpx.get(f"{url.rstrip('/')}/models", timeout=PATIENCE, trust_env=not is_local(url))
        answer.raise_for_status()
        served = [entry["id"] for entry in answer.json()["data"]]
    except (httpx.HTTPError, OSError, ValueError, KeyError, TypeError) as error:
        reason = f"{url}: {type(error).__name__}: {str(error) or 'no answer'}"
        return Check(name, "missing", reason[:200], remedy)
    if model is not None and model not in served:
        wrong = f"{url} serves {', '.join(served)}, not {model}"
        return Check(name, "missing", wrong, f"set lvlm.model to one of these, or {remedy} {model}")
    return Check(name, "ok", f"{url} serves {', '.join(served)}")


def _tracing(settings: Settings) -> Iterator[Check]:
    import httpx

    variables = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
    endpoint = settings.traces.otlp_endpoint or next(filter(None, map(os.environ.get, variables)), None)
    if not endpoint:
        yield Check("tracing", "ok", "off (set traces.otlp_endpoint to send spans)")
        return
    try:
        httpx.get(endpoint, timeout=PATIENCE)  # any answer will do: a collector refuses GET
        yield Check("tracing", "ok", f"{endpoint} answers")
    except httpx.HTTPError as error:
        remedy = "start the collector, or unset the endpoint; the log is complete without it"
        yield Check("tracing", "optional", f"{endpoint}: {type(error).__name__}", remedy)


def _log(settings: Settings) -> Iterator[Check]:
    from sqlalchemy import create_engine
    from sqlalchemy.exc import SQLAlchemyError

    url = settings.traces.database_url
    if url is None or url.startswith("sqlite"):
        return
    try:
        with create_engine(url).connect():
            yield Check("log", "ok", "the database answers")
    except (SQLAlchemyError, ImportError) as error:
        remedy = "mend traces.database_url, or unset it for SQLite in home"
        yield Check("log", "missing", first_line(error)[:200], remedy)


#: In the order of the report; each yields its checks.
EXAMINERS = (_python, _packages, _device, _home, _log, _generator, _lvlm, _tracing)


def _in_force(settings: Settings) -> Iterator[dict[str, Any]]:
    """Every setting with its value; secrets are not shown."""
    usual = Settings.model_construct().model_dump()
    for name, section in settings.model_dump().items():
        if not isinstance(section, dict):
            yield {"name": name, "value": str(section), "set": name in settings.model_fields_set}
            continue
        for key, value in section.items():
            changed = value != usual[name][key]
            shown = redact(value) if isinstance(value, str) else value
            hidden = key in SECRETS and changed
            yield {"name": f"{name}.{key}", "value": "(set)" if hidden else shown, "set": changed}
