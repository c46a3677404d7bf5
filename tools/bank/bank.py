"""The bank of visual prompts: for each emotion, L text centres and the mean look of the pictures behind each.

Emotion-Director (arXiv 2512.19479) makes it of an image-text set: K-means over the text features of an emotion's
items gives the centres F^t_e (L, d_t), and the same cluster labels give F^v_e (L, d_v), here the mean of the visual
features in a cluster. A prompt with text feature q finds the top k of the wanted emotion by cosine,

    argtop-k_j  <q, F^t_e,j> / (|q| |F^t_e,j|),

and the F^v_e of those are its visual prompt. Emotions are the eight categories, or cells of the valence-arousal plane.
An emotion with fewer different texts than L has as many entries as texts.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL.Image import Image
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from ...domain import HIGH, LOW, PROTOTYPES, EmotionTarget, UserError, first_error, first_line
from ...files import replacing

_FORMAT = "emoloop.prompt_bank"

#: Side of an entry's thumbnail in pixels.
THUMBNAIL = 64

#: Items encoded in one pass.
_BATCH = 64

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Item:
    """One pair of an image-text set.

    Attributes:
        text: The caption or prompt.
        open: Gives the picture, RGB.
        target: What the picture makes people feel.
    """

    text: str
    open: Callable[[], Image]
    target: EmotionTarget


class TextEncoder(Protocol):
    """Turns texts into features; `name` says which model does."""

    name: str

    def texts(self, texts: Sequence[str]) -> Floats:
        """(n, d_t)."""
        ...


class VisualEncoder(Protocol):
    """Turns pictures into features; `name` says which model does."""

    name: str

    def pictures(self, pictures: Sequence[Image]) -> Floats:
        """(n, d_v)."""
        ...


class Head(BaseModel):
    """What the file says beside its tensors.

    Attributes:
        version: Of the format.
        emotions: Names, in order.
        points: (valence, arousal) of each.
        text_encoder: What made the text features.
        visual_encoder: What made the visual features.
        captions: For each entry the text nearest to its centre.
        items: Items behind the entries.
        skipped: Items without a valence and an arousal, where cells need them.
        tested: Held-out items.
        agreement: Share of them whose nearest entry of all is of their own emotion; None where there are none.
        chance: The share that naming the commonest emotion reaches.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: Literal[1] = 1
    emotions: tuple[str, ...]
    points: tuple[tuple[float, float], ...]
    text_encoder: str
    visual_encoder: str
    captions: tuple[str, ...]
    items: int
    skipped: int = 0
    tested: int = 0
    agreement: float | None = None
    chance: float | None = None


@dataclass(frozen=True)
class Bank:
    """See the module's text; N entries of E emotions.

    Attributes:
        head: Names and origin.
        text: (N, d_t) centres, of length 1.
        visual: (N, d_v) mean visual features.
        emotion: (N,) index of each entry's emotion.
        count: (N,) items behind each.
        thumbnails: (N, 64, 64, 3) uint8, the picture nearest to each centre.
    """

    head: Head
    text: Floats
    visual: Floats
    emotion: NDArray[np.int64]
    count: NDArray[np.int64]
    thumbnails: NDArray[np.uint8]

    @property
    def sha256(self) -> str:
        """Hash over all that retrieval depends on."""
        digest = hashlib.sha256(json.dumps([self.head.emotions, self.head.points]).encode())
        for array in (self.text, self.visual, self.emotion):
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()

    def emotion_of(self, target: EmotionTarget) -> int:
        """Index of the emotion nearest to a target, of those that have entries; an unwanted axis does not count."""
        known = np.unique(self.emotion)
        wanted = np.array([np.nan if axis is None else axis for axis in target.point])
        away = np.nansum((np.array(self.head.points)[known] - wanted) ** 2, 1)
        return int(known[away.argmin()])

    def retrieve(self, query: Floats, target: EmotionTarget | None, k: int) -> list[tuple[int, float]]:
        """(entry, cosine) of the up to k nearest entries, the nearest first.

        Args:
            query: (d_t,) text feature of a prompt.
            target: Whose emotion's entries; None takes all.
            k: How many.
        """
        among = (
            np.arange(len(self.emotion))
            if target is None
            else np.flatnonzero(self.emotion == self.emotion_of(target))
        )
        cosines = self.text[among] @ unit(query)
        order = np.argsort(-cosines, kind="stable")[:k]
        return [(int(among[i]), float(cosines[i])) for i in order]

    def save(self, path: Path) -> None:
        """Write the tensors as safetensors, the head as JSON in its header."""
        tensors = {name: getattr(self, name) for name in _TENSORS}
        with replacing(path) as beside:
            # One entry, since safetensors writes several in random order.
            save_file(tensors, beside, metadata={_FORMAT: self.head.model_dump_json()})

    @classmethod
    def load(cls, path: Path) -> Bank:
        """Read a file that `save` wrote.

        Raises:
            UserError: No such file, no bank, of another version, or with keys that this version does not know.
        """
        try:
            with safe_open(path, framework="numpy") as file:
                told = (file.metadata() or {}).get(_FORMAT)
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise UserError(f"bank {path} is not a readable safetensors file: {first_line(error)}") from error
        if told is None:
            raise UserError(f"{path} is no bank of visual prompts: make one with emoloop bank build")
        try:
            head = Head.model_validate_json(told)
        except ValidationError as error:
            raise UserError(f"bank {path}: {first_error(error)}; build it again") from error
        if tensors.keys() != set(_TENSORS):
            odd = sorted(tensors.keys() ^ set(_TENSORS))
            raise UserError(f"bank {path}: tensors {', '.join(odd)} are missing or unknown; build it again")
        return cls(head, **tensors)


