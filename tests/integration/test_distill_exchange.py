"""Traces out and in again: pick-a-pic parquet, and trajectories for verl-omni."""

from __future__ import annotations

import hashlib
import io
import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from emoloop.cli import app
from emoloop.domain import Critique, EmotionTarget, UserError
from emoloop.events import Critiqued
from emoloop.rl.config import DataConfig
from emoloop.rl.data.dataset import Dataset
from emoloop.rl.rollouts import LogRollouts
from emoloop.traces.exchange.export import export_pickapic
from emoloop.traces.exchange.intake import import_pickapic
from emoloop.traces.exchange.reflection import export_reflection
from emoloop.traces.store import open_store
from PIL import Image
from rl_log import noise_image, run_events, settings_for, write_log
from typer.testing import CliRunner


def png(seed: int) -> bytes:
    stream = io.BytesIO()
    noise_image(seed).save(stream, "PNG")
    return stream.getvalue()


def test_exported_pairs_come_back_as_preferences(tmp_path: Path) -> None:
    with open_store(write_log(tmp_path / "one", 4)) as store:
        assert export_pickapic(store, None, tmp_path / "pairs") == 4
        before = Dataset(LogRollouts(store), DataConfig(held_out=0, kinds=("rounds",))).examples(
            "preferences"
        )
        expected = {(e.prompt, e.target.point, e.winner, e.loser) for e in before.fetch(range(len(before)))}
    with open_store(settings_for(tmp_path / "two")) as store:
        assert import_pickapic(store, tmp_path / "pairs") == 4
        assert import_pickapic(store, tmp_path / "pairs") == 4
        assert len(store.runs()) == 4
        dataset = Dataset(LogRollouts(store), DataConfig(held_out=0, kinds=("rounds", "within")))
        after = dataset.examples("preferences")
        assert {
            (e.prompt, e.target.point, e.winner, e.loser) for e in after.fetch(range(len(after)))
        } == expected
        assert dataset.reward == ("emotion", "1") and dataset.base.model == "tiny"


def test_foreign_pairs_need_a_target_and_may_name_a_model(tmp_path: Path) -> None:
    rows = [
        {"caption": "a dog", "jpg_0": png(1), "jpg_1": png(2), "label_0": 1.0},
        {"caption": "a cat", "jpg_0": png(3), "jpg_1": png(4), "label_0": 0.0},
        {"caption": "a tie", "jpg_0": png(5), "jpg_1": png(6), "label_0": 0.5},
    ]
    file = tmp_path / "foreign.parquet"
    pq.write_table(pa.Table.from_pylist(rows), file)
    home = ["--home", str(tmp_path / "home")]
    runner = CliRunner()
    refused = runner.invoke(app, ["traces", "import", str(file), *home])
    assert isinstance(refused.exception, UserError) and "no wanted emotion" in str(refused.exception)
    taken = runner.invoke(app, ["traces", "import", str(file), "--emotion", "awe", "--model", "mine", *home])
    assert taken.exit_code == 0 and "2 pairs" in taken.output
    with open_store(settings_for(tmp_path / "home")) as store:
        dataset = Dataset(LogRollouts(store), DataConfig(held_out=0))
        pairs = dataset.examples("preferences").fetch(range(2))
        by_prompt = {pair.prompt: pair for pair in pairs}
        assert by_prompt["a dog"].winner == store.blobs.put_image(noise_image(1))
        assert by_prompt["a cat"].winner == store.blobs.put_image(noise_image(4))
        assert pairs[0].target == EmotionTarget(category="awe") and dataset.base.model == "mine"


