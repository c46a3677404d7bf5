"""Judges: who says what a delivered picture feels like.

A judge is anything with `read(images) -> readings`; the miniature's law judge is one, and so is a class of
yours named by a dotted path. What it leaves unsaid stays None. Judges that need more than pixels (ratings
by address, an LVLM that is told the prompt) implement `Judge` itself. Whoever gave the reward that trained
or steered the images is no judge of them: `conflict` finds that out.
"""

from __future__ import annotations

import asyncio
import csv
import hashlib
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Protocol

import torch
from PIL.Image import Image
from pydantic import Field, ValidationError

from ..domain import PROTOTYPES, Critique, Emotion, EmotionTarget, Score, UserError, first_line
from ..settings import Settings
from ..tools import presets
from ..tools.registry import resolve
from ..tools.reward import REWARDS, Reward, load_reward, terms
from ..tools.scorers import load_head
from ..tools.threads import apart
from ..traces.blobs import BlobStore
from .metrics import mean
from .records import Reading

#: What people and LVLMs say of a picture.
_RATED = ("valence", "arousal", "category", "alignment")


@dataclass(frozen=True)
class Item:
    """One picture to read.

    Attributes:
        sha256: Its address.
        blobs: Where it lies.
        prompt: The neutral prompt.
        target: What was wanted; a judge that wants to be fair does not look at it.
    """

    sha256: str
    blobs: BlobStore
    prompt: str
    target: EmotionTarget

    def open(self) -> Image:
        """The picture, RGB."""
        return self.blobs.get_image(self.sha256)


class Judge(Protocol):
    """Reads pictures.

    Attributes:
        name: For the report.
        version: Changes when a reading could change; part of the cache's key.
        models: What speaks in it (model ids, dotted paths): compared with what gave the reward.
        sees_target: Whether `read` looks at the target, so that readings are per target.
    """

    name: str
    version: str
    models: frozenset[str]
    sees_target: bool

    async def read(self, items: Sequence[Item]) -> list[Reading | None]:
        """One reading for each item, in order; None where this judge cannot say anything."""
        ...


class PixelReader(Protocol):
    """The simple form, pixels only. `subject_of`, `alignment` and `version` are used where they exist."""

    def read(self, images: list[Image]) -> Sequence[Any]:
        """Readings with `valence` and `arousal`, and perhaps `category`, `subject`, `features`."""
        ...


async def _in_batches(
    read: Callable[[Sequence[Item]], list[Reading | None]], items: Sequence[Item], batch: int
) -> list[Reading | None]:
    found: list[Reading | None] = []
    for start in range(0, len(items), batch):
        found += await asyncio.to_thread(apart, read, items[start : start + batch])
    return found


class PixelJudge:
    """A `PixelReader` as a judge: in a thread, in batches.

    Args:
        reader: The reader.
        name: Its name in the report.
        batch: Images at a time, so that memory stays bounded.
    """

    sees_target = False

    def __init__(self, reader: PixelReader, name: str, batch: int = 64) -> None:
        self.reader, self.name, self.batch = reader, name, batch
        # What it reads follows from its weights and from the rule that turns them into numbers.
        told = getattr(reader, "version", None)
        self.version = "-".join(str(part) for part in (told, _weights(reader)) if part is not None) or "1"
        kind = type(reader)
        self.models = frozenset({name, f"{kind.__module__}:{kind.__qualname__}"})

    async def read(self, items: Sequence[Item]) -> list[Reading | None]:
        """See `Judge`."""
        return await _in_batches(self._read, items, self.batch)

    def _read(self, items: Sequence[Item]) -> list[Reading | None]:
        images = [item.open() for item in items]
        subject_of = getattr(self.reader, "subject_of", lambda _: None)
        aligned = self._aligned(items, images)
        readings: list[Reading | None] = []
        for item, seen, alignment in zip(items, self.reader.read(images), aligned, strict=True):
            said = {name: getattr(seen, name, None) for name in ("valence", "arousal", "category", "subject")}
            asked, features = subject_of(item.prompt), getattr(seen, "features", None)
            readings.append(
                Reading(
                    **said,
                    subject_right=None if None in (asked, said["subject"]) else said["subject"] == asked,
                    alignment=alignment,
                    features=None if features is None else [round(float(value), 5) for value in features],
                )
            )
        return readings

    def _aligned(self, items: Sequence[Item], images: Sequence[Image]) -> list[float | None]:
        """Alignment with each item's prompt, those of one prompt together where the reader can do that."""
        several: Any = getattr(self.reader, "alignments", None)
        single: Any = getattr(self.reader, "alignment", None)
        found: list[float | None] = [None] * len(items)
        for prompt in dict.fromkeys(item.prompt for item in items) if several or single else ():
            places = [place for place, item in enumerate(items) if item.prompt == prompt]
            these = [images[place] for place in places]
            values = several(these, prompt) if several else [single(image, prompt) for image in these]
            for place, value in zip(places, values, strict=True):
                found[place] = float(value)
        return found


