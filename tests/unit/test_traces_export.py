"""Exports: what other tools read is what the log holds."""

from __future__ import annotations

import io
import json

import datasets
import pyarrow.parquet as pq
import pytest
from emoloop.domain import EmotionTarget, UserError
from emoloop.events import EVENT, HumanFeedback, ImageGenerated, Rewarded, Rewritten, RunStarted
from emoloop.settings import Settings
from emoloop.traces.exchange.export import export_jsonl, export_pickapic, load_format, pairs
from emoloop.traces.rows import RunFilter
from emoloop.traces.store import open_store
from PIL import Image


@pytest.fixture
def store(tmp_path):
    """Twenty runs that gain, one that never left round 0, one with a single reward."""
    with open_store(Settings(home=tmp_path / "home")) as store:
        shapes = {f"run{n:02}": [[0.1, 0.3], [0.9, 0.2]] for n in range(20)}
        shapes |= {"short": [[0.4, None, 0.6]], "alone": [[0.4, None]]}
        for colour, (run_id, rewards) in enumerate(shapes.items()):
            target = EmotionTarget(valence=1.0, category="awe")
            events = [RunStarted(run_id=run_id, prompt=f"neutral {run_id}", target=target, seed=1)]
            for number, row in enumerate(rewards):
                text = f"neutral {run_id}" if number == 0 else "refined"
                if number:
                    events.append(
                        Rewritten(run_id=run_id, round=number, prompt=text, model="m", prompt_version="1")
                    )
                for index, value in enumerate(row):
                    place = {"run_id": run_id, "round": number, "index": index}
                    sha256 = store.blobs.put_image(Image.new("RGB", (8, 8), (colour, number, index)))
                    made = {"model": "tiny", "steps": 1, "guidance": 1.0, "height": 8, "width": 8}
                    events.append(ImageGenerated(**place, sha256=sha256, prompt=text, seed=2**64 - 1, **made))
                    reason = "timed out" if value is None else None
                    events.append(
                        Rewarded(
                            **place, sha256=sha256, name="emotion", version="1", value=value, reason=reason
                        )
                    )
            store.append(*events)
        yield store


def test_json_lines_parse_back_into_the_same_events(store):
    file = io.StringIO()
    count = export_jsonl(store, RunFilter(prompt="run0"), file)
    events = [EVENT.validate_json(line) for line in file.getvalue().splitlines()]
    assert len(events) == count
    assert [event.run_id for event in events if event.type == "run_started"] == [
        f"run{n:02}" for n in range(10)
    ]
    kept = [event.model_copy(update={"cursor": 0}) for event in store.events("run00")]
    assert events[: len(kept)] == kept


def test_a_pair_is_the_winner_against_the_worst_of_round_0(store):
    by_run = {pair.run.run_id: pair for pair in pairs(store)}
    assert len(by_run) == 21 and "alone" not in by_run
    gained = by_run["run00"]
    assert (gained.better.round, gained.better.reward, gained.worse.round, gained.worse.reward) == (
        1,
        0.9,
        0,
        0.1,
    )
    assert (by_run["short"].better.index, by_run["short"].worse.index) == (2, 0)


def test_the_parquet_is_pick_a_pic(store, tmp_path):
    assert export_pickapic(store, None, tmp_path / "set") == 21
    table = pq.read_table(tmp_path / "set" / "data" / "train-00000-of-00001.parquet")
    rows = table.to_pylist()
    assert {row["label_0"] for row in rows} == {0.0, 1.0}, "the better image must not always come first"
    for row in rows:
        assert row["label_0"] + row["label_1"] == 1.0
        assert row["caption"] == f"neutral {row['run_id']}"
        winner, loser = (0, 1) if row["label_0"] else (1, 0)
        assert row["best_image_uid"] == row[f"image_{winner}_uid"]
        assert row[f"reward_{winner}"] > row[f"reward_{loser}"]
        assert row["seed_0"] == 2**64 - 1
        assert (row["target_valence"], row["target_arousal"], row["target_category"]) == (1.0, None, "awe")
        for side in (0, 1):
            with Image.open(io.BytesIO(row[f"jpg_{side}"])) as image:
                stored = store.blobs.get_image(row[f"image_{side}_uid"])
                assert image.convert("RGB").tobytes() == stored.tobytes()
    assert (
        pq.read_schema(tmp_path / "set" / "data" / "train-00000-of-00001.parquet").field("jpg_0").type
        == "binary"
    )


def test_a_pair_has_the_labels_of_its_run_and_pictures(store, tmp_path):
    seen = next(iter(store.candidates("run01"))).sha256
    said = HumanFeedback(run_id="run01", labels=["warm", "keep"])
    store.append(said, HumanFeedback(run_id="run01", sha256=seen, favourite=True, labels=["keep"]))
    export_pickapic(store, RunFilter(prompt="run0"), tmp_path / "pairs.parquet")
    labels = {row["run_id"]: row["labels"] for row in pq.read_table(tmp_path / "pairs.parquet").to_pylist()}
    assert labels.pop("run01") == ["keep", "warm", "\u2665"] and set(map(len, labels.values())) == {0}


def test_all_pairs_of_a_run(store, tmp_path):
    write, noun = load_format("pickapic-all")
    assert (write(store, None, tmp_path / "all"), noun) == (20 * 6 + 1, "pair")
    rows = [row for row in datasets.load_dataset(str(tmp_path / "all"), split="train", cache_dir=str(tmp_path / "c"))
            if row["run_id"] == "run00"]  # fmt: skip
    assert {row["num_example_per_prompt"] for row in rows} == {6}
    sides = [(row[f"reward_{1 - int(row['label_0'])}"], row[f"reward_{int(row['label_0'])}"]) for row in rows]
    assert sorted(sides) == [(0.2, 0.1), (0.3, 0.1), (0.3, 0.2), (0.9, 0.1), (0.9, 0.2), (0.9, 0.3)]


def test_a_format_may_be_anybodys(store, tmp_path):
    write, noun = load_format("emoloop.traces.exchange.export:export_file")
    assert (write(store, RunFilter(run_ids=("short",)), tmp_path / "x.jsonl"), noun) == (7, "row")
    with pytest.raises(UserError, match="unknown export format 'pikapic': did you mean 'pickapic'"):
        load_format("pikapic")


def test_a_single_file_and_more_rows_than_one_group(store, tmp_path, monkeypatch):
    monkeypatch.setattr("emoloop.traces.exchange.export._GROUP", 8)
    assert export_pickapic(store, None, tmp_path / "pairs.parquet") == 21
    file = pq.ParquetFile(tmp_path / "pairs.parquet")
    assert (file.metadata.num_rows, file.metadata.num_row_groups) == (21, 3)


def test_nothing_to_pair_or_a_lost_image_leaves_no_file(store, tmp_path):
    with pytest.raises(UserError, match="no pairs"):
        export_pickapic(store, RunFilter(run_ids=("alone",)), tmp_path / "out" / "pairs.parquet")
    assert not (tmp_path / "out").exists()
    better = next(pairs(store, RunFilter(run_ids=("short",)))).better
    store.blobs.path(better.sha256 or "").unlink()
    with pytest.raises(FileNotFoundError):
        export_pickapic(store, None, tmp_path / "out" / "pairs.parquet")
    assert not (tmp_path / "out").exists()


def test_json_lines_hold_no_images(store):
    file = io.StringIO()
    export_jsonl(store, RunFilter(run_ids=("short",)), file)
    assert all(
        len(line) < 2000 and json.loads(line)["run_id"] == "short" for line in file.getvalue().splitlines()
    )
