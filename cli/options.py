"""What the verbs share: types of options, and how words become settings, filters and times."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from ..domain import UserError

if TYPE_CHECKING:
    from typer import Context

    from ..traces.rows import RunFilter
    from ..traces.store import TraceStore

_MODELS, _LOOP, _OUTPUT = "Models", "Loop", "Output"

#: Keys of `--where`, and the field of `RunFilter` that each sets.
CONDITIONS = {
    "run": "run_ids",
    "status": "status",
    "category": "category",
    "emotion": "category",
    "valence": "valence",
    "arousal": "arousal",
    "gain": "min_gain",
    "prompt": "prompt",
    "model": "model",
    "adapter": "adapter",
    "since": "since",
    "limit": "limit",
}

#: How a run in the log may stand.
STATUSES = ("running", "completed", "failed")

#: Older flags that stand for a condition, and how many words follow them.
_ALIASES = {
    "--status": ("status", 1),
    "--category": ("category", 1),
    "--emotion": ("category", 1),
    "--valence": ("valence", 2),
    "--arousal": ("arousal", 2),
    "--min-gain": ("gain", 1),
    "--prompt": ("prompt", 1),
    "--model": ("model", 1),
    "--adapter": ("adapter", 1),
    "--since": ("since", 1),
    "--limit": ("limit", 1),
}

Home = Annotated[
    Path | None, typer.Option(help="Folder of log, pictures and checkpoints.", rich_help_panel=_OUTPUT)
]
AsJson = Annotated[
    bool, typer.Option("--json", help="Print one JSON document on stdout.", rich_help_panel=_OUTPUT)
]
Out = Annotated[
    Path | None,
    typer.Option(help="Folder for best picture, contact sheet and trace.", rich_help_panel=_OUTPUT),
]
Model = Annotated[
    str | None,
    typer.Option(help="Generator: a preset, a diffusers folder, a hub id.", rich_help_panel=_MODELS),
]
Adapter = Annotated[str | None, typer.Option(help="LoRA or distilled adapter.", rich_help_panel=_MODELS)]
AdapterScale = Annotated[
    float | None, typer.Option(help="How strongly the adapter acts.", rich_help_panel=_MODELS)
]
Steps = Annotated[int | None, typer.Option(help="Denoising steps.", rich_help_panel=_MODELS)]
Guidance = Annotated[float | None, typer.Option(help="Guidance scale.", rich_help_panel=_MODELS)]
Lvlm = Annotated[
    str | None,
    typer.Option(
        help="LVLM: a preset, folder or hub id; a server's URL; or an engine: embedded, vllm, vllm-offline.",
        rich_help_panel=_MODELS,
    ),
]
Rounds = Annotated[int | None, typer.Option(help="Most rounds.", rich_help_panel=_LOOP)]
Images = Annotated[int | None, typer.Option(help="Pictures in a round.", rich_help_panel=_LOOP)]
Tolerance = Annotated[
    float | None, typer.Option(help="How near to the target is reached, on each axis.", rich_help_panel=_LOOP)
]
Patience = Annotated[
    int | None, typer.Option(help="Rounds without a better picture that end a run.", rich_help_panel=_LOOP)
]
Reward = Annotated[
    str | None, typer.Option(help="A name, or a path like my_pkg.my_mod:MyReward.", rich_help_panel=_LOOP)
]
Strict = Annotated[
    bool,
    typer.Option(
        "--strict", help="Refuse prompts with words that the model does not know.", rich_help_panel=_LOOP
    ),
]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Any other setting, such as lvlm.timeout=60."),
]
Where = Annotated[
    list[str] | None,
    typer.Option(
        "--where",
        "--from",
        metavar="KEY=VALUE",
        help=f"Which runs; may be repeated. Keys: {', '.join(CONDITIONS)}. "
        "Ranges as valence=0.5..2; since as 2026-01-31, 30m, 12h or 7d.",
    ),
]


class Filtered(TyperCommand):
    """A command with `--where` that takes the older flags, such as `--min-gain 0.5`, as well."""

    def parse_args(self, ctx: Context, args: list[str]) -> list[str]:
        """Turn older flags into `--where`, then parse as usual."""
        return super().parse_args(ctx, list(_modern(args)))


def _modern(args: Sequence[str]) -> Iterator[str]:
    rest = list(args)
    while rest:
        word = rest.pop(0)
        flag, equals, value = word.partition("=")
        if flag not in _ALIASES:
            yield word
            if word == "--":
                yield from rest
                return
            continue
        key, count = _ALIASES[flag]
        values = [value] if equals else rest[:count]
        del rest[: 0 if equals else count]
        if len(values) < count:
            raise UserError(f"{flag} wants {'two numbers' if count == 2 else 'a value'}")
        yield from ("--where", f"{key}={'..'.join(values)}")


def overrides(given: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a verb as settings, nested by section; what was not given is left out.

    Args:
        given: Options by name, as `typer.Context.params` holds them.

    Raises:
        UserError: A word of `--set` that is no KEY=VALUE.
    """
    from ..settings import lvlm_settings, merged, pruned, read_set

    generator = {key: given.get(key) for key in ("model", "adapter", "adapter_scale", "steps", "guidance")}
    loop = {key: given.get(key) for key in ("rounds", "images", "tolerance", "patience", "reward")}
    result = {
        "home": given.get("home"),
        "generator": {**generator, "strict": given.get("strict") or None},
        "loop": loop,
        "lvlm": lvlm_settings(given["lvlm"]) if given.get("lvlm") is not None else {},
    }
    return merged(pruned(result), read_set(given.get("set_") or ()))


