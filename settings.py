"""Settings: keyword, then environment (`EMOLOOP_…`, nested by `__`), then `emoloop.toml`, then defaults.

An unknown key anywhere is an error: a typo that silently keeps a default costs a day of training.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from .domain import UserError


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", validate_default=True)


class GeneratorSettings(_Section):
    """What makes the images."""

    #: A preset ("miniature", "sd35-medium"), a diffusers folder or a hub id.
    model: str = "miniature"
    #: An OpenAI-images endpoint (vLLM-Omni, SGLang) instead of a pipeline in this process.
    base_url: str | None = None
    #: That endpoint's bearer token; never logged.
    api_key: str = Field(default="none", repr=False)
    #: LoRA folder or file, or a distilled artifact.
    adapter: str | None = None
    #: How strongly the adapter speaks: 0 is the base model.
    adapter_scale: float = 1.0
    #: "auto" is cuda, then mps, then cpu.
    device: str = "auto"
    #: "auto" is bfloat16 on cuda, float32 elsewhere.
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    #: None leaves each of these to the adapter (guidance), the model's preset (`emoloop.json` in its folder) or
    #: its pipeline.
    steps: int | None = Field(default=None, ge=1)
    guidance: float | None = Field(default=None, ge=0)
    height: int | None = Field(default=None, ge=8)
    width: int | None = Field(default=None, ge=8)
    negative_prompt: str | None = None
    #: Images in one forward pass. Short batches are padded: a seed gives the same bits in any company.
    micro_batch: int | None = Field(default=None, ge=1)
    #: How long a request waits for company, in milliseconds.
    batch_window_ms: float = Field(default=5.0, ge=0)
    #: Refuse prompts with words that the model does not know.
    strict: bool = False


class LVLMSettings(_Section):
    """What reads images and rewrites prompts."""

    #: "embedded" runs in this process, "vllm" talks to a server, "vllm-offline" runs vLLM as a child.
    engine: Literal["embedded", "vllm", "vllm-offline"] = "embedded"
    #: A preset ("miniature"), a folder or a hub id; for a server, its served model name.
    model: str = "miniature"
    #: One URL, or several separated by commas (a run stays with one while it lives).
    base_url: str = "http://127.0.0.1:8000/v1"
    api_key: str = "none"
    #: Seconds for one request.
    timeout: float = Field(default=120.0, gt=0)
    #: Seconds to go on trying while the server is away before a critique counts as missing.
    patience: float = Field(default=300.0, ge=0)
    #: Requests in flight at once.
    concurrency: int = Field(default=16, ge=1)
    temperature: float = Field(default=0.0, ge=0)
    max_tokens: int = Field(default=512, ge=16)
    #: Answers per critique; their mean counts and their spread is logged. Above 1 needs a temperature.
    samples: int = Field(default=1, ge=1)
    #: Prompt files in `agents/prompts/`, by name; None takes the model's preset.
    critic_prompt: str | None = None
    rewriter_prompt: str | None = None
    #: The interpreter of vLLM's own environment, for `emoloop lvlm serve` and "vllm-offline".
    vllm_python: str | None = None
    device: str = "auto"
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"


class LoopSettings(_Section):
    """How the loop runs. `tolerance`, `patience` and the reward are version 1 of the loop's settings."""

    rounds: int = Field(default=3, ge=1, le=50)
    images: int = Field(default=8, ge=1, le=256)
    #: The target is reached when the best candidate is within this of it, on each wanted axis.
    tolerance: float = Field(default=0.2, ge=0)
    #: Stop after this many rounds in a row without a better candidate.
    patience: int = Field(default=2, ge=1)
    #: A name in `tools.reward.REWARDS` or a dotted path ("my_pkg.my_mod:MyReward").
    reward: str = "emotion"
    #: A name in `agents.rewriters.REWRITERS` or a dotted path ("my_pkg.my_mod:MyRewriter").
    rewriter: str = "simple"
    #: Round 0 already paints a rewrite of the neutral prompt, made without feedback.
    rewrite_first: bool = False
    #: Use all rounds whatever was reached; the best candidate over all of them wins.
    exhaust: bool = False
    #: Pause before each rewrite for a person (`interrupt()`).
    review: bool = False
    #: Seconds for one node before it is retried.
    node_timeout: float = Field(default=1800.0, gt=0)