def test_files_that_are_no_pairs_are_refused(tmp_path: Path) -> None:
    with open_store(settings_for(tmp_path / "home")) as store:
        with pytest.raises(UserError, match="no parquet file at"):
            import_pickapic(store, tmp_path / "nothing.parquet")
        (tmp_path / "text.parquet").write_text("hello")
        with pytest.raises(UserError, match="is no parquet file"):
            import_pickapic(store, tmp_path / "text.parquet")
        pq.write_table(pa.Table.from_pylist([{"caption": "a"}]), tmp_path / "short.parquet")
        with pytest.raises(UserError, match="no column 'jpg_0'"):
            import_pickapic(store, tmp_path / "short.parquet")
        bad = {"caption": "a", "jpg_0": b"no", "jpg_1": b"picture", "label_0": 1.0}
        pq.write_table(pa.Table.from_pylist([bad]), tmp_path / "bad.parquet")
        with pytest.raises(UserError, match="does not open"):
            import_pickapic(store, tmp_path / "bad.parquet", target=EmotionTarget(valence=1))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"label_0": "image"}, "'image'"),
        ({"caption": None}, "the caption must be text"),
        ({"target_valence": 9.0}, "valence 9.0: a number from -3"),
    ],
)
def test_a_row_that_cannot_be_taken_is_named(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    row = {"caption": "a", "jpg_0": png(1), "jpg_1": png(2), "label_0": "1", "target_valence": 1.0}
    pq.write_table(pa.Table.from_pylist([row, {**row, **change}]), tmp_path / "pairs.parquet")
    where = rf"pairs.parquet, row 2: .*{said}"
    with open_store(settings_for(tmp_path / "home")) as store, pytest.raises(UserError, match=where):
        import_pickapic(store, tmp_path / "pairs.parquet", target=EmotionTarget(valence=1))


def test_pairs_that_are_there_with_another_target_or_model_are_not_taken_for_new(tmp_path: Path) -> None:
    pair = {"caption": "a", "jpg_0": png(1), "jpg_1": png(2), "label_0": 1.0}
    pq.write_table(pa.Table.from_pylist([pair]), tmp_path / "pairs.parquet")
    with open_store(settings_for(tmp_path / "home")) as store:
        for valence, model, known in ((1, "mine", True), (2, "mine", False), (1, "other", False)):
            with nullcontext() if known else pytest.raises(UserError, match="emoloop traces rm import-"):
                target = EmotionTarget(valence=valence)
                import_pickapic(store, tmp_path / "pairs.parquet", target=target, model=model)


def test_preferences_of_hpd_train_like_any_others(tmp_path: Path) -> None:
    for seed in range(5):
        (tmp_path / f"{seed}.png").write_bytes(png(seed))
    rows = [
        {"prompt": "a dog", "image_path": ["0.png", "1.png"], "human_preference": [0, 1]},
        {"prompt": "a cat", "image_path": ["2.png", "3.png", "4.png"], "rank": [2.5, 1.0, 2.0]},
    ]
    for name, row in zip(("train", "test"), rows, strict=True):
        (tmp_path / f"{name}.json").write_text(json.dumps([row]))
    runner, found = CliRunner(), []
    for name in ("train", "test"):
        words = ["traces", "import", str(tmp_path / f"{name}.json"), "--home", str(tmp_path / name)]
        for _ in range(2):
            taken = runner.invoke(app, [*words, "--emotion", "awe", "--model", "mine"])
            assert taken.exit_code == 0 and "took 1 preference" in taken.output
        with open_store(settings_for(tmp_path / name)) as store:
            assert len(store.runs()) == 1
            (pair,) = Dataset(LogRollouts(store), DataConfig(held_out=0)).examples("preferences").fetch([0])
            found.append([store.blobs.get_image(str(it)).tobytes() for it in (pair.winner, pair.loser)])
    assert found == [[noise_image(a).tobytes(), noise_image(b).tobytes()] for a, b in ((1, 0), (3, 2))]
    (tmp_path / "other.json").write_text('{"prompt": "a dog"}')
    rows[0]["image_path"] = ["0.png", "lost.png"]
    (tmp_path / "lost.json").write_text(json.dumps(rows))
    (tmp_path / "short.json").write_text(json.dumps([{**rows[0], "human_preference": [1]}]))
    for name, message in (
        ("other", "no annotation file of HPD"),
        ("short", "no annotation file of HPD"),
        ("lost", "row 1: a picture cannot be read"),
    ):
        failed = runner.invoke(app, ["traces", "import", str(tmp_path / f"{name}.json"), "--emotion", "awe",
                                     "--home", str(tmp_path / "train")])  # fmt: skip
        assert isinstance(failed.exception, UserError) and message in str(failed.exception)


def test_ratings_come_in_by_their_scale(tmp_path: Path) -> None:
    with open_store(write_log(tmp_path, 2)) as store:
        one, other = (row.sha256 for row in [*store.candidates("run-0000")][:2])
        before = {it.sha256: it for _, some in LogRollouts(store) for it in some}
    file = tmp_path / "ratings.csv"
    file.write_text(f"sha256,valence,arousal,rating\n{one},9,1,4\n{one},7,1,\n{other},,5,2\n")
    words = ["traces", "import", str(file), "--home", str(tmp_path)]
    refused = CliRunner().invoke(app, words)
    assert isinstance(refused.exception, UserError)
    assert "line 2: valence '9' is no number on the scale -3..3" in str(refused.exception)
    for _ in range(2):
        taken = CliRunner().invoke(app, [*words, "--scale", "1..9"])
        assert taken.exit_code == 0 and "took 3 ratings" in taken.output
    with open_store(settings_for(tmp_path)) as store:
        feedback = [event for event in store.events("run-0000") if event.type == "human_feedback"]
        assert [(it.valence, it.arousal, it.rating) for it in feedback] == [
            (2.25, -3.0, 4.0),
            (None, 0.0, 2.0),
        ]
        after = {it.sha256: it for _, some in LogRollouts(store) for it in some}
        assert after[one].valence == 2.25 and after[one].reward != before[one].reward
        (pair,) = [
            it
            for it in Dataset(LogRollouts(store), DataConfig(held_out=0))
            .examples("preferences")
            .fetch(range(3))
            if it.kind == "human"
        ]
        assert (pair.winner, pair.loser) == (one, other)
    for text, message in (
        (f"sha256,joy\n{one},1\n", "the columns sha256"),
        ("sha256,rating\nabc,1\n", "rates 'abc', which no run"),
        (f"sha256,rating\n{one},nan\n", "line 2: rating 'nan'"),
        (f"sha256,rating\n{one},1,2\n", "line 2 has more cells"),
    ):
        file.write_text(text)
        failed = CliRunner().invoke(app, words)
        assert isinstance(failed.exception, UserError) and message in str(failed.exception)
    wrong = CliRunner().invoke(app, [*words, "--scale", "9"])
    assert isinstance(wrong.exception, UserError) and "want LOW..HIGH" in str(wrong.exception)


def test_trajectories_fit_the_schema(tmp_path: Path) -> None:
    settings = settings_for(tmp_path / "home")
    with open_store(settings) as store:
        for run in range(3):
            events = run_events(store, run)
            told = []
            for event in events:
                if isinstance(event, Critiqued) and isinstance(event.critique, Critique) and run != 1:
                    said = event.critique.model_copy(
                        update={"analysis": "dull sky", "suggestion": "a bright sky"}
                    )
                    event = event.model_copy(update={"critique": said})
                told.append(event)
            store.append(*told)
        assert export_reflection(store, None, tmp_path / "out") == 2
        with pytest.raises(UserError, match="no trajectories"):
            silent = settings_for(tmp_path / "silent")
            with open_store(silent) as other:
                other.append(*run_events(other, 1))
                export_reflection(other, None, tmp_path / "none")
    assert not (tmp_path / "none" / "trajectories.jsonl").exists()
    lines = (tmp_path / "out" / "trajectories.jsonl").read_text().splitlines()
    for trajectory in map(json.loads, lines):
        name = trajectory.pop("trajectory_id")
        canonical = json.dumps(trajectory, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
        assert name == "traj_" + hashlib.sha256(f"visual_reflection_v1\0{canonical}".encode()).hexdigest()
        assert len(trajectory["images"]) == len(trajectory["steps"]) == 2
        assert [step["action"] for step in trajectory["steps"]] == ["continue", "stop"]
        assert trajectory["steps"][0]["edit"] and not trajectory["steps"][1]["edit"]
        assert "valence" in trajectory["prompt"]
        for image in trajectory["images"]:
            data = (tmp_path / "out" / image["uri"]).read_bytes()
            assert hashlib.sha256(data).hexdigest() == image["sha256"]


def _import(folder: Path, picture: object, kind: pa.DataType | None = None, **columns: list[int]):
    cells = {"caption": ["a dog"], "jpg_0": pa.array([picture], kind or pa.binary()), "jpg_1": [png(1)]}
    pq.write_table(pa.table({**cells, "label_0": [1.0], **columns}), folder / "x.parquet")
    with open_store(settings_for(folder / "home")) as store:
        import_pickapic(store, folder / "x.parquet", target=EmotionTarget(valence=1), model="miniature")
        [run] = store.runs()
        row = next(store.candidates(run.run_id))
        return store.blobs.get_image(row.sha256 or ""), row, store.run(run.run_id)


def test_an_imported_picture_is_kept_as_people_saw_it_and_nothing_is_made_up(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    stream = io.BytesIO()
    Image.new("RGB", (48, 16)).save(stream, "JPEG", exif=exif)
    image, row, run = _import(tmp_path, stream.getvalue())
    assert image.size == (row.width, row.height) == (16, 48)
    assert (row.seed, row.steps, row.guidance) == (None, None, None)
    assert run.best is not None and run.best.seed is None
    (tmp_path / "b").mkdir()
    assert _import(tmp_path / "b", png(2), seed_0=[7], seed_1=[8])[1].seed == 7


def test_pictures_that_cannot_be_taken_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "there.png").write_bytes(png(3))
    both = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    path = {"bytes": None, "path": str(tmp_path / "there.png")}
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 64 * 64)
    big = io.BytesIO()
    Image.new("1", (200, 200)).save(big, "PNG")
    for picture, kind in ((None, None), (path, both), (b"no picture", None), (big.getvalue(), None)):
        with pytest.raises(UserError, match="picture"):
            _import(tmp_path, picture, kind)