def read_where(words: Sequence[str] | None, default_limit: int | None = None) -> RunFilter:
    """The runs that `--where` names; conditions may stand in one word with commas between.

    Raises:
        UserError: An unknown condition or a value that does not parse.
    """
    from pydantic import ValidationError

    from ..traces.rows import RunFilter

    fields: dict[str, Any] = {"limit": default_limit}
    for item in (part for text in words or () for part in re.split(r",(?=\s*\w+=)", text)):
        key, equals, value = (part.strip() for part in item.partition("="))
        if not equals or key not in CONDITIONS:
            raise UserError(f"--where {item.strip()!r}: want KEY=VALUE with one of {', '.join(CONDITIONS)}")
        parsed: Any = value
        if key == "run":
            parsed = (*fields.get("run_ids", ()), *value.split("+"))
        elif key in ("valence", "arousal"):
            low, dots, high = value.partition("..")
            parsed = (low, high) if dots else (value, value)
        elif key == "status" and value not in STATUSES:
            raise UserError(f"--where status={value}: want one of {', '.join(STATUSES)}")
        elif key == "since":
            parsed = read_time(value)
        fields[CONDITIONS[key]] = parsed
    try:
        return RunFilter.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"--where {first['loc'][0]}: {first['msg']} (got {first.get('input')!r})") from error


def chosen(store: TraceStore, names: Sequence[str] | None, where: RunFilter) -> RunFilter:
    """A filter whose runs go by their full ids.

    Args:
        store: The log.
        names: Runs named one by one: ids, their beginnings, or "last"; None for those of the filter.
        where: Further conditions.

    Raises:
        UserError: No run, or several, answer to a name.
    """
    named = (*(names or ()), *(where.run_ids or ()))
    return where.model_copy(update={"run_ids": tuple(map(store.resolve, named))}) if named else where


def read_time(text: str) -> datetime:
    """A moment: 2026-01-31, 2026-01-31T12:00, or 30m, 12h, 7d ago.

    Raises:
        UserError: It is none.
    """
    try:
        if ago := re.fullmatch(r"(\d+)([mhd])", text):
            unit = {"m": "minutes", "h": "hours", "d": "days"}[ago[2]]
            return datetime.now(UTC) - timedelta(**{unit: int(ago[1])})
        return datetime.fromisoformat(text).astimezone()
    except (ValueError, OverflowError):
        raise UserError(f"--where since={text}: want 2026-01-31, 2026-01-31T12:00, 30m, 12h or 7d") from None


def print_json(document: Mapping[str, Any], indent: int | None = None) -> None:
    """One JSON document on stdout, in plain ASCII where stdout cannot say more."""
    plain = "utf" not in (sys.stdout.encoding or "").lower()
    print(json.dumps(document, ensure_ascii=plain, indent=indent, allow_nan=False))