class TraceSettings(_Section):
    """Where the log goes."""

    #: SQLAlchemy URL; None is `events.db` in `home`.
    database_url: str | None = None
    #: Put prompts and answers on spans (off: spans carry numbers and names only).
    capture_content: bool = False
    #: OTLP endpoint; None takes OTEL_EXPORTER_OTLP_ENDPOINT; without either there are no spans.
    otlp_endpoint: str | None = None


class Settings(BaseSettings):
    """All settings of emoloop; see the sections."""

    model_config = SettingsConfigDict(
        env_prefix="EMOLOOP_",
        env_nested_delimiter="__",
        extra="forbid",
        nested_model_default_partial_update=True,
    )

    #: Folder for the event log, blobs and checkpoints.
    home: Path = Path(".emoloop")
    generator: GeneratorSettings = GeneratorSettings()
    lvlm: LVLMSettings = LVLMSettings()
    loop: LoopSettings = LoopSettings()
    traces: TraceSettings = TraceSettings()

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Keyword, environment, then the TOML file that `EMOLOOP_CONFIG` names (default `emoloop.toml`)."""
        path = Path(os.environ.get("EMOLOOP_CONFIG", "emoloop.toml"))
        return init_settings, env_settings, TomlConfigSettingsSource(settings_cls, toml_file=path)


def _refuse_unknown_environment() -> None:
    # pydantic-settings reads only the variables it looks for, so a misspelt EMOLOOP_LOOP__RUONDS would pass.
    known = {"EMOLOOP_CONFIG", "EMOLOOP_DEBUG"}
    for name, field in Settings.model_fields.items():
        known.add(f"EMOLOOP_{name}".upper())
        if isinstance(field.annotation, type) and issubclass(field.annotation, _Section):
            known |= {f"EMOLOOP_{name}__{key}".upper() for key in field.annotation.model_fields}
    for variable in os.environ:
        if variable.upper().startswith("EMOLOOP_") and variable.upper() not in known:
            raise UserError(
                f"unknown setting {variable} in the environment; known: {', '.join(sorted(known))}"
            )


def load_settings(overrides: dict[str, Any] | None = None) -> Settings:
    """Resolve the settings.

    Args:
        overrides: Keywords; nested by section (`{"loop": {"rounds": 2}}`). None values are ignored.

    Raises:
        UserError: An unknown key or a value out of range, in one line that names it.
    """
    _refuse_unknown_environment()
    try:
        return Settings(**pruned(overrides or {}))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            raise UserError(f"unknown setting {where!r} (see `emoloop doctor` for those in force)") from error
        raise UserError(f"setting {where}: {first['msg']} (got {first.get('input')!r})") from error
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"emoloop.toml: {error}") from error


def pruned(node: Mapping[str, Any]) -> dict[str, Any]:
    """Nested settings without what was not given: the Nones."""
    return {
        key: pruned(value) if isinstance(value, dict) else value
        for key, value in node.items()
        if value is not None and value != {}
    }


def merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Two nested dicts of settings as one; `over` wins."""
    result = dict(base)
    for key, value in over.items():
        below = result.get(key)
        if isinstance(below, Mapping) and isinstance(value, Mapping):
            value = merged(below, value)
        result[key] = value
    return result


def lvlm_settings(word: str) -> dict[str, Any]:
    """What one word about the LVLM means: an engine, a server's URL, or a model."""
    if word in get_args(LVLMSettings.model_fields["engine"].annotation):
        return {"engine": word}
    if word.startswith(("http://", "https://")):
        return {"engine": "vllm", "base_url": word}
    return {"model": word}