_TENSORS = ("text", "visual", "emotion", "count", "thumbnails")


def plane(cells: int) -> tuple[tuple[str, ...], tuple[tuple[float, float], ...]]:
    """Names and points of the emotions: the eight categories for 0 cells, else cells × cells of the plane."""
    if not cells:
        return tuple(PROTOTYPES), tuple(PROTOTYPES.values())
    middles = LOW + (np.arange(cells) + 0.5) * (HIGH - LOW) / cells
    points = tuple((float(v), float(a)) for v in middles for a in middles)
    return tuple(f"V{v:+.1f} A{a:+.1f}" for v, a in points), points


def build(
    items: Iterable[Item],
    text: TextEncoder,
    visual: VisualEncoder,
    *,
    cells: int = 0,
    length: int = 16,
    held_out: float = 0.1,
    seed: int = 0,
    watch: Callable[[int], Any] = lambda done: None,
) -> Bank:
    """Make a bank of an image-text set.

    Args:
        items: The set. Pictures are opened a batch at a time, those of the entries once more at the end.
        text: What encodes texts.
        visual: What encodes pictures.
        cells: Rows and columns of the valence-arousal plane; 0 takes the eight categories.
        length: Entries L of an emotion at most.
        held_out: Share of texts kept from the entries to test the retrieval with.
        seed: Of K-means.
        watch: Called with the number of items encoded so far.

    Raises:
        UserError: No item that can be used.
    """
    emotions, points = plane(cells)
    placed = [(it, _place(it.target, np.array(points), cells)) for it in items]
    kept = [(it, label) for it, label in placed if label is not None]
    if not kept:
        raise UserError(f"a bank needs pictures with a text and an emotion: none of {len(placed)} has them")
    batches = [kept[start : start + _BATCH] for start in range(0, len(kept), _BATCH)]
    parts = []
    for batch in batches:
        told = unit(text.texts([it.text for it, _ in batch]))
        parts.append((told, visual.pictures([it.open() for it, _ in batch])))
        watch(sum(len(part) for part, _ in parts))
    texts, looks = (np.concatenate(part).astype(np.float32) for part in zip(*parts, strict=True))
    labels, test = np.array([label for _, label in kept]), np.array([_held(it, held_out) for it, _ in kept])
    found = [
        (label, *entry)
        for label in np.unique(labels[~test]).tolist()
        for entry in _entries(np.flatnonzero((labels == label) & ~test), texts, looks, length, seed)
    ]
    if not found:
        raise UserError("all items are held out: give more of them, or a smaller held-out share")
    emotion, centres, means, counts, nearest = (np.array(part) for part in zip(*found, strict=True))
    shown = [kept[index][0] for index in nearest]
    head = Head(
        emotions=emotions, points=points, text_encoder=text.name, visual_encoder=visual.name,
        captions=tuple(it.text for it in shown), items=int((~test).sum()), skipped=len(placed) - len(kept),
    )  # fmt: skip
    bank = Bank(head, centres, means, emotion, counts, np.stack([_thumbnail(it.open()) for it in shown]))
    if not test.any():
        return bank
    right = emotion[(texts[test] @ centres.T).argmax(1)] == labels[test]
    told = {"tested": int(test.sum()), "agreement": float(right.mean())}
    told["chance"] = float(np.bincount(labels[test]).max() / test.sum())
    return replace(bank, head=head.model_copy(update=told))


def _entries(
    rows: NDArray[np.int64], texts: Floats, looks: Floats, length: int, seed: int
) -> Iterator[tuple[Floats, Floats, int, int]]:
    """(centre, mean look, items, row of the nearest item) of each cluster of one emotion."""
    # Loads for a second, and only building needs it.
    from sklearn.cluster import KMeans

    clusters = min(length, len(np.unique(texts[rows], axis=0)))
    # Their annotation takes only the default, a word.
    few: Any = 3
    labels = KMeans(clusters, n_init=few, random_state=seed).fit_predict(texts[rows])
    for label in np.unique(labels):
        mine = rows[labels == label]
        centre = unit(texts[mine].mean(0))
        yield centre, looks[mine].mean(0), len(mine), int(mine[(texts[mine] @ centre).argmax()])


def _place(target: EmotionTarget, points: NDArray[np.float64], cells: int) -> int | None:
    """Index of a target's emotion; None where a cell needs both axes."""
    wanted = target.point
    if not cells and target.category is not None:
        return list(PROTOTYPES).index(target.category)
    if None in wanted:
        return None
    return int(((points - np.array(wanted, dtype=float)) ** 2).sum(1).argmin())


def _held(item: Item, share: float) -> bool:
    """Whether an item is held out, by its text: one text is never on both sides."""
    digest = hashlib.sha256(" ".join(item.text.lower().split()).encode()).digest()
    return int.from_bytes(digest[:4], "big") < share * 2**32


def _thumbnail(picture: Image) -> NDArray[np.uint8]:
    return np.asarray(picture.convert("RGB").resize((THUMBNAIL, THUMBNAIL)), dtype=np.uint8)


def unit(features: Floats) -> Floats:
    """Features of length 1."""
    return features / np.maximum(np.linalg.norm(features, axis=-1, keepdims=True), 1e-12)
