"""Settings: keyword, then environment (`EMOLOOP_…`, nested by `__`), then `emoloop.toml`, then defaults.

An unknown key anywhere is an error: a typo that silently keeps a default costs a day of training.
"""

from __future__ import annotations

import json
import os
import re
import tomllib
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
    TomlConfigSettingsSource,
)
from typing_extensions import TypedDict

from .domain import Emotion, UserError, first_line

#: Settings whose values are never printed.
SECRETS = frozenset({"api_key", "database_url", "token"})

#: What Kubernetes sets in every container for a service called emoloop, or emoloop-something.
_KUBERNETES = re.compile(
    r"EMOLOOP_(\w+_)?(SERVICE_(HOST|PORT(_\w+)?)|PORT(_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)?)"
)


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", validate_default=True, allow_inf_nan=False)


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
    #: Of a distilled artifact only its emotion tokens, or only its LoRA; None is the whole.
    adapter_part: Literal["tokens", "lora"] | None = None
    #: How strongly its visual prompts do, where it has some: 0 leaves them out.
    visual_scale: float = 1.0
    #: How far guidance goes along what they change, as a multiple of the text's; other than 1 takes a third pass.
    visual_guidance: float = 1.0
    #: The category whose visual prompt the negative branch gets.
    visual_negative: Emotion | None = None
    #: An adapter of reversed preferences (`emoloop distill npo`) that serves the negative branch of guidance alone.
    negative_adapter: str | None = None
    #: How strongly it does: 0 leaves it out.
    negative_scale: float = 1.0
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
    #: How the network is run: "eager", "compile" (torch.compile), "onnxruntime" (on a CPU; extra `onnx`), or "tuned":
    #: what `emoloop bench generator --tune` found fastest for this model on this machine, else eager.
    backend: Literal["eager", "compile", "onnxruntime", "tuned"] = "eager"
    #: One of diffusers' attention backends ("flash", "sage", "_native_cudnn"); None is its default.
    attention: str | None = None
    #: Add the adapter's LoRA to the weights, since it serves at one strength: no extra layers, other last bits.
    fuse_lora: bool = False
    #: Refuse prompts with words that the model does not know.
    strict: bool = False


class LVLMSettings(_Section):
    """What reads images and rewrites prompts."""

    #: "embedded" runs in this process, "vllm" talks to a server, "vllm-offline" to one of its own.
    engine: Literal["embedded", "vllm", "vllm-offline"] = "embedded"
    #: A preset ("miniature"), a folder or a hub id; for a server, its served model name.
    model: str = "miniature"
    #: One URL, or several separated by commas (the least busy one is asked).
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
    #: Temperature of a rewriter that is asked for several different prompts; one prompt is asked at `temperature`.
    rewriter_temperature: float = Field(default=0.9, ge=0)
    #: The interpreter of vLLM's own environment, for `emoloop lvlm serve` and "vllm-offline".
    vllm_python: str | None = None
    device: str = "auto"
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"