def _weights(reader: Any) -> str | None:
    """A hash of the reader's `model`, so that readings by other weights are not taken for its own."""
    state = getattr(getattr(reader, "model", None), "state_dict", None)
    if state is None:
        return None
    total = hashlib.sha256()
    for name, tensor in sorted(state().items()):
        total.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
    return total.hexdigest()[:12]


class LVLMJudge:
    """An LVLM that looks at each picture with the critic's schema.

    Args:
        critic: A critic with `critique(image, prompt, target, …)`.
        name: Its name in the report.
        model: Its model id, compared with the one that gave the reward.
        version: Prompt version and weights.
        concurrency: Pictures in flight.
        sees_target: False for a prompt that keeps the target from the judge.
    """

    def __init__(
        self,
        critic: Any,
        name: str,
        model: str,
        version: str,
        concurrency: int = 16,
        sees_target: bool = True,
    ) -> None:
        self.critic, self.name, self.version, self.sees_target = critic, name, version, sees_target
        self.models = frozenset({model})
        self._slots = asyncio.Semaphore(concurrency)

    async def read(self, items: Sequence[Item]) -> list[Reading | None]:
        """See `Judge`; a critique that stays missing is a missing reading."""
        return list(await asyncio.gather(*(self._one(item) for item in items)))

    async def _one(self, item: Item) -> Reading | None:
        async with self._slots:
            image = await asyncio.to_thread(item.open)
            critique = await self.critic.critique(image, item.prompt, item.target)
        if not isinstance(critique, Critique):
            return None
        return Reading.model_validate(critique.model_dump(include=set(_RATED)))


class _Rating(Reading):
    """One line of ratings; an empty cell is no rating."""

    valence: Score | None = None
    arousal: Score | None = None
    alignment: Annotated[float, Field(ge=0, le=1)] | None = None


def _rating(row: dict[str, Any], where: str) -> Reading:
    """Read a line.

    Raises:
        UserError: A value that is none.
    """
    if not (row.get("sha256") or "").strip():
        raise UserError(f"{where}: no sha256")
    if "" in row:
        raise UserError(f"{where}: more values than columns")
    try:
        said = {key: (row.get(key) or "").strip().lower() or None for key in _RATED}
        return _Rating.model_validate(said)
    except ValidationError as error:
        first = error.errors()[0]
        wrong = f"{first['loc'][0]} {first['input']} lies outside its scale: {first['msg']}"
        raise UserError(f"{where}: {wrong}") from error


class HumanJudge:
    """Ratings by people: a CSV with `sha256` and any of `valence`, `arousal`, `category`, `alignment`.

    One row for each rating. Numbers are averaged over the rows of an image; a category counts where more than
    half name it.

    Args:
        path: The CSV.

    Raises:
        UserError: No such file, a missing column, or a value that does not fit, with its line.
    """

    sees_target = False
    models = frozenset({"human"})

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise UserError(
                f"no ratings at {path}: --judge human:FILE.csv wants a CSV with sha256, valence, arousal"
            )
        raw = path.read_bytes()
        self.name, self.version = f"human ratings ({path.name})", hash_of(raw)
        self.ratings: dict[str, list[Reading]] = {}
        try:
            rows = csv.DictReader(io.StringIO(raw.decode("utf-8-sig"), newline=""), restkey="", strict=True)
            columns = rows.fieldnames or []
            if "sha256" not in columns:
                raise UserError(f"{path}: no column sha256 (found: {', '.join(columns)})")
            if unknown := [name for name in columns if name not in ("sha256", *_RATED)]:
                known = ", ".join(_RATED)
                raise UserError(f"{path}, line 1: unknown column {unknown[0]!r}: known are sha256, {known}")
            for row in rows:
                rating = _rating(row, f"{path}, line {rows.line_num}")
                self.ratings.setdefault(row["sha256"].strip(), []).append(rating)
        except UnicodeDecodeError as error:
            raise UserError(f"{path} is not UTF-8 (byte {error.start}): save it as CSV UTF-8") from error
        except csv.Error as error:
            raise UserError(f"{path}: not CSV ({error})") from error

    async def read(self, items: Sequence[Item]) -> list[Reading | None]:
        """See `Judge`; an image that nobody rated has no reading."""
        return [self._pooled(self.ratings.get(item.sha256, [])) for item in items]

    @staticmethod
    def _pooled(ratings: list[Reading]) -> Reading | None:
        if not ratings:
            return None
        named = [rating.category for rating in ratings if rating.category]
        top = max(set(named), key=named.count) if named else None
        axes = ("valence", "arousal", "alignment")
        means: dict[str, Any] = {axis: mean(getattr(rating, axis) for rating in ratings) for axis in axes}
        return Reading(**means, category=top if top and named.count(top) * 2 > len(named) else None)


