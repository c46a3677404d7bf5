"""Personas are data files: who somebody is, and what moves them. A dozen is shipped; a folder adds more."""

from __future__ import annotations

import random
from functools import cache
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ....domain import Score, UserError, first_error
from ....settings import read_yaml

_FOLDER = Path(__file__).parent / "personas"

Words = Annotated[str, Field(min_length=1, max_length=400)]


class Feels(BaseModel):
    """How far somebody's feeling lies from what people commonly feel, in points of each axis."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    valence: Score = 0.0
    arousal: Score = 0.0


class Persona(BaseModel):
    """One person.

    Attributes:
        name: The file's.
        age: Years.
        culture: Where and how they live.
        temperament: What they are like.
        moved_by: What moves them.
        feels: For a model that takes no description of a person.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    age: Annotated[int, Field(ge=0, le=130)]
    culture: Words
    temperament: Words
    moved_by: Words
    feels: Feels = Feels()


@cache
def load(folder: Path | None = None) -> dict[str, Persona]:
    """The shipped personas by name, and those of a folder, which stand in place of shipped ones of the same name.

    Raises:
        UserError: No such folder, none in it, or a file that does not fit.
    """
    files = sorted(_FOLDER.glob("*.yaml"))
    if folder is not None:
        files += (own := sorted(folder.expanduser().glob("*.yaml")))
        if not own:
            raise UserError(f"loop.persona_folder {folder}: no .yaml file is in it")
    return {file.stem: _read(file) for file in files}


def _read(file: Path) -> Persona:
    try:
        return Persona.model_validate({**read_yaml(file), "name": file.stem})
    except ValidationError as error:
        raise UserError(f"persona {file}: {first_error(error)}") from error


def draw(count: int, seed: int, folder: Path | None = None) -> list[Persona]:
    """Different personas, by chance.

    Raises:
        UserError: As `load`; or there are not so many.
    """
    every = load(folder)
    if count > len(every):
        raise UserError(f"loop.personas {count}: there are {len(every)}; add some by loop.persona_folder")
    return [every[name] for name in random.Random(seed).sample(sorted(every), count)]