class LoopSettings(_Section):
    """How the loop runs. `tolerance`, `patience` and the reward are version 1 of the loop's settings."""

    rounds: int = Field(default=3, ge=1, le=50)
    images: int = Field(default=8, ge=1, le=256)
    #: Distinct prompts in a round, at most one for each image; None takes the generator's preset
    #: (`proposals_per_image`). 1 paints one prompt with `images` seeds.
    proposals: int | None = Field(default=None, ge=1, le=256)
    #: Of several prompts' round 0, how many images show the neutral prompt; the others show first rewrites.
    neutral_images: int = Field(default=1, ge=1, le=256)
    #: The target is reached when the best candidate is within this of it, on each wanted axis.
    tolerance: float = Field(default=0.2, ge=0)
    #: Stop after this many rounds in a row without a better candidate.
    patience: int = Field(default=2, ge=1)
    #: A name in `tools.reward.REWARDS`, a dotted path ("my_pkg.my_mod:MyReward"), or several with weights:
    #: "emotion + 0.5*pickscore", or a mapping of names to weights, or a list of names.
    reward: str = "emotion"
    #: A name in `agents.rewriters.REWRITERS` or a dotted path ("my_pkg.my_mod:MyRewriter").
    rewriter: str = "simple"
    #: Of the rewriter `mc_agent`: how many personas write in a round, drawn by its seed.
    personas: int = Field(default=5, ge=1, le=64)
    #: A folder of `.yaml` files with further personas for it.
    persona_folder: Path | None = None
    #: Round 0 already paints a rewrite of the neutral prompt, made without feedback.
    rewrite_first: bool = False
    #: Use all rounds whatever was reached; the best candidate over all of them wins.
    exhaust: bool = False
    #: No round begins that would make more images than this in all.
    max_images: int | None = Field(default=None, ge=1)
    #: No round begins once the LVLM was asked so often, or so many seconds (of the clock) have passed.
    max_calls: int | None = Field(default=None, ge=1)
    max_seconds: float | None = Field(default=None, gt=0)
    #: So many of the best prompts are painted and read twice more before one is delivered: what won by a lucky
    #: reading is found out, and the estimate is one that selected nothing. 0 delivers the best reading.
    finalists: int = Field(default=0, ge=0, le=64)
    #: Prompts that are written for each that is painted: a model of what words did in this run (and, with a memory, in
    #: the log) picks among them. 1 paints them all; None takes the generator's preset (`oversample`).
    oversample: int | None = Field(default=None, ge=1, le=16)
    #: Before anything was tried, the rewriter is shown so many rewrites of other prompts that came near the target in
    #: the log's runs, and what these add is tried behind the run's own prompt. 0 leaves the log out of a run, so that
    #: the same seed gives the same run whatever was run before.
    memory: int = Field(default=0, ge=0, le=64)
    #: Pause before each rewrite for a person (`interrupt()`).
    review: bool = False
    #: Seconds for one node before it is retried.
    node_timeout: float = Field(default=1800.0, gt=0)

    @field_validator("reward", mode="before")
    @classmethod
    def _sum(cls, given: Any) -> Any:
        if isinstance(given, str) and given.lstrip().startswith(("{", "[")):
            given = yaml.safe_load(given)
        if isinstance(given, list):
            given = dict.fromkeys(given, 1)
        return (
            " + ".join(f"{weight}*{name}" for name, weight in given.items())
            if isinstance(given, dict)
            else given
        )


class TraceSettings(_Section):
    """Where the log goes."""

    #: SQLAlchemy URL; None is `events.db` in `home`.
    database_url: str | None = None
    #: Put prompts and answers on spans (off: spans carry numbers and names only).
    capture_content: bool = False
    #: fsspec URL of the pictures (`s3://bucket/folder`), for several machines; None is `blobs` in `home`.
    blobs_url: str | None = None
    #: What a PNG carries that leaves the log (`run --out`, the service, bundles): its recipe and a mark that a model
    #: made it, the mark alone, or nothing.
    metadata: Literal["recipe", "mark", "none"] = "recipe"
    #: Bytes of a picture that goes along with content; of a larger one its `file:` address does.
    picture_bytes: int = Field(default=1_000_000, ge=0)
    #: OTLP endpoint; None takes OTEL_EXPORTER_OTLP_ENDPOINT; without either there are no spans.
    otlp_endpoint: str | None = None
    #: Full URL for metrics beside the spans; None takes OTEL_EXPORTER_OTLP_METRICS_ENDPOINT; without either none.
    metrics_endpoint: str | None = None


class ServiceSettings(_Section):
    """The HTTP service, `emoloop serve`."""

    #: Address to listen on. Any but this machine's own needs a token, or a proxy in front.
    host: str = "127.0.0.1"
    #: 0 takes a free one.
    port: int = Field(default=8765, ge=0, le=65535)
    #: What a client has to know (`Authorization: Bearer …`; the page asks for it once); never logged.
    token: str | None = Field(default=None, min_length=16, repr=False)
    #: A reverse proxy in front says who comes in.
    behind_proxy: bool = False
    #: Names by which browsers reach the server beside this machine's own, separated by commas.
    hosts: str = ""
    #: Runs at a time; another one is refused.
    runs: int = Field(default=16, ge=1)
    #: Jobs (distillation, evaluation, collection, training) at a time; 0 leaves them to other servers.
    jobs: int = Field(default=1, ge=0)
    #: Requests a minute of one client from elsewhere, and its answers at a time, streams among them; 0 is no limit.
    client_requests: int = Field(default=1200, ge=0)
    client_answers: int = Field(default=100, ge=0)
    #: Bytes of a request's body.
    body_bytes: int = Field(default=1_000_000, ge=1000)
    #: What an hour of making pictures costs, and a million of the LVLM's tokens in and out, in one currency; 0 each
    #: where nothing is to be said of a run's cost.
    hour_price: float = Field(default=0.0, ge=0)
    input_price: float = Field(default=0.0, ge=0)
    output_price: float = Field(default=0.0, ge=0)


