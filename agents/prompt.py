"""Prompts are files: versioned, readable, and named in every event that they led to.

A file has a `name`, a `version`, and three Jinja2 templates: `system` (the rubric, the same for every call),
`task` (what this call is about) and `question`. Pictures go between task and question: everything before a
picture can then be reused by a server's prefix cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import StrictUndefined, Template, TemplateError
from jinja2.sandbox import SandboxedEnvironment
from langchain_core.messages import BaseMessage, HumanMessage, SystemMessage

from ..domain import UserError
from ..settings import read_yaml
from .schemas import signed

_FOLDER = Path(__file__).parent / "prompts"
_ENVIRONMENT = SandboxedEnvironment(
    undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
)
_ENVIRONMENT.filters["signed"] = signed


@dataclass(frozen=True)
class Prompt:
    """One prompt file.

    Attributes:
        name: As in the file.
        version: As in the file.
        system: Template of the system message.
        task: Template of the text before the pictures.
        question: Template of the text after them.
        several: Of a rewriter, the file that asks for several prompts in one answer; without it this one is asked
            several times.
        personas: Of a rewriter, the file that asks a persona, for `mc_agent`; without it personas write by this one.
    """

    name: str
    version: str
    system: str
    task: str
    question: str
    several: str = ""
    personas: str = ""

    @property
    def lists(self) -> bool:
        """Whether it asks for several rewrites in one answer: its question then says how many, by `count`."""
        return "count" in self.question

    @property
    def id(self) -> str:
        """How events name it: "critic@1"."""
        return f"{self.name}@{self.version}"

    def messages(self, images: tuple[str, ...] = (), **values: Any) -> list[BaseMessage]:
        """The chat: system rubric, then task, pictures and question as one user message.

        Args:
            images: Data or http URLs.
            **values: What the templates name.

        Raises:
            UserError: The template names something that it is not given.
        """
        return chat(self.texts(**values), images)

    def texts(self, **values: Any) -> tuple[str, str, str]:
        """System, task and question with the values put in; errors as `messages`."""
        system, task, question = (self._render(it, values) for it in (self.system, self.task, self.question))
        return system, task, question

    def _render(self, template: str, values: dict[str, Any]) -> str:
        try:
            return _compiled(template).render(values)
        except TemplateError as error:
            raise UserError(f"prompt {self.id}: {error}") from error


def chat(texts: tuple[str, str, str], images: tuple[str, ...] = ()) -> list[BaseMessage]:
    """The messages of a prompt's texts."""
    system, task, question = texts
    content: list[str | dict[str, Any]] = [
        {"type": "text", "text": task},
        *({"type": "image_url", "image_url": {"url": url}} for url in images),
        {"type": "text", "text": question},
    ]
    return [SystemMessage(system), HumanMessage(content)]


@cache
def _compiled(template: str) -> Template:
    # Compiling costs more than all else that happens around a critique.
    return _ENVIRONMENT.from_string(template)


@cache
def load_prompt(name: str) -> Prompt:
    """Read a prompt.

    Args:
        name: A file of this package's `prompts/`, without its suffix; or a path that ends in `.yaml`.

    Raises:
        UserError: There is none, or the file lacks a key.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else _FOLDER / f"{name}.yaml"
    if not path.exists():
        known = ", ".join(sorted(file.stem for file in _FOLDER.glob("*.yaml")))
        raise UserError(f"no prompt {name!r}: known are {known}, or give a path to a .yaml file")
    content = read_yaml(path)
    keys = ("name", "version", "system", "task", "question")
    if set(content) - {"several", "personas"} != set(keys):
        raise UserError(
            f"prompt {path}: the keys {', '.join(keys)} are wanted, no more (but several, personas) and no fewer"
        )
    return Prompt(**{key: str(value) for key, value in content.items()})
