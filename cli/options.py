"""What the verbs share: types of options, and how words become settings, filters and times."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from typer.core import TyperCommand

from ..domain import Emotion, UserError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

    from ..rl.distill import Distilled
    from ..rl.trainer import Watcher
    from ..traces.rows import RunFilter
    from ..traces.store import TraceStore

#: Conditions of `--where`.
CONDITIONS = (
    "run", "status", "category", "emotion", "valence", "arousal", "gain", "prompt", "model", "adapter", "label",
    "since", "limit",
)  # fmt: skip

#: Conditions whose field of `RunFilter` has another name.
_FIELDS = {"run": "run_ids", "emotion": "category", "gain": "min_gain"}

#: How a run in the log may stand.
STATUSES = ("running", "completed", "failed")

#: How much of a task is done, for `bars`.
COUNT = "{task.completed}/{task.total}"

_models = partial(typer.Option, rich_help_panel="Models")
_loop = partial(typer.Option, rich_help_panel="Loop")
_output = partial(typer.Option, rich_help_panel="Output")

Home = Annotated[Path | None, _output(help="Folder of log, pictures and checkpoints.")]
AsJson = Annotated[bool, _output("--json", help="Print one JSON document on stdout.")]
Out = Annotated[Path | None, _output(help="Folder for best picture, contact sheet and trace.")]
Model = Annotated[str | None, _models(help="Generator: a preset, a diffusers folder, a hub id.")]
Adapter = Annotated[str | None, _models(help="LoRA or distilled adapter.")]
AdapterScale = Annotated[float | None, _models(help="How strongly the adapter acts.")]
Steps = Annotated[int | None, _models(help="Denoising steps.")]
Guidance = Annotated[float | None, _models(help="Guidance scale.")]
Lvlm = Annotated[
    str | None,
    _models(help="LVLM: a preset, folder or hub id; a server's URL; or embedded, vllm, vllm-offline."),
]
Valence = Annotated[float | None, typer.Option(help="Unpleasant (-3) to pleasant (3).")]
Arousal = Annotated[float | None, typer.Option(help="Calm (-3) to stirred (3).")]
Category = Annotated[
    str | None, typer.Option("--category", "--emotion", help=f"One of {', '.join(Emotion)}.")
]
Rounds = Annotated[int | None, _loop(help="Most rounds.")]
Images = Annotated[int | None, _loop(help="Pictures in a round.")]
Proposals = Annotated[
    int | None, _loop(help="Different prompts in a round; by default the generator's preset says.")
]
Tolerance = Annotated[float | None, _loop(help="How near to the target is reached, on each axis.")]
Patience = Annotated[int | None, _loop(help="Rounds without a better picture that end a run.")]
Reward = Annotated[
    str | None,
    _loop(help="A name, a path like my_pkg.my_mod:MyReward, or several: 'emotion + 0.5*pickscore'."),
]
Strict = Annotated[bool, _loop("--strict", help="Refuse prompts with words that the model does not know.")]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Any other setting, such as lvlm.timeout=60."),
]
Engine = Annotated[
    Literal["local", "ray"],
    typer.Option(help="Who holds the models: this process, or `ray.actors` actors of a Ray cluster."),
]
# Of what trains.
Artifact = Annotated[Path | None, typer.Option(help="Folder of the artifact; made by this run.")]
GoOn = Annotated[bool, typer.Option(help="Go on from the newest checkpoint in --out.")]
Config = Annotated[Path | None, typer.Option(help="YAML file over the preset.")]
Knobs = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Over the file: train.steps=200")
]
PrintConfig = Annotated[
    bool, typer.Option(help="Print every knob with its value and meaning as YAML for --config, and stop.")
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

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Turn older flags into `--where`, then parse as usual."""
        return super().parse_args(ctx, list(_modern(args)))


def _modern(args: Sequence[str]) -> Iterator[str]:
    rest = list(args)
    while rest:
        word = rest.pop(0)
        flag, equals, value = word.partition("=")
        key = "gain" if flag == "--min-gain" else flag.removeprefix("--")
        if key == flag or key not in CONDITIONS:
            yield word
            if word == "--":
                yield from rest
                return
            continue
        count = 1 if equals else 2 if key in ("valence", "arousal") else 1
        values = [value] if equals else [rest.pop(0) for _ in range(min(count, len(rest)))]
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
    loop = {
        key: given.get(key) for key in ("rounds", "images", "proposals", "tolerance", "patience", "reward")
    }
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
        fields[_FIELDS.get(key, key)] = parsed
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


def bars(console: Console, *texts: str, **keywords: Any) -> Progress:
    """A progress bar with the time gone and left; nothing where the console is no terminal.

    Args:
        console: Where to.
        *texts: What stands behind the bar, as rich formats a task ("{task.fields[rate]}").
        **keywords: Of `rich.progress.Progress`.
    """
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), *map(TextColumn, texts), TimeElapsedColumn())
    left = (TextColumn("left"), TimeRemainingColumn())
    return Progress(*columns, *left, console=console, disable=not console.is_terminal, **keywords)


@contextmanager
def training(
    console: Console, title: str, steps: int, shown: Callable[[dict[str, float]], str]
) -> Iterator[Watcher]:
    """A bar for a training, and what tells it of each step.

    Args:
        console: Where to.
        title: What is trained.
        steps: How many there are.
        shown: A step's figures in a few words.
    """
    with bars(console, COUNT, "{task.fields[figures]}") as progress:
        task = progress.add_task(title, total=steps, figures="")

        def watch(step: int, steps: int, figures: dict[str, float]) -> None:
            progress.update(task, completed=step, total=steps, figures=shown(figures))

        yield watch


def many(count: int, what: str) -> str:
    """A count of things: `1 run`, `2 trajectories`."""
    plural = f"{what[:-1]}ies" if what.endswith("y") else f"{what}s"
    return f"{count} {what if count == 1 else plural}"


def say(console: Console, text: str, style: str | None = None) -> None:
    """One line of ours as it is: what stands between brackets in it is no markup."""
    console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)


def tell(document: Mapping[str, Any], as_json: bool, show: Callable[[], object]) -> None:
    """The outcome of a verb: one JSON document on stdout, or what `show` prints for a person."""
    if as_json:
        print_json(document)
    else:
        show()


def tell_trained(result: Distilled, as_json: bool, console: Console) -> None:
    """The outcome of a training of adapters; one that was interrupted exits with 130."""
    outcome = result.outcome
    if not result.main:
        raise typer.Exit(130 if outcome.reason == "interrupted" else 0)
    if outcome.flags:
        say(console, f"guards fell while the reward rose: {'; '.join(outcome.flags)}", "yellow")
    if as_json:
        document = {
            "folder": str(result.folder),
            "steps": outcome.steps,
            "reason": outcome.reason,
            "flags": outcome.flags,
            "notes": result.notes,
            "data": result.statistics,
            "figures": result.figures,
        }
        print_json(document)
    elif outcome.reason == "interrupted":
        say(console, f"interrupted at step {outcome.steps}; go on with --resume")
    else:
        done = f"{outcome.reason} after {outcome.steps} steps"
        say(console, f"{done}; use it: emoloop run … --adapter {result.folder}")
    if outcome.reason == "interrupted":
        raise typer.Exit(130)


def print_json(document: Mapping[str, Any]) -> None:
    """One JSON document on stdout, in plain ASCII where stdout cannot say more."""
    plain = "utf" not in (sys.stdout.encoding or "").lower()
    print(json.dumps(document, ensure_ascii=plain, indent=2, allow_nan=False))