class RaySettings(_Section):
    """`--engine ray`: work on a Ray cluster, the one that RAY_ADDRESS names or one of this machine."""

    #: Actors at a time, at most; each holds the models.
    actors: int = Field(default=2, ge=1)
    #: What one needs, as Ray's own options: `{"num_gpus": 1}`, `{"resources": {"a100": 1}}`.
    options: dict[str, Any] = {}


class Settings(BaseSettings):
    """All settings of emoloop; see the sections."""

    model_config = SettingsConfigDict(
        env_prefix="EMOLOOP_",
        env_nested_delimiter="__",
        extra="forbid",
        nested_model_default_partial_update=True,
    )

    #: Folder for the event log, blobs and checkpoints; absolute once the settings are resolved.
    home: Path = Path(".emoloop")
    generator: GeneratorSettings = GeneratorSettings()
    lvlm: LVLMSettings = LVLMSettings()
    loop: LoopSettings = LoopSettings()
    traces: TraceSettings = TraceSettings()
    service: ServiceSettings = ServiceSettings()
    ray: RaySettings = RaySettings()

    @field_validator("home")
    @classmethod
    def _absolute(cls, home: Path) -> Path:
        try:
            return home.expanduser().absolute()
        except RuntimeError as error:
            raise ValueError(f"no such user: {home}") from error

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
        named = os.environ.get("EMOLOOP_CONFIG")
        path = Path(named or "emoloop.toml").expanduser()
        if named and not path.is_file():
            raise UserError(f"EMOLOOP_CONFIG names {named}, and there is no such file")
        return init_settings, env_settings, TomlConfigSettingsSource(settings_cls, toml_file=path)


class SettingsOverrides(TypedDict, total=False):
    """Settings as keywords of a call, over those of environment and file."""

    home: str | Path | None
    loop: Mapping[str, Any] | LoopSettings | None
    traces: Mapping[str, Any] | TraceSettings | None


