"""Makes the reference pages from the code when the site is built, so that they cannot fall behind it.

mkdocs-gen-files runs this file; nothing that it writes is kept in the repository. What a page says comes from
docstrings, `#:` comments, pydantic models, typer's commands and SQLAlchemy's tables.
"""

from __future__ import annotations

import inspect
import re
import types
import typing
from collections.abc import Iterable, Iterator
from typing import Any

import emoloop
import mkdocs_gen_files
import tomli_w
import typer
from emoloop import cli, events, settings
from emoloop.tools.registry import resolve
from emoloop.traces import schema
from emoloop.traces.exchange.export import FORMATS
from pydantic import BaseModel


def table(head: str, rows: Iterable[Iterable[object]]) -> str:
    """A Markdown table; `head` has its columns with bars between."""
    columns = head.split("|")
    lines = (" | ".join(re.sub(r"\s+", " ", str(it)).replace("|", "\\|") for it in line) for line in
             (columns, ["---"] * len(columns), *rows))  # fmt: skip
    return "".join(f"| {line} |\n" for line in lines)


def code(value: object) -> str:
    """A value as code; nothing for none."""
    return "" if value in (None, "") else f"`{value}`"


def kind(annotation: Any) -> str:
    """A type as a reader of the page wants it: without modules and Annotated's metadata."""
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return kind(inner[0])
    if origin in (typing.Union, types.UnionType):
        return " | ".join(map(kind, inner))
    if annotation is types.NoneType:
        return "None"
    text = annotation.__name__ if inspect.isclass(annotation) and not inner else str(annotation)
    return re.sub(r"\b(?:[a-z_]+\.)+(?=\w)", "", text)


def comments(model: type[BaseModel]) -> dict[str, str]:
    """Field → its description: a docstring below it, or the `#:` lines above it."""
    found = {name: field.description or "" for name, field in model.model_fields.items()}
    said: list[str] = []
    for line in inspect.getsource(model).splitlines():
        if match := re.match(r"\s+#: (.*)", line):
            said.append(match[1])
        elif (match := re.match(r"    (\w+):", line)) and match[1] in found:
            found[match[1]], said = found[match[1]] or " ".join(said), []
    return found


def settings_page() -> str:
    """Each setting with its key, type, default and variable; and a whole `emoloop.toml`."""
    text = f"# Settings\n\n{inspect.cleandoc(settings.__doc__ or '')}\n\n`--set KEY=VALUE` sets one for a command.\n"
    whole = settings.Settings.model_construct()
    sections = {name: part for name, part in dict(whole).items() if isinstance(part, BaseModel)}
    for section, part in {"": whole, **sections}.items():
        model, said, rows = type(part), comments(type(part)), []
        for name, field in model.model_fields.items():
            if section or name not in sections:
                key = f"{section}.{name}".lstrip(".")
                variable = f"EMOLOOP_{key.replace('.', '__')}".upper()
                rows.append(
                    (code(key), kind(field.annotation), code(field.default), code(variable), said[name])
                )
        text += f"\n## {section or 'Without a section'}\n\n{(model.__doc__ or '').strip()}\n\n"
        text += table("key|type|default|environment|meaning", rows)
    text += "\n## emoloop.toml\n\nLooked for in the current folder, or where `EMOLOOP_CONFIG` says. All defaults; "
    defaults = tomli_w.dumps(whole.model_dump(mode="json", exclude_none=True))
    return text + f"what is unset by default is left out:\n\n```toml\n{defaults}```\n"


def commands(command: Any, name: str) -> Iterator[tuple[str, Any]]:
    """All commands under one, by their full names."""
    inner = getattr(command, "commands", None)
    if inner is None:
        yield name, command
    for word in sorted(inner or ()):
        yield from commands(inner[word], f"{name} {word}")


def cli_page() -> str:
    """Each verb with its arguments and options."""
    text = "# Command line\n\nExit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted. "
    text += "`--json` prints one JSON document on stdout and nothing else; progress goes to stderr. "
    text += "`emoloop --version` prints the version.\n"
    for name, command in commands(typer.main.get_command(cli.app), "emoloop"):
        context = command.make_context(name, [], resilient_parsing=True)
        rows = []
        for parameter in command.params:
            shown = parameter.get_help_record(context) or (parameter.make_metavar(context), "")
            help_ = getattr(parameter, "help", None) or shown[1]
            rows.append((code(shown[0].strip()), help_.replace("[", "\\[")))
        text += f"\n## {name}\n\n{inspect.cleandoc(command.help or '')}\n\n"
        text += table("argument or option|meaning", (row for row in rows if row[0] != "`--help`"))
    return text


def events_page() -> str:
    """Each event with its fields."""
    base = events.RunStarted.__mro__[1]
    text = "# Events\n\n" + inspect.cleandoc(events.__doc__ or "") + "\n\n## Common to all\n\n"
    head = inspect.cleandoc(base.__doc__ or "")
    text += head.replace("Attributes:\n", "\n").replace("\n    ", "\n- ") + "\n"
    for event in typing.get_args(typing.get_args(events.Event)[0]):
        rows = [
            (code(name), kind(field.annotation), "required" if field.is_required() else code(field.default))
            for name, field in event.model_fields.items()
            if name not in base.model_fields or name == "node"
        ]
        text += f"\n## {event.__name__}\n\n{inspect.cleandoc(event.__doc__ or '')}\n\n"
        text += table("field|type|default", rows)
    return text


def exports_page() -> str:
    """Each format of `emoloop traces export`, by what its writer says."""
    text = "# Exports\n\n`emoloop traces export FORMAT --out …`; `--where` chooses runs.\n"
    for name, (writer, noun) in FORMATS.items():
        found = resolve(writer, {})
        said = inspect.cleandoc(getattr(found, "func", found).__doc__ or "").split("\nArgs:")[0].strip()
        text += f"\n## {name}\n\n{said}\n\nCounted as: {noun}.\n"
    return text


def tables_page() -> str:
    """The log's tables, for those who read them by SQL."""
    text = "# Tables of the log\n\n`events` is the log; the others follow from it and can be made again "
    text += "(`emoloop traces rebuild`). The same on SQLite and PostgreSQL.\n"
    for each in schema.metadata.sorted_tables:
        rows = [
            (code(it.name), it.type, "key" if it.primary_key else "" if it.nullable else "never null")
            for it in each.c
        ]
        text += f"\n## {each.name}\n\n" + table("column|type|", rows)
    return text


def api_page() -> str:
    """The public names, each where its docstring stands."""
    text = (
        "# Python\n\nThe names that `emoloop` exports; each loads on first use. Fields of events are listed "
    )
    text += "in [Events](events.md), those of rows in [Tables of the log](tables.md).\n"
    for name in emoloop.__all__:
        module = getattr(getattr(emoloop, name), "__module__", "")
        text += f"\n::: {module if module.startswith('emoloop') else 'emoloop.events'}.{name}\n"
    return text + "".join(f"\n::: emoloop.graph.state.{name}\n" for name in ("RunInput", "State", "Context"))


for make in (settings_page, cli_page, events_page, exports_page, tables_page, api_page):
    with mkdocs_gen_files.open(f"reference/{make.__name__.removesuffix('_page')}.md", "w") as file:
        file.write(make())