class ClipHeadJudge:
    """An image encoder of the CLIP family with a trained head; its text tower gives CLIPScore and CLIP-IQA.

    The head is a stack of linear layers with ReLU between them, saved as a state dict (safetensors or .pth,
    weights only). Two outputs are valence and arousal on [-3, 3]. Eight are the categories in Mikels' order
    (EmoGen's and EmoEdit's public heads have this shape); valence and arousal are then the mean of the
    categories' prototypes under the softmax, a coarse reading.

    Args:
        encoder: Folder or hub id of a CLIP model.
        head: File of the head.
        aesthetic: File of an aesthetic head with one output, on the same normalised features; as in LAION's, nothing
            stands between its layers.
        device: Where to run.
        batch: Images at a time.

    Raises:
        UserError: A head of another shape, or an encoder that cannot be loaded.
    """

    sees_target = False

    def __init__(
        self, encoder: str, head: Path, aesthetic: Path | None = None, device: str = "cpu", batch: int = 32
    ) -> None:
        from transformers import AutoProcessor, CLIPModel

        try:
            self.model = CLIPModel.from_pretrained(encoder).to(device).eval()  # pyright: ignore[reportArgumentType]
            self.processor = AutoProcessor.from_pretrained(encoder)
        except (OSError, ValueError) as error:
            raise UserError(f"CLIP encoder {encoder!r}: {first_line(error)}") from error
        takes: Any = self.model.config.projection_dim
        self.head = load_head(head, takes, (2, 8), between=[torch.nn.ReLU()]).to(device)
        self.aesthetic = load_head(aesthetic, takes, (1,)).to(device) if aesthetic else None
        self.device, self.batch = device, batch
        self.name = f"CLIP head {head.name} on {Path(encoder).name}"
        self.version = hash_of(head.read_bytes() + (aesthetic.read_bytes() if aesthetic else b""))
        self.models = frozenset({encoder, str(head)})

    async def read(self, items: Sequence[Item]) -> list[Reading | None]:
        """See `Judge`.

        Alignment is CLIPScore / 100 (Hessel et al., 2021): max(cos, 0). Quality is CLIP-IQA (Wang et al., 2023):
        the softmax share of "Good photo." against "Bad photo.".
        """
        return await _in_batches(self._read, items, self.batch)

    def _read(self, items: Sequence[Item]) -> list[Reading | None]:
        with torch.inference_mode():
            inputs = self.processor(
                text=[*(item.prompt for item in items), "Good photo.", "Bad photo."],
                images=[item.open() for item in items],
                return_tensors="pt",
                padding=True,
                truncation=True,
            ).to(self.device)
            out = self.model(**inputs)
            image, text = out.image_embeds, out.text_embeds
            aligned = torch.cosine_similarity(image, text[:-2]).clamp(min=0)
            quality = (100 * image @ text[-2:].T).softmax(-1)[:, 0]
            points, names = _affect(self.head(image))
            beauty = self.aesthetic(image)[:, 0].tolist() if self.aesthetic else [None] * len(items)
        return [
            Reading(
                valence=float(points[place, 0]),
                arousal=float(points[place, 1]),
                category=names[place],
                alignment=float(aligned[place]),
                quality=float(quality[place]),
                aesthetic=beauty[place],
                features=[round(float(value), 5) for value in image[place]],
            )
            for place in range(len(items))
        ]


def _affect(hidden: torch.Tensor) -> tuple[torch.Tensor, list[Emotion | None]]:
    if hidden.shape[-1] == 2:
        return hidden.clamp(-3, 3), [None] * len(hidden)
    order = list(Emotion)
    prototypes = torch.tensor([PROTOTYPES[emotion] for emotion in order], device=hidden.device)
    return hidden.softmax(-1) @ prototypes, [order[int(place)] for place in hidden.argmax(-1)]