class _Given(Settings):
    """Keywords alone: what is resolved already must not meet the environment again."""

    @classmethod
    def settings_customise_sources(
        cls, settings_cls: type[BaseSettings], init_settings: PydanticBaseSettingsSource, *_: Any, **__: Any
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return (init_settings,)


def _refuse_unknown_environment() -> None:
    # pydantic-settings reads only the variables it looks for, so a misspelt EMOLOOP_LOOP__RUONDS would pass.
    known = {"EMOLOOP_CONFIG", "EMOLOOP_DEBUG"}
    for name, field in Settings.model_fields.items():
        known.add(f"EMOLOOP_{name}".upper())
        if isinstance(field.annotation, type) and issubclass(field.annotation, _Section):
            known |= {f"EMOLOOP_{name}__{key}".upper() for key in field.annotation.model_fields}
    for variable in os.environ:
        name = variable.upper()
        if name.startswith("EMOLOOP_") and name not in known and not _KUBERNETES.fullmatch(name):
            raise UserError(
                f"unknown setting {variable} in the environment; known: {', '.join(sorted(known))}"
            )


def load_settings(overrides: Mapping[str, Any] | None = None, base: Settings | None = None) -> Settings:
    """Resolve the settings.

    Args:
        overrides: Keywords; nested by section (`{"loop": {"rounds": 2}}`). A value of None inside a section is
            a value; a section or a home that is None was not given.
        base: Settings that are resolved already, under the overrides; instead of environment and file.

    Raises:
        UserError: An unknown key or a value out of range, in one line that names it.
    """
    given = {key: value for key, value in (overrides or {}).items() if value not in (None, {})}
    try:
        if base is None:
            _refuse_unknown_environment()
            return Settings(**given)
        made = _Given(**merged(base.model_dump(exclude_unset=True), given))
        return Settings.model_construct(made.model_fields_set, **dict(made))
    except ValidationError as error:
        raise UserError(explain(error)) from error
    except SettingsError as error:
        raise UserError(f"the environment: {first_line(error)}; JSON is wanted") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
        where = os.environ.get("EMOLOOP_CONFIG", "emoloop.toml")
        hint = " (save the file as UTF-8)" if isinstance(error, UnicodeDecodeError) else ""
        raise UserError(f"{where}: {error}{hint}") from error


def explain(error: ValidationError) -> str:
    """The first thing that is wrong with some settings, in one line without secrets."""
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        return f"unknown setting {where!r} (see `emoloop doctor` for those in force)"
    value = first.get("input")
    # A whole section may hold a secret as well, and an address may hold a password.
    shown = isinstance(value, str | int | float) and "://" not in str(value)
    hidden = not shown or str(first["loc"][-1]) in SECRETS
    return f"setting {where}: {first['msg']}" + ("" if hidden else f" (got {value!r})")


def read_set(words: Iterable[str], model: type[BaseModel] = Settings) -> dict[str, Any]:
    """Words such as `lvlm.timeout=60` as nested settings.

    The setting decides how its value is read: one that is text takes any text, digits too; any other is read
    as YAML, of which JSON is a part. `null` unsets a setting that may be unset.

    Args:
        words: KEY=VALUE each; a later word wins.
        model: Whose settings they are.

    Raises:
        UserError: No KEY=VALUE, or a value that is no YAML. Values are not repeated: one may be a secret.
    """
    result: dict[str, Any] = {}
    for word in words:
        key, equals, text = word.partition("=")
        key = key.strip()
        if not equals or not key:
            raise UserError(f"--set {key}: KEY=VALUE is wanted, such as lvlm.timeout=60")
        nested: Any = _typed(text, _kinds(model, key.split(".")), key)
        for part in reversed(key.split(".")):
            nested = {part: nested}
        result = merged(result, nested)
    return result


def _kinds(model: Any, path: list[str]) -> tuple[Any, ...]:
    """The types that a setting may have; none for an unknown one, which is refused later by its name."""
    for part in path:
        fields = getattr(model, "model_fields", {})
        if part not in fields:
            return ()
        model = fields[part].annotation
    # Only of a choice or a union are the parts kinds of their own.
    return get_args(model) if get_origin(model) in (Literal, types.UnionType, typing.Union) else (model,)


def _typed(text: str, kinds: tuple[Any, ...], key: str) -> Any:
    if any(kind in (str, Path) or isinstance(kind, str) for kind in kinds):
        if text == "null" and type(None) in kinds:
            return None
        return _json(text) if len(text) > 1 and text[0] == text[-1] == '"' else text
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"--set {key}: the value is not YAML: {first_line(error)}") from error
    # YAML 1.1 reads 1e-4 as text.
    return _json(value) if isinstance(value, str) else value


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def read_yaml(path: Path) -> dict[str, Any]:
    """The keys and values of a YAML file; none where it is empty.

    Raises:
        UserError: It cannot be read, or holds something else.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8-sig")) or {}
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 (byte {error.start}): save it as UTF-8") from error
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not YAML ({first_line(error)})") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: keys with values are wanted")
    return content


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


def generator_settings(given: str | Path | Mapping[str, Any] | GeneratorSettings | None) -> dict[str, Any]:
    """What a caller gave for the generator as settings; one word is a model."""
    return as_dict(given) if not isinstance(given, str | Path) else {"model": str(given)}


def lvlm_settings(given: str | Path | Mapping[str, Any] | LVLMSettings | None) -> dict[str, Any]:
    """What a caller gave for the LVLM as settings; one word is an engine, a server's URL, or a model."""
    if not isinstance(given, str | Path):
        return as_dict(given)
    word = str(given)
    if word in get_args(LVLMSettings.model_fields["engine"].annotation):
        return {"engine": word}
    if word.startswith(("http://", "https://")):
        return {"engine": "vllm", "base_url": word}
    return {"model": word}


def as_dict(given: Mapping[str, Any] | BaseModel | None) -> dict[str, Any]:
    """A section that was given in any of its forms: what was set of it."""
    return given.model_dump(exclude_unset=True) if isinstance(given, BaseModel) else dict(given or {})
