"""Labelled pictures: every layout that is read, scales, splits, and what is refused in one line."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from emoloop.agents.prompt import load_prompt
from emoloop.domain import PROTOTYPES, Emotion, UserError
from emoloop.rl.critic.data import Sample, digest, divided, question, read
from emoloop.rl.critic.layouts import SPREAD, lexicon_label
from emoloop.rl.critic.match import chosen
from PIL import Image
from scipy.io import savemat


def picture(path: Path, shade: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 6), (shade, 0, 0)).save(path)
    return path


def table(folder: Path, rows: list[dict[str, Any]]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_a_folder_in_each_form_reads_alike(tmp_path):
    rows = [
        {
            "image": "a.png",
            "valence": 9,
            "arousal": 1,
            "category": "Awe",
            "prompt": "a dog",
            "analysis": "grey sky",
        },
        {"image": "b.png", "valence": None, "arousal": 5, "category": None, "prompt": None, "analysis": None},
    ]
    for name in ("a", "b"):
        picture(tmp_path / f"{name}.png")
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with (tmp_path / "metadata.csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "metadata.parquet")
    found = [read(tmp_path / f"metadata.{end}", "folder", (1.0, 9.0)) for end in ("jsonl", "csv", "parquet")]
    assert found[0] == found[1] == found[2]
    first, second = found[0]
    assert (first.valence, first.arousal, first.category) == (3.0, -3.0, "awe")
    assert first.labels == {"analysis": "grey sky", "valence": "+3.0", "arousal": "-3.0", "category": "awe"}
    assert (second.valence, second.arousal) == (None, 0.0), "a label that is missing stays missing"
    assert read(tmp_path, "folder", (1.0, 9.0)) == found[0]


def test_parquet_may_hold_the_pictures_as_datasets_writes_them(tmp_path):
    content = picture(tmp_path / "a.png").read_bytes()
    rows = [{"image": {"bytes": content, "path": None}, "valence": 1.0}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "metadata.parquet")
    [sample] = read(tmp_path, "folder", None)
    assert sample.image == content and sample.picture(4).size == (4, 4)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"image": "a.png", "valence": 5}, "metadata.jsonl row 1: 5 lies outside the declared scale -3 to 3"),
        ({"image": "a.png", "valence": "good"}, "a number is wanted, not 'good'"),
        ({"image": "a.png", "category": "joy"}, "category 'joy' is none of"),
        ({"image": "none.png", "valence": 1}, "there is no"),
        ({"valence": 1}, "row 1: no image"),
        ({"image": "a.png"}, "1 pictures and no label"),
        ({"image": "a.png", "valence": 1, "split": "test"}, "split 'test' is none of train, held_out"),
    ],
)
def test_what_cannot_be_used_is_one_line(tmp_path, row, said):
    picture(tmp_path / "a.png")
    with pytest.raises(UserError, match=said) as error:
        read(table(tmp_path, [row]), "folder", None)
    assert "\n" not in str(error.value)


def test_an_empty_or_missing_folder_says_so(tmp_path):
    with pytest.raises(UserError, match=r"one table .* is wanted, there is none; for a published"):
        read(tmp_path, "folder", None)
    with pytest.raises(UserError, match="there is no"):
        read(tmp_path / "none", "folder", None)
    with pytest.raises(UserError, match="no label"):
        read(table(tmp_path, []), "folder", None)
    (tmp_path / "metadata.jsonl").write_text('[{"image": "a.png", "valence": 1}]')
    with pytest.raises(UserError, match="each line must be a JSON object"):
        read(tmp_path, "folder", None)
    with pytest.raises(UserError, match="unknown data layout 'emosett': did you mean 'emoset'"):
        read(tmp_path, "emosett", None)


def test_emoset_bears_drawn_labels_that_are_marked(tmp_path):
    for split, number in (("train", 1), ("test", 2)):
        image, note = f"image/fear/fear_{number}.jpg", f"annotation/fear/fear_{number}.json"
        picture(tmp_path / image)
        (tmp_path / note).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / note).write_text(
            json.dumps({"emotion": "fear", "scene": "cave", "object": ["bat", "rock"]})
        )
        (tmp_path / f"{split}.json").write_text(json.dumps([["fear", image, note]]))
    one, two = read(tmp_path, "emoset", None)
    assert one.origin == two.origin == "lexicon" and one.category == "fear"
    assert (one.split, two.split) == ("train", "held_out")
    assert one.texts == {"analysis": "cave, bat, rock"}
    assert (one.valence, one.arousal) == lexicon_label("fear", one.name) != lexicon_label("fear", two.name)


def test_lexicon_labels_follow_their_classes_gaussian():
    drawn = np.array([lexicon_label("contentment", f"{number}.jpg") for number in range(4000)])
    assert drawn.mean(0) == pytest.approx(PROTOTYPES[Emotion.CONTENTMENT], abs=0.05)
    assert drawn.std(0) == pytest.approx((SPREAD, SPREAD), abs=0.03)


def test_emotic_is_the_mean_over_people(tmp_path):
    def person(valence: float, **more: Any) -> dict[str, Any]:
        return {"annotations_continuous": {"valence": valence, "arousal": 10.0, "dominance": 5.0}, **more}

    combined = {"combined_continuous": {"valence": 1.0, "arousal": 5.5, "dominance": 5.0}}
    entries = {
        "train": [{"filename": "a.jpg", "folder": "mscoco/images", "person": [person(1.0), person(10.0)]}],
        "test": [{"filename": "b.jpg", "folder": "mscoco/images", "person": [person(9.0, **combined)]}],
    }
    for name in ("a", "b"):
        picture(tmp_path / "emotic" / "mscoco" / "images" / f"{name}.jpg")
    savemat(tmp_path / "Annotations.mat", entries)
    one, two = read(tmp_path, "emotic", None)
    assert (one.valence, one.arousal, one.split) == (0.0, 3.0, "train")
    assert (two.valence, two.arousal, two.split) == (-3.0, 0.0, "held_out"), (
        "annotators' mean where there is one"
    )


def test_oasis_finds_its_pictures_by_theme(tmp_path):
    picture(tmp_path / "Images" / "Acorns 1.jpg")
    (tmp_path / "OASIS.csv").write_text(
        ",Theme,Category,Source,Valence_mean,Valence_SD,Valence_N,Arousal_mean,Arousal_SD,Arousal_N\n"
        "I1,Acorns 1 ,Object,Pixabay,7,1.2,103,2.5,1.4,101\n"
    )
    [sample] = read(tmp_path, "oasis", None)
    assert (sample.valence, sample.arousal) == (3.0, -1.5)


def test_emoscene_wants_its_scale_declared(tmp_path):
    picture(tmp_path / "a.png")
    folder = table(
        tmp_path, [{"image": "a.png", "valence": 9, "arousal": 5, "descriptors": ["fog", "harbour"]}]
    )
    with pytest.raises(UserError, match=r"data\.scale=\[1,9\]"):
        read(folder, "emoscene", None)
    [sample] = read(folder, "emoscene", (1.0, 9.0))
    assert (sample.valence, sample.arousal, sample.texts) == (3.0, 0.0, {"analysis": "fog, harbour"})


def samples(count: int, **more: Any) -> list[Sample]:
    return [Sample(image=b"", name=f"{number}.png", valence=0.0, **more) for number in range(count)]


def test_the_split_is_by_name_or_as_the_data_say():
    train, held_out = divided(samples(400), 0.25, "salt")
    assert 70 < len(held_out) < 130 and len(train) + len(held_out) == 400
    assert divided(samples(200), 0.25, "salt")[1] == [it for it in held_out if int(it.name[:-4]) < 200]
    with pytest.raises(UserError, match="no picture is left to watch"):
        divided(samples(5, split="train"), 0.25, "salt")
    with pytest.raises(UserError, match="no picture is left to train on"):
        divided(samples(5, split="held_out"), 0.25, "salt")


def test_the_digest_tells_another_label(tmp_path):
    one = Sample(image=b"x", name="a", valence=1.0)
    assert digest([one]) != digest([Sample(image=b"x", name="a", valence=1.1)]) != digest([one, one])


def test_a_question_has_ordered_parts_and_a_target_that_stays():
    sample, prompt = (
        Sample(image=b"", name="a.png", valence=1.0, prompt="a dog"),
        load_prompt("critic-compact"),
    )
    system, user = question(sample, prompt)
    assert [part["type"] for part in user["content"]] == ["text", "image", "text"]
    assert isinstance(system["content"], list) and "a dog" in user["content"][0]["text"]
    assert question(sample, prompt) == question(sample, prompt), "a drawn target belongs to the picture"
    assert question(Sample(image=b"", name="b.png"), prompt)[1]["content"][0] != user["content"][0]


def test_a_clean_counterpart_lies_beside(tmp_path):
    for name, shade in (("a", 10), ("b", 200)):
        picture(tmp_path / f"{name}.png", shade)
    table(tmp_path, [{"image": "a.png", "clean": "b.png", "valence": 1}, {"image": "b.png", "valence": 1}])
    noisy, own = read(tmp_path, "folder", None)
    shades = [
        it.picture(2, clean=clean).getpixel((0, 0))[0] for it in (noisy, own) for clean in (False, True)
    ]
    assert shades == [10, 200, 200, 200], "a picture without a counterpart is its own"
    assert chosen([own, noisy, own, own]) == [noisy], "one without for each four with"
    with pytest.raises(UserError, match=r"set match\.steps=0"):
        chosen([own])
