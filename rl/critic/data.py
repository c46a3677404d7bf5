"""Pictures with labels: what the critic learns from, whatever shape they come in.

A folder holds `metadata.jsonl`, `metadata.csv` or `metadata.parquet` and pictures; or it is a published data set as its
authors lay it out (`layouts.py`). Labels come to us on the scale that the data declare and leave on ours, [-3, 3]. A
label that is missing stays missing: no reward is made of it.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ...agents.prompt import Prompt
from ...agents.schemas import signed, target_text
from ...domain import HIGH, LOW, Emotion, EmotionTarget, UserError, first_line
from ...tools.lvlm.chat import to_openai
from ...tools.registry import resolve
from ...tools.tables import rows, table
from ..data.split import held_out

#: Ends of a scale of labels.
Scale = tuple[float, float]
OURS: Scale = (LOW, HIGH)

#: What a critique says beside its labels; data may hold it, for the supervised start and the reward `description`.
TEXTS = ("analysis", "alignment", "suggestion")

#: Readers by name; each takes the folder and the declared scale.
READERS: dict[str, str] = {
    "folder": ".rl.critic.data:read_folder",
    "emoset": ".rl.critic.layouts:read_emoset",
    "emotic": ".rl.critic.layouts:read_emotic",
    "oasis": ".rl.critic.layouts:read_oasis",
    "emoscene": ".rl.critic.layouts:read_emoscene",
}


@dataclass(frozen=True)
class Sample:
    """One labelled picture.

    Attributes:
        image: Its file, or the bytes of one.
        name: What it is called; a picture never changes sides of the split while it keeps its name.
        valence: In [-3, 3], or None.
        arousal: In [-3, 3], or None.
        category: One of the eight, or None.
        prompt: What it was made for, if anything.
        target: What it should make people feel; None draws one, since a reading must not follow it.
        texts: Fields of a critique that are known beside the labels (`TEXTS`).
        split: "train", "held_out", or "" to let the name decide.
        origin: How the labels came about, where they are no ratings: "lexicon" is one draw from a class's Gaussian.
        clean: A clean picture of the same content and colours, for one that is noised or painted.
    """

    image: Path | bytes
    name: str
    valence: float | None = None
    arousal: float | None = None
    category: str | None = None
    prompt: str = ""
    target: EmotionTarget | None = None
    texts: Mapping[str, str] = field(default_factory=dict[str, str])
    split: str = ""
    origin: str = ""
    clean: Path | None = None

    def picture(self, size: int, clean: bool = False) -> Image.Image:
        """RGB, `size` × `size`: one size for all, since mixed sizes in a batch have corrupted prompts silently.

        Args:
            size: In pixels.
            clean: The clean counterpart, where there is one.
        """
        source = self.clean if clean and self.clean else self.image
        try:
            with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
                rgb = image.convert("RGB")
        except OSError as error:
            raise UserError(f"{self.name}: not a readable picture ({first_line(error)})") from error
        return rgb if rgb.size == (size, size) else rgb.resize((size, size), Image.Resampling.LANCZOS)

    @property
    def labels(self) -> dict[str, str]:
        """The known fields of a critique, in its notation."""
        numbers = {"valence": self.valence, "arousal": self.arousal}
        found = {key: signed(value) for key, value in numbers.items() if value is not None}
        return {**self.texts, **found, **({"category": self.category} if self.category else {})}


def rescaled(value: Any, scale: Scale, where: str) -> float | None:
    """A label on our scale; None where there is none.

    Raises:
        UserError: No number, or outside the declared scale.
    """
    if value is None or (isinstance(value, str) and value.strip().lower() in ("", "nan", "none", "null")):
        return None
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise UserError(f"{where}: a number is wanted, not {value!r}") from None
    if math.isnan(number):
        return None
    low, high = scale
    if not low <= number <= high:
        raise UserError(
            f"{where}: {number:g} lies outside the declared scale {low:g} to {high:g}: set data.scale"
        )
    return LOW + (number - low) * (HIGH - LOW) / (high - low)


def emotion(value: Any, where: str) -> str | None:
    """One of the eight categories; None where there is none.

    Raises:
        UserError: Another word.
    """
    text = str(value if value is not None else "").strip().lower()
    if text in ("", "nan", "none"):
        return None
    if text not in set(Emotion):
        raise UserError(f"{where}: category {text!r} is none of {', '.join(Emotion)}")
    return text


def read_folder(folder: Path, scale: Scale) -> Iterator[Sample]:
    """A folder with `metadata.jsonl`, `.csv` or `.parquet`, or such a file itself (`tools.tables.table`).

    Columns: `image` (or `file_name`: a path relative to the file; in parquet also bytes), `valence`, `arousal`,
    `category`, `prompt`, `target_valence`, `target_arousal`, `split`, `clean` (a path), and `TEXTS`. Only the picture
    must be there.
    """
    try:
        file = table(folder)
    except UserError as error:
        raise UserError(f"{error}; for a published layout set data.layout") from error
    for number, row in enumerate(rows(file), start=1):
        where = f"{file.name} row {number}"
        given = row.get("image", row.get("file_name"))
        # How `datasets` writes pictures into parquet.
        given = (given.get("bytes") or given.get("path")) if isinstance(given, dict) else given
        if not given:
            raise UserError(f"{where}: no image")
        image = given if isinstance(given, bytes) else file.parent / str(given)
        name = hashlib.sha256(given).hexdigest()[:16] if isinstance(given, bytes) else str(given)
        if isinstance(image, Path) and not image.is_file():
            raise UserError(f"{where}: there is no {image}")
        clean = file.parent / str(row["clean"]) if row.get("clean") else None
        aims: dict[str, Any] = {
            axis: rescaled(row.get(f"target_{axis}"), OURS, where) for axis in ("valence", "arousal")
        }
        yield Sample(
            image=image, name=name,
            valence=rescaled(row.get("valence"), scale, where), arousal=rescaled(row.get("arousal"), scale, where),
            category=emotion(row.get("category"), where), prompt=str(row.get("prompt") or ""),
            target=EmotionTarget(**aims) if any(aim is not None for aim in aims.values()) else None,
            texts={key: str(row[key]) for key in TEXTS if row.get(key)}, split=_split(row.get("split"), where),
            clean=clean,
        )  # fmt: skip


def _split(value: Any, where: str) -> str:
    if value in (None, ""):
        return ""
    if value not in ("train", "held_out"):
        # Taken for training, a row of somebody's test set would be learned.
        raise UserError(f"{where}: split {value!r} is none of train, held_out")
    return value


def read(data: Path, layout: str, scale: Scale | None) -> list[Sample]:
    """All labelled pictures of a folder.

    Args:
        data: The folder.
        layout: A name in `READERS`, or the dotted path of such a reader.
        scale: The ends of the labels' scale; None takes the layout's own (`folder`: ours).

    Raises:
        UserError: Nothing there, or something that cannot be used.
    """
    if not data.exists():
        raise UserError(f"there is no {data}")
    reader = resolve(layout, READERS, "data layout")
    samples = list(reader(data, scale or OURS) if layout == "folder" else reader(data, scale))
    told = [it for it in samples if it.valence is not None or it.arousal is not None or it.category]
    if not told:
        raise UserError(
            f"{data} holds {len(samples)} pictures and no label: valence, arousal or category is wanted"
        )
    return told


def divided(samples: Iterable[Sample], share: float, salt: str) -> tuple[list[Sample], list[Sample]]:
    """(training, held out): as the data say, else by the hash of the name.

    Raises:
        UserError: Nothing is left to train on, or to watch.
    """
    sides: tuple[list[Sample], list[Sample]] = ([], [])
    for sample in samples:
        out = sample.split == "held_out" if sample.split else held_out(sample.name, share, salt)
        sides[out].append(sample)
    for side, name in zip(sides, ("train on", "watch"), strict=True):
        if not side:
            raise UserError(
                f"no picture is left to {name}: change data.held_out, or the data's column `split`"
            )
    return sides


def digest(samples: Sequence[Sample]) -> str:
    """SHA-256 over pictures and labels."""
    total = hashlib.sha256()
    for it in samples:
        total.update(it.image if isinstance(it.image, bytes) else it.image.read_bytes())
        total.update(json.dumps([it.name, it.labels, it.prompt, it.split], sort_keys=True).encode())
    return total.hexdigest()


def question(sample: Sample, prompt: Prompt, picture: Image.Image | None = None) -> list[dict[str, Any]]:
    """The critic's question as ordered parts (text, picture, text), as TRL and chat templates take them.

    Args:
        sample: The picture and what it was made for.
        prompt: The critic's prompt file.
        picture: Put into its part; None leaves the part a mark.
    """
    target = sample.target
    if target is None:
        rng = np.random.default_rng(list(sample.name.encode()))
        valence, arousal = rng.uniform(-2.6, 2.6, 2).round(1)
        target = EmotionTarget(valence=float(valence), arousal=float(arousal))
    asked = to_openai(prompt.messages(("",), prompt=sample.prompt or "a picture", target=target_text(target)))
    for part in (part for message in asked for part in message["content"]):
        if part["type"] != "text":
            part.clear()
            part |= {"type": "image"} | ({"image": picture} if picture is not None else {})
    return asked