class ScorerJudge:
    """A scorer of pictures (`tools/scorers.py`) as a judge: it says one thing, and nothing of the emotion."""

    sees_target = False

    def __init__(self, reward: Reward, batch: int = 16) -> None:
        [part] = reward.parts
        self.scorer: Any = part.call
        self.name, self.version, self.batch = part.name, part.version, batch
        self.models = frozenset({part.name, self.scorer.model})

    async def read(self, items: Sequence[Item]) -> list[Reading | None]:
        """See `Judge`."""
        return await _in_batches(self._read, items, self.batch)

    def _read(self, items: Sequence[Item]) -> list[Reading | None]:
        scores = self.scorer([item.open() for item in items], [item.prompt for item in items], None, None)
        return [Reading.model_validate({self.scorer.says: score}) for score in scores]


def hash_of(raw: bytes) -> str:
    """Twelve hex digits of SHA-256: enough to tell versions apart."""
    return hashlib.sha256(raw).hexdigest()[:12]


def _lvlm(argument: str, settings: Settings) -> Judge:
    from ..agents.critic import Critic
    from ..tools.lvlm.load import load_lvlm

    ours = settings.lvlm.model_copy(update={"model": argument} if argument else {})
    # A model that was trained on a prompt of its own knows no other, and that one tells it the target.
    prompt = presets.defaults_if_known(ours.model, "lvlm").get("critic_prompt")
    critic = Critic(
        load_lvlm(ours), prompt or str(Path(__file__).parent / "prompts" / "judge.yaml"), ours.samples
    )
    version = f"{critic.prompt.id}, {ours.samples} samples at temperature {ours.temperature:g}"
    name = f"LVLM {ours.model}"
    return LVLMJudge(critic, name, ours.model, version, ours.concurrency, sees_target=prompt is not None)


def _clip(argument: str, settings: Settings) -> Judge:
    encoder, *heads = argument.split(",")
    if not 1 <= len(heads) <= 2:
        raise UserError("--judge clip:ENCODER,HEAD[,AESTHETIC] wants an encoder and the file of its head")
    device = settings.generator.device
    return ClipHeadJudge(encoder, *map(Path, heads), device="cpu" if device == "auto" else device)


def _scorer(name: str) -> Callable[[str, Settings], Judge]:
    return lambda model, _: ScorerJudge(load_reward(f"{name}:{model}"))


#: Judges by name. A value is a reader's dotted path, or takes what follows the colon and the settings.
JUDGES: dict[str, str | Callable[[str, Settings], Judge]] = {
    "law": ".miniature.judge:LawJudge",
    "guard": ".miniature.judge:Guard",
    "lvlm": _lvlm,
    "human": lambda argument, _: HumanJudge(Path(argument)),
    "clip": _clip,
    **{name: _scorer(name) for name in ("clipscore", "pickscore", "hpsv2", "aesthetic")},
}


def load_judge(spec: str, settings: Settings) -> Judge:
    """A judge by name (`law`, `guard`, `lvlm[:MODEL]`, `human:FILE.csv`, `clip:ENCODER,HEAD`, a scorer as
    `pickscore[:MODEL]`) or dotted path.

    Raises:
        UserError: Unknown, not importable, or not a judge.
    """
    name, _, argument = spec.partition(":")
    known = JUDGES.get(name)
    if callable(known):
        return apart(known, argument, settings)
    found = resolve(spec, JUDGES, "judge")
    made: Any = apart(found) if callable(found) else found
    if not hasattr(made, "read"):
        raise UserError(f"judge {spec!r} has no read(images)")
    return made if hasattr(made, "sees_target") else PixelJudge(made, spec)


def reward_sources(settings: Settings) -> set[str]:
    """What gave the reward: the settings' critic and reward, and those in their adapter's training.json."""
    trained = training(Path(settings.generator.adapter)) if settings.generator.adapter else {}
    rewards = [settings.loop.reward, *filter(None, [trained.get("reward", {}).get("name")])]
    named = {name for reward in rewards for name in terms(reward)}
    # "pickscore:FOLDER" gave it as pickscore, and as the model.
    parts = {part for name in named if name.partition(":")[0] in REWARDS for part in name.split(":", 1)}
    return {settings.lvlm.model, *trained.get("critics", [])} | named | parts


def training(adapter: Path) -> dict[str, Any]:
    """An artifact's `training.json`; empty for a LoRA that has none."""
    file = adapter / "training.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def conflict(judge: Judge, sources: set[str]) -> str | None:
    """The name under which this judge also gave the reward; None where it is independent."""
    return next(iter(sorted(judge.models & sources)), None)
