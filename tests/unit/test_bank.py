"""The bank: clusters, retrieval, its file, its sources; the encoders on tiny models of the real classes."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import rl_log
import tiny
import torch
from emoloop.cli import app
from emoloop.domain import PROTOTYPES, Emotion, EmotionTarget, UserError
from emoloop.tools.bank import encoders, sources
from emoloop.tools.bank.bank import _FORMAT, Bank, Item, build, plane
from emoloop.tools.bank.sheet import save_sheet
from emoloop.traces.rows import RunFilter
from emoloop.traces.store import open_store
from PIL import Image
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from transformers import (
    BitImageProcessor,
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    Dinov2Config,
    Dinov2Model,
)
from typer.testing import CliRunner

#: A text is "EMOTION GROUP NUMBER"; its feature points at emotion and group, its picture's at the group's colour.
EMOTIONS = (Emotion.AWE, Emotion.FEAR, Emotion.SADNESS)


class Texts:
    name = "words"

    def texts(self, texts: Any) -> Any:
        rows = []
        for text in texts:
            emotion, group, number = text.split()
            row = np.zeros(12, dtype=np.float32)
            row[EMOTIONS.index(Emotion(emotion)) * 4 + int(group)] = 3
            rows.append(row + 0.1 * np.random.default_rng(int(number)).normal(size=12))
        return np.array(rows, dtype=np.float32)


class Colours:
    name = "colours"

    def pictures(self, pictures: Any) -> Any:
        return np.array([np.asarray(it).mean((0, 1)) for it in pictures], dtype=np.float32)


def item(emotion: Emotion, group: int, number: int) -> Item:
    colour = (60 * group, 80 * EMOTIONS.index(emotion), number)
    picture = partial(Image.new, "RGB", (8, 8), colour)
    return Item(f"{emotion} {group} {number}", picture, EmotionTarget(category=emotion))


def items(groups: int = 4, each: int = 6) -> list[Item]:
    return [item(e, g, 10 * g + n) for e in EMOTIONS for g in range(groups) for n in range(each)]


def made(**how: Any) -> Bank:
    return build(items(), Texts(), Colours(), **({"length": 4, "held_out": 0.0} | how))


def test_clusters_of_texts_carry_the_mean_of_their_pictures() -> None:
    bank = made()
    assert bank.text.shape == (12, 12) and bank.visual.shape == (12, 3)
    assert np.allclose(np.linalg.norm(bank.text, axis=1), 1, atol=1e-6)
    assert bank.count.tolist() == [6] * 12 and bank.head.items == 72
    for entry in range(12):
        emotion, group, _ = bank.head.captions[entry].split()
        assert bank.head.emotions[bank.emotion[entry]] == emotion
        mean = np.mean([10 * int(group) + n for n in range(6)])
        expected = (60 * int(group), 80 * EMOTIONS.index(Emotion(emotion)), mean)
        assert np.allclose(bank.visual[entry], expected, atol=1e-3)
        assert tuple(bank.thumbnails[entry][0, 0, :2]) == expected[:2]


def test_retrieval_is_cosine_within_the_wanted_emotion() -> None:
    bank, query = made(), Texts().texts(["fear 2 99"])[0]
    cosines = bank.text @ query / np.linalg.norm(query)
    for target in (EmotionTarget(category=Emotion.FEAR), EmotionTarget(category=Emotion.AWE), None):
        among = [
            row
            for row in range(12)
            if target is None or bank.head.emotions[bank.emotion[row]] == target.category
        ]
        expected = sorted(among, key=lambda row: -cosines[row])[:3]
        found = bank.retrieve(query, target, 3)
        assert [entry for entry, _ in found] == expected
        assert [cosine for _, cosine in found] == pytest.approx([float(cosines[row]) for row in expected])
    # A target goes to the nearest emotion that has entries; an axis that is not wanted does not count.
    assert bank.head.emotions[bank.emotion_of(EmotionTarget(valence=2, arousal=-2))] == "awe"
    assert bank.head.emotions[bank.emotion_of(EmotionTarget(arousal=-1.5))] == "sadness"
    assert len(bank.retrieve(query, EmotionTarget(category=Emotion.FEAR), 50)) == 4


def test_held_out_texts_measure_the_agreement() -> None:
    bank = made(held_out=0.3)
    head = bank.head
    assert 8 < head.tested < 36 and head.items + head.tested == 72
    # The words tell the emotion here.
    assert head.agreement == 1.0 and head.chance is not None and head.chance < 0.6
    assert made().head.agreement is None
    with pytest.raises(UserError, match="smaller held-out share"):
        made(held_out=1.0)


def test_cells_of_the_plane() -> None:
    names, points = plane(3)
    assert len(names) == 9 and points[0] == (-2, -2) and points[5] == (0, 2) and names[5] == "V+0.0 A+2.0"
    assert plane(0) == (tuple(PROTOTYPES), tuple(PROTOTYPES.values()))
    numbers = [
        Item(it.text, it.open, EmotionTarget(valence=v, arousal=a))
        for it, (v, a) in zip(items()[:4], [(-2.9, -1.1), (0.5, 2), (0.9, 1.2), (2, 2)], strict=True)
    ]
    numbers.append(Item("awe 0 1", items()[0].open, EmotionTarget(valence=1)))
    bank = build(numbers, Texts(), Colours(), cells=3, held_out=0)
    assert [bank.head.emotions[i] for i in bank.emotion] == [
        "V-2.0 A-2.0",
        "V+0.0 A+2.0",
        "V+0.0 A+2.0",
        "V+2.0 A+2.0",
    ]
    assert bank.head.skipped == 1


def test_the_file_gives_back_what_was_saved_and_refuses_what_it_does_not_know(tmp_path: Path) -> None:
    bank, path = made(), tmp_path / "a.safetensors"
    bank.save(path)
    first = path.read_bytes()
    again = Bank.load(path)
    assert again.head == bank.head and again.sha256 == bank.sha256
    for name in ("text", "visual", "emotion", "count", "thumbnails"):
        assert np.array_equal(getattr(again, name), getattr(bank, name))
    again.save(path)
    assert path.read_bytes() == first
    # The same items give the same bank.
    assert made().sha256 == bank.sha256 != made(length=3).sha256

    tensors = load_file(path)
    with safe_open(path, framework="numpy") as file:
        head = json.loads(file.metadata()[_FORMAT])
    for changed, more, told in (
        ({"version": 2}, {}, "version: Input should be 1"),
        ({"mood": "good"}, {}, "mood: Extra inputs are not permitted"),
        ({}, {"other": np.zeros(1)}, "tensors other are missing or unknown"),
    ):
        save_file(tensors | more, path, metadata={_FORMAT: json.dumps(head | changed)})
        with pytest.raises(UserError, match=told):
            Bank.load(path)
    save_file(tensors, path)
    with pytest.raises(UserError, match="no bank of visual prompts"):
        Bank.load(path)
    path.write_bytes(b"no")
    with pytest.raises(UserError, match="not a readable safetensors file"):
        Bank.load(path)


def test_nothing_usable_is_refused() -> None:
    with pytest.raises(UserError, match="none of 0 has them"):
        build([], Texts(), Colours())


def rows() -> list[dict[str, Any]]:
    return [
        {"file_name": "1.png", "text": "a dog", "emotion": "Awe"},
        {"file_name": "2.png", "text": "a cat", "emotion": "fear"},
    ]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number in (1, 2):
        rl_log.noise_image(number).save(tmp_path / f"{number}.png")
    return tmp_path


def test_tables_of_every_kind_give_the_same_items(folder: Path) -> None:
    data = [(folder / row["file_name"]).read_bytes() for row in rows()]
    table = folder / "t"
    table.with_suffix(".jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows()))
    table.with_suffix(".csv").write_text("file_name,text,emotion\n1.png,a dog,awe\n2.png,a cat,fear\n")
    named = {"caption": ["a dog", "a cat"], "category": ["awe", "fear"]}
    plain = pa.table({"image": data, **named})
    nested = pa.table({"image": [{"bytes": it, "path": None} for it in data], **named})
    for file in (table.with_suffix(".jsonl"), table.with_suffix(".csv"), plain, nested):
        if isinstance(file, pa.Table):
            pq.write_table(file, table.with_suffix(".parquet"))
            file = table.with_suffix(".parquet")
        found = list(sources.table(file))
        assert [(it.text, it.target.category) for it in found] == [("a dog", "awe"), ("a cat", "fear")]
        for number, it in enumerate(found, 1):
            assert np.array_equal(np.asarray(it.open()), np.asarray(rl_log.noise_image(number)))


def test_a_row_that_lacks_something_is_named(folder: Path) -> None:
    table = folder / "t.jsonl"
    for row, told in (
        ({"text": "a dog", "emotion": "awe"}, "row 1: one of the columns file_name, image, path is wanted"),
        ({"file_name": "3.png", "text": "a dog", "emotion": "awe"}, r"row 1: no picture .*3\.png"),
        ({"file_name": "1.png", "text": "a dog"}, "row 1: .*needs a valence, an arousal or a category"),
        ({"file_name": "1.png", "text": "a dog", "emotion": "joy"}, "row 1: Input should be 'amusement'"),
    ):
        table.write_text(json.dumps(row) + "\n")
        with pytest.raises(UserError, match=told):
            list(sources.table(folder))
    (folder / "u.csv").write_text("")
    with pytest.raises(UserError, match=r"one table .* is wanted, there is t\.jsonl, u\.csv"):
        list(sources.table(folder))
    with pytest.raises(UserError, match="there is none"):
        list(sources.table(folder / "none.csv"))


def test_the_logs_best_pictures_are_items_with_what_was_read(tmp_path: Path) -> None:
    settings = rl_log.write_log(tmp_path, 3, reading=lambda round_, index: (0.4 * round_ + 0.1 * index, -0.3))
    with open_store(settings, read_only=True) as store:
        found = list(sources.traced(store, RunFilter()))
        runs = {row.best_prompt: row for row in store.runs()}
        assert {it.text for it in found} == set(runs) and len(found) == 3
        for it in found:
            row = runs[it.text]
            wanted = store.blobs.get_image(str(row.best_sha256))
            assert np.array_equal(np.asarray(it.open()), np.asarray(wanted))
            assert it.target.valence == pytest.approx(0.4 + 0.1 * (row.best_index or 0))


def test_clip_and_dinov2_by_their_classes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tokenizer = tiny.clip_tokenizer()
    ends = {f"{end}_token_id": getattr(tokenizer, f"{end}_token_id") for end in ("bos", "eos", "pad")}
    clip = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, projection_dim=6, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=tokenizer.model_max_length, **ends,
    )  # fmt: skip
    CLIPTextModelWithProjection(clip).save_pretrained(tmp_path / "clip")
    tokenizer.save_pretrained(tmp_path / "clip")
    dino = Dinov2Config(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14, mlp_ratio=2
    )
    Dinov2Model(dino).save_pretrained(tmp_path / "dino")
    BitImageProcessor(
        size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}, do_center_crop=True
    ).save_pretrained(tmp_path / "dino")
    texts = encoders.text_encoder(f"clip={tmp_path / 'clip'}")
    pictures = encoders.visual_encoder(f"dinov2={tmp_path / 'dino'}")
    said = texts.texts(["a dog", "a cat"])
    # A text has its features in any company.
    assert said.shape == (2, 6) and np.allclose(texts.texts(["a cat"])[0], said[1], atol=1e-5)
    seen = pictures.pictures([rl_log.noise_image(1), rl_log.noise_image(2)])
    assert seen.shape == (2, 16) and not np.allclose(seen[0], seen[1])
    bank = build(
        [Item("a dog", partial(rl_log.noise_image, 1), EmotionTarget(category=Emotion.AWE))],
        texts, pictures, held_out=0,
    )  # fmt: skip
    assert bank.head.text_encoder == f"clip={tmp_path / 'clip'}" and bank.visual.shape == (1, 16)
    assert np.allclose(bank.visual[0], seen[0], atol=1e-5)


def test_an_unknown_encoder_or_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="unknown text encoder 'klip': did you mean 'clip'"):
        encoders.text_encoder("klip")
    with pytest.raises(UserError, match="no generator 'nowhere'"):
        encoders.text_encoder("generator=nowhere")
    with pytest.raises(UserError, match="does not load"):
        encoders.visual_encoder(f"dinov2={tmp_path}")


def test_the_page_shows_each_entry_in_the_order_that_a_prompt_finds(tmp_path: Path) -> None:
    bank = made(held_out=0.3)
    page = save_sheet(bank, tmp_path / "a.html").read_text()
    assert page.count("<img") == len(bank.emotion) and "http" not in page
    assert all(caption in page for caption in bank.head.captions)
    query = Texts().texts(["fear 2 99"])[0]
    page = save_sheet(bank, tmp_path / "b.html", "<fear>", query, k=2).read_text()
    assert "&lt;fear&gt;" in page and "<fear>" not in page and page.count('class="first"') == 2 * 3
    order = [page.index(f">fear {group} ") for group in (2,)]
    assert order[0] < min(page.index(f">fear {group} ") for group in (0, 1, 3))


@pytest.mark.slow
def test_the_verbs_on_the_embedded_models(folder: Path, tmp_path: Path) -> None:
    (folder / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows()))
    out = tmp_path / "bank.safetensors"
    run = CliRunner().invoke
    built = run(app, ["bank", "build", str(folder), "--out", str(out), "--held-out", "0", "--json"])
    assert built.exit_code == 0, built.output
    about = json.loads(built.stdout)
    assert about["entries"]["awe"] == about["entries"]["fear"] == 1 and about["items"] == 2
    assert about["text_encoder"] == "generator=miniature" and about["visual_encoder"] == "lvlm=miniature"
    shown = run(
        app, ["bank", "show", str(out), "a cat", "--category", "fear", "--html", str(tmp_path / "x.html")]
    )
    assert shown.exit_code == 0 and "1.00  fear          a cat" in shown.stdout
    assert (tmp_path / "x.html").is_file()
