"""Published data sets as their authors lay them out, read from a local copy; none is downloaded.

| layout | files | labels | scale |
| --- | --- | --- | --- |
| `emoset` | EmoSet-118K: `train.json`, `test.json`, `val.json` (rows: category, picture, annotation), `annotation/` | category; attributes | drawn from a lexicon's Gaussians |
| `emotic` | EMOTIC: `Annotations.mat` (in the folder or in `Annotations/`), `emotic/` | mean valence and arousal of a picture's people | 1 to 10 |
| `oasis` | OASIS: `OASIS.csv`, `Images/THEME.jpg` | mean valence and arousal of the raters | 1 to 7 |
| `emoscene` | a table `metadata.*` with `descriptors` | valence, arousal, category | must be declared |

Each says which of its files are train and which are held out, where the authors do.
"""  # noqa: E501

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ...domain import HIGH, LOW, PROTOTYPES, Emotion, UserError, first_line
from ...tools.tables import rows, table
from .data import Sample, Scale, emotion, read_folder, rescaled

#: Spread of the Gaussians that stand for a category, in points of valence and arousal.
SPREAD = 0.6


def lexicon_label(category: str, name: str) -> tuple[float, float]:
    """A valence and an arousal for a picture of which only the category is known: a draw from the class's Gaussian.

    EmoFeedback² labels EmoSet so, from a lexicon; its table is not published, so the means are `domain.PROTOTYPES` and
    the spread is ours. Within a class such a label knows nothing of the picture: it teaches the class.

    Args:
        category: One of the eight.
        name: The picture's; the same picture gets the same label.
    """
    rng = np.random.default_rng(list(name.encode()))
    point = rng.normal(PROTOTYPES[Emotion(category)], SPREAD)
    valence, arousal = np.clip(point, LOW, HIGH)
    return float(valence), float(arousal)


def read_emoset(folder: Path, scale: Scale | None) -> Iterator[Sample]:
    """EmoSet-118K (Yang et al., ICCV 2023); valence and arousal are drawn, see `lexicon_label`."""
    lists = {name: folder / f"{name}.json" for name in ("train", "val", "test")}
    if not lists["train"].is_file():
        raise UserError(f"{folder} holds no train.json: EmoSet-118K lies there as its authors pack it")
    for split, file in lists.items():
        for category, image, annotation in _json(file) if file.is_file() else []:
            known = emotion(category, f"{file.name} {image}")
            assert known is not None
            valence, arousal = lexicon_label(known, image)
            about = _json(folder / annotation) if (folder / annotation).is_file() else {}
            things = about.get("object") or []
            told = [about.get("scene"), *(things if isinstance(things, list) else [things])]
            told += [about.get("facial_expression"), about.get("human_action")]
            words = ", ".join(str(one) for one in told if one)
            yield Sample(
                image=folder / image, name=image, valence=valence, arousal=arousal, category=known,
                texts={"analysis": words} if words else {}, split="train" if split == "train" else "held_out",
                origin="lexicon",
            )  # fmt: skip


def read_emotic(folder: Path, scale: Scale | None) -> Iterator[Sample]:
    """EMOTIC (Kosti et al., PAMI 2019): the mean over the people in a picture. Its 26 categories are none of ours."""
    from scipy.io import loadmat

    places = [folder / "Annotations.mat", folder / "Annotations" / "Annotations.mat"]
    file = next((place for place in places if place.is_file()), None)
    if file is None:
        raise UserError(f"{folder} holds no Annotations.mat: EMOTIC lies there as its authors pack it")
    content = loadmat(file, simplify_cells=True)
    for split in ("train", "val", "test"):
        for entry in _listed(content.get(split)):
            name = f"{entry['folder']}/{entry['filename']}"
            image = next((at for at in (folder / "emotic" / name, folder / name) if at.is_file()), None)
            if image is None:
                raise UserError(f"{file}: there is no picture {name} in {folder}")
            # val and test have several annotators and their mean beside them; train has one.
            people = [
                person.get("combined_continuous") or person.get("annotations_continuous")
                for person in _listed(entry["person"])
            ]
            means = {
                axis: np.mean([one[axis] for one in people if isinstance(one, dict)])
                for axis in ("valence", "arousal")
                if any(isinstance(one, dict) for one in people)
            }
            yield Sample(
                image=image, name=name, split="train" if split == "train" else "held_out",
                **_scores(means, scale or (1, 10), name),
            )  # fmt: skip


def read_oasis(folder: Path, scale: Scale | None) -> Iterator[Sample]:
    """OASIS (Kurdi et al., 2017): 900 pictures, valence and arousal as means over raters."""
    file = folder / "OASIS.csv"
    if not file.is_file():
        raise UserError(f"{folder} holds no OASIS.csv: OASIS lies there as its authors pack it")
    # Folder and suffix are written in several ways.
    pictures = {
        at.stem.strip().lower(): at
        for at in folder.rglob("*")
        if at.suffix.lower() in (".jpg", ".jpeg", ".png")
    }
    with file.open(encoding="utf-8-sig", newline="") as stream:
        for row in csv.DictReader(stream):
            theme = row["Theme"].strip()
            if theme.lower() not in pictures:
                raise UserError(f"{file}: there is no picture {theme!r} in {folder}")
            means = {axis: row[f"{axis.capitalize()}_mean"] for axis in ("valence", "arousal")}
            yield Sample(
                image=pictures[theme.lower()], name=theme,
                **_scores(means, scale or (1, 7), theme),
            )  # fmt: skip


def read_emoscene(folder: Path, scale: Scale | None) -> Iterator[Sample]:
    """EmoScene (arXiv 2604.00933): valence, arousal and dominance, a category, descriptors.

    No copy of it was at hand: this is a table as `read_folder` takes it, with `descriptors` (a list, or words with
    commas) as what a description should name. The scale must be declared.
    """
    if scale is None:
        raise UserError("emoscene: declare the scale of its labels, such as --set data.scale=[1,9]")
    said = [row.get("descriptors") for row in rows(table(folder))]
    for sample, words in zip(read_folder(folder, scale), said, strict=True):
        text = ", ".join(words) if isinstance(words, list) else str(words or "")
        yield replace(sample, texts={**sample.texts, "analysis": text}) if text else sample


def _scores(means: Mapping[str, Any], scale: Scale, name: str) -> dict[str, Any]:
    return {axis: rescaled(mean, scale, name) for axis, mean in means.items()}


def _json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read: {first_line(error)}") from error


def _listed(value: Any) -> list[Any]:
    """MATLAB's arrays of one are no arrays."""
    return [] if value is None else list(value) if isinstance(value, list | np.ndarray) else [value]
