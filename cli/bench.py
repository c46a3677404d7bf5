"""`emoloop bench NAME [OPTION=VALUE …]`: finds the benchmark, reads its options, prints its figures."""

from __future__ import annotations

import inspect
import json
import sys
from typing import Annotated, Any

import typer
from pydantic import TypeAdapter, ValidationError

from ..domain import UserError
from ..evals.bench import BENCHES, MOVED, run
from ..tools import registry
from .options import print_json


def bench(
    name: Annotated[str | None, typer.Argument(help=f"{', '.join(BENCHES)}, or pkg.mod:function.")] = None,
    options: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[OPTION=VALUE]...",
            help="The benchmark's own options; --OPTION for one that is on or off.",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Measure something and print figures."""
    if name is None:
        raise UserError(f"name a benchmark: {', '.join(BENCHES)}")
    if name in MOVED:
        raise UserError(f"benchmark {name!r} is a script of the repository now: python {MOVED[name]}")
    function = registry.resolve(name, BENCHES, "benchmark")
    document = run(name, function, _read(name, function, options or []))
    if as_json:
        print_json(document)
        return
    width = max(map(len, document["figures"]))
    for key, value in document["figures"].items():
        print(f"{key:{width}}  {value:.4g}")


def _read(name: str, function: Any, words: list[str]) -> dict[str, Any]:
    """Words such as n=50 as keyword arguments, typed like their defaults."""
    known = inspect.signature(function).parameters
    values: dict[str, Any] = {}
    for word in words:
        key, separator, text = word.partition("=") if word[:2] != "--" else (word[2:], "=", "true")
        if not separator or key not in known:
            usual = ", ".join(f"{k}={p.default}" for k, p in known.items())
            raise UserError(f"benchmark {name}: {word!r} is not one of its options ({usual})")
        try:
            values[key] = json.loads(text)
        except ValueError:
            values[key] = text
        default = known[key].default
        try:
            if default is not None:
                values[key] = TypeAdapter(type(default)).validate_python(values[key])
        except ValidationError as error:
            raise UserError(f"benchmark {name}: {key} is {type(default).__name__}, not {text!r}") from error
    print(f"bench {name}", *(f"{k}={v}" for k, v in values.items()), file=sys.stderr)
    return values
