"""The whole evaluation on a real tiny pipeline: arms share images, nothing is made twice, reports add up."""

import asyncio
import csv
import json

import numpy as np
import pytest
import tiny
import yaml
from emoloop.domain import UserError
from emoloop.evals.document import Options
from emoloop.evals.evaluate import evaluate
from emoloop.evals.records import Reading
from emoloop.evals.runner import EvaluationFailed
from emoloop.events import Rewarded, RunFinished
from scripted import Scripted

SUITE = {
    "name": "tiny",
    "version": 1,
    "about": "two prompts, two targets",
    "seed": 3,
    "images": 3,
    "rounds": 2,
    "arms": ["base", "rewrite", "best_of_n", "rewrite_best_of_n", "teacher", "loop"],
    "judge": "eval_parts:Light",
    "guard": "eval_parts:Guard",
    "blocks": [
        {
            "prompts": ["a dog by the sea", "a cat on a hill"],
            "targets": [{"valence": 2, "arousal": -1}, {"valence": -1.5, "arousal": 1.5}],
        }
    ],
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.save("sd3", tmp_path_factory.mktemp("model") / "sd3", tokenizer=tiny.word_tokenizer())


def make_options(folder, model):
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(SUITE))
    settings = {
        "home": folder / "home",
        "generator": {"model": str(model), "steps": 2, "micro_batch": 4},
        "lvlm": {"critic_prompt": "critic", "rewriter_prompt": "rewriter"},
    }
    return Options(str(path), settings=settings)


@pytest.fixture
def options(tmp_path, model):
    return make_options(tmp_path, model)


@pytest.fixture(scope="module")
def report(tmp_path_factory, model):
    """The whole thing once."""
    folder = tmp_path_factory.mktemp("whole")
    document, outcome = evaluate(make_options(folder, model), folder / "out", lvlm=Scripted())
    return document, outcome, folder


def test_every_arm_answers_every_request(report):
    document, _, folder = report
    assert list(document["arms"]) == SUITE["arms"]
    assert all(arm["delivered"] == 4 and not arm["failures"] for arm in document["arms"].values())
    flat = document["figures"]
    for arm in SUITE["arms"]:
        assert 0 <= flat[f"{arm}_error_low"] <= flat[f"{arm}_error"] <= flat[f"{arm}_error_high"]
    assert flat["loop_error_reduction"] == pytest.approx(1 - flat["loop_error"] / flat["base_error"])
    assert document["n"] == flat["n"] == 4
    stored = json.loads((folder / "out" / "report.json").read_text())
    assert stored["figures"] == flat
    with (folder / "out" / "report.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == 24
    base = [float(row["error"]) for row in rows if row["arm"] == "base"]
    assert np.mean(base) == pytest.approx(flat["base_error"])


def test_arms_share_seeds_and_images(report):
    _, outcome, _ = report
    rows = {(row.arm, row.request.id): row.delivery for row in outcome.rows}
    for request in {row.request.id for row in outcome.rows}:
        base = [shot.sha256 for shot in rows["base", request].shots]
        assert len(base) == 3
        assert [shot.sha256 for shot in rows["best_of_n", request].shots][:3] == base
        assert [shot.sha256 for shot in rows["loop", request].shots if shot.round == 0] == base
        rewritten = [shot.sha256 for shot in rows["rewrite", request].shots]
        assert [shot.sha256 for shot in rows["rewrite_best_of_n", request].shots][:3] == rewritten
        found = rows["loop", request]
        assert {shot.prompt for shot in rows["teacher", request].shots} == {found.prompt}
        seen = {shot.seed for shot in found.shots}
        assert not seen & {shot.seed for shot in rows["teacher", request].shots}


def test_an_arm_that_selects_takes_the_critics_favourite(report):
    _, outcome, _ = report
    for row in outcome.rows:
        if row.arm in ("best_of_n", "rewrite_best_of_n", "loop"):
            (picked,) = row.delivery.handed_over
            assert picked.reward == max(shot.reward for shot in row.delivery.shots)
            assert row.delivery.cost.images == len(row.delivery.shots)


def test_cost_is_that_of_one_delivered_image(report):
    document, _, _ = report
    flat = document["figures"]
    assert (flat["base_images"], flat["base_lvlm_calls"], flat["base_tokens"]) == (1, 0, 0)
    assert (flat["rewrite_images"], flat["rewrite_lvlm_calls"], flat["rewrite_tokens"]) == (1, 1, 15)
    assert (flat["best_of_n_images"], flat["best_of_n_lvlm_calls"]) == (6, 6)
    assert (flat["rewrite_best_of_n_images"], flat["rewrite_best_of_n_lvlm_calls"]) == (6, 7)
    assert flat["loop_lvlm_calls"] > flat["loop_images"]
    assert flat["base_seconds"] > 0


def test_every_delivery_has_a_run_in_the_log_that_can_be_read_back(report):
    from emoloop.settings import load_settings
    from emoloop.traces.store import open_store

    document, outcome, folder = report
    store = open_store(load_settings({"home": document["home"]}), read_only=True)
    try:
        for row in outcome.rows:
            run = store.run(row.delivery.run_id)
            assert run.prompt == row.request.prompt
            assert sum(len(round.candidates) for round in run.rounds) == len(row.delivery.shots)
    finally:
        store.close()
    assert document["home"] != str(folder / "home")  # apart from what distillation learns from


def test_a_second_call_makes_nothing_and_one_more_arm_makes_only_that(options, tmp_path):
    options.arms = ["base", "loop"]
    first, _ = evaluate(options, tmp_path / "one", lvlm=Scripted())
    assert first["images_made"] > 0
    lvlm = Scripted()
    again, _ = evaluate(options, tmp_path / "two", lvlm=lvlm)
    assert again["images_made"] == 0
    assert not lvlm.calls
    assert again["figures"] == first["figures"]
    options.arms = ["base", "loop", "best_of_n"]
    more, _ = evaluate(options, tmp_path / "three", lvlm=Scripted())
    # base made 3 of the 6; two targets share their prompt's images
    assert more["images_made"] == 2 * 3
    assert {key: value for key, value in more["figures"].items() if key in first["figures"]} == first[
        "figures"
    ]


def test_an_interrupted_evaluation_goes_on(options, tmp_path):
    options.arms = ["base", "rewrite"]

    def down(role, number):
        return ConnectionError("gone") if role == "rewriter" else None

    with pytest.raises(EvaluationFailed, match="arm 'rewrite' failed on all 4 requests"):
        evaluate(options, tmp_path / "one", lvlm=Scripted(fail=down))
    document, outcome = evaluate(options, tmp_path / "one", lvlm=Scripted())
    assert document["arms"]["rewrite"]["delivered"] == 4
    base = {shot.sha256 for row in outcome.rows if row.arm == "base" for shot in row.delivery.shots}
    everything = {shot.sha256 for row in outcome.rows for shot in row.delivery.shots}
    assert document["images_made"] == len(everything - base)


def test_one_failed_request_is_missing_and_the_rest_counts(options, tmp_path):
    options.arms = ["base", "rewrite"]
    document, _ = evaluate(
        options,
        tmp_path / "one",
        lvlm=Scripted(
            fail=lambda role, number: ConnectionError("gone") if role == "rewriter" and number < 1 else None
        ),
    )
    arm = document["arms"]["rewrite"]
    assert arm["delivered"] == 3 and sum(arm["failures"].values()) == 1
    assert arm["metrics"]["error"]["n"] == 3


def test_a_loop_that_broke_off_is_a_failure_and_goes_on_next_time(options, tmp_path):
    options.arms = ["loop"]
    options.limit = 1
    options.settings = {**options.settings, "loop": {"review": True}}

    def down(role, number):
        return ValueError("gone") if role == "critic" and number >= 6 else None

    with pytest.raises(EvaluationFailed, match="on all 2 requests: round 1: no critique at all: ValueError"):
        evaluate(options, tmp_path / "one", lvlm=Scripted(fail=down))
    document, outcome = evaluate(options, tmp_path / "one", lvlm=Scripted())
    assert document["arms"]["loop"]["delivered"] == 2
    assert all(len(row.delivery.shots) == 6 for row in outcome.rows)


async def test_what_an_arm_lacked_is_made_the_next_time(tmp_path):
    from emoloop.evals.arms import ARMS, deliver
    from emoloop.evals.runner import open_kit
    from emoloop.evals.suites import Suite
    from emoloop.settings import load_settings
    from painter import Painter

    suite = Suite.model_validate(SUITE)
    request = suite.requests[0]
    settings = load_settings(
        {"home": tmp_path, "generator": {"model": "eval_parts:painter"}, "loop": {"rounds": 2, "images": 3}}
    )
    async with open_kit(suite, settings, None, Scripted()) as kit:
        painter = kit.generator.inner
        assert isinstance(painter, Painter)
        painter.fail = lambda number: ValueError("bad weather") if number == 1 else None
        first = await deliver(ARMS["best_of_n"], "best_of_n", kit, request, 1)
        assert (first.failure, first.complete, len(first.shots)) == (None, False, 5)
        again = await deliver(ARMS["best_of_n"], "best_of_n", kit, request, 1)
        assert again.whole and len(again.shots) == 6 and len(painter.requests) == 7
        events = await kit.recorder.events(again.run_id or "")
        assert len([e for e in events if isinstance(e, Rewarded)]) == 6
        assert [e.node for e in events if isinstance(e, RunFinished)] == ["finish", "finish.2"]
        [row] = kit.recorder.store.runs()
        assert (row.images, row.best_sha256) == (6, again.handed_over[0].sha256)
        other = await deliver(ARMS["best_of_n"], "best_of_n", kit, request, 1, "2")
        assert other.run_id != again.run_id


def test_a_reward_that_fails_is_a_failure_of_the_arm(options, tmp_path):
    options.arms = ["base", "best_of_n"]
    options.settings = {**options.settings, "loop": {"reward": "eval_parts:odd"}}
    with pytest.raises(EvaluationFailed, match="'best_of_n' failed on all 4 requests: reward odd gave nan"):
        evaluate(options, tmp_path / "one", lvlm=Scripted())


def test_a_judge_that_gave_the_reward_is_refused_unless_allowed(options, tmp_path):
    options.settings = {**options.settings, "loop": {"reward": "eval_parts:Light"}}
    with pytest.raises(UserError, match="also gave the reward"):
        evaluate(options, tmp_path / "out", lvlm=Scripted())
    assert not (tmp_path / "out").exists()


def test_the_command_line_wins_over_the_suite(options):
    from emoloop.evals.evaluate import plan

    suite = SUITE | {"settings": {"generator": {"steps": 9, "guidance": 2.5}, "loop": {"tolerance": 0.3}}}
    with open(options.suite, "w") as file:
        yaml.safe_dump(suite, file)
    options.settings = {**options.settings, "loop": {"tolerance": None, "rounds": 9}}
    settings = plan(options).settings
    assert (settings.generator.steps, settings.generator.guidance) == (2, 2.5)
    assert (settings.loop.tolerance, settings.loop.rounds) == (0.3, SUITE["rounds"])


def test_shards_fill_one_cache(options, tmp_path):
    from emoloop.evals.evaluate import plan
    from emoloop.evals.runner import run

    options.arms = ["base"]
    ready = plan(options)
    for which in (0, 1):
        outcome = asyncio.run(
            run(ready.suite, ready.settings, ready.arms, ready.judge, shard=(which, 2), lvlm=Scripted())
        )
        assert outcome.made == 3 and len(outcome.rows) == 2
    document, _ = evaluate(options, tmp_path / "out", lvlm=Scripted())
    assert document["images_made"] == 0


def test_a_users_arm_by_dotted_path(options, tmp_path):
    options.arms = ["base", "twice=eval_parts:twice"]
    document, outcome = evaluate(options, tmp_path / "out", lvlm=Scripted())
    assert document["arms"]["twice"]["delivered"] == 4
    assert {row.delivery.prompt for row in outcome.rows if row.arm == "twice"} == {
        "bright a dog by the sea",
        "bright a cat on a hill",
    }


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"arms": ["lop"]}, "unknown arm 'lop'"),
        ({"arms": ["adapter"]}, "--adapter DIR"),
        ({"arms": ["mine=nowhere"]}, "no adapter at"),
        ({"judge": "oracle"}, "unknown judge"),
        ({"suite": "nowhere"}, "no suite"),
    ],
)
def test_wrong_words_are_one_line_before_anything_is_made(options, tmp_path, change, said):
    for key, value in change.items():
        setattr(options, key, value)
    with pytest.raises(UserError, match=said):
        evaluate(options, tmp_path / "out", lvlm=Scripted())
    assert not (tmp_path / "home").exists()


def test_readings_survive_the_cache():
    reading = Reading(valence=1.0, arousal=-1.0, features=[0.5], subject_right=True)
    assert Reading.model_validate(reading.model_dump(mode="json", exclude_none=True)) == reading


@pytest.fixture(scope="module")
def lvlm(tmp_path_factory):
    import tiny_lvlm

    return tiny_lvlm.build(tmp_path_factory.mktemp("lvlm") / "lvlm")


def test_the_verb_prints_one_document_and_a_judge_may_be_a_model(options, lvlm, tmp_path):
    from emoloop.cli import app
    from typer.testing import CliRunner

    suite = tmp_path / "verb.yaml"
    small = {"generator": {"steps": 2}, "lvlm": {"max_tokens": 400}}
    suite.write_text(yaml.safe_dump(SUITE | {"name": "verb", "images": 1, "settings": small}))
    words = ["eval", str(suite), "--arms", "base", "--limit", "1", "--json", "--model"]
    words += [options.settings["generator"]["model"], "--lvlm", str(lvlm)]
    words += ["--home", str(tmp_path / "home"), "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(app, words, catch_exceptions=False)
    assert result.exit_code == 0, result.stderr
    document = json.loads(result.stdout)
    assert document["suite"] == "verb" and document["figures"]["n"] == 2 and document["device"] == "cpu"
    assert (tmp_path / "out" / "report.html").is_file()

    with pytest.raises(UserError, match="also gave the reward"):
        CliRunner().invoke(app, [*words, "--judge", "lvlm"], catch_exceptions=False)
    result = CliRunner().invoke(
        app, [*words, "--judge", "lvlm", "--allow-reward-judge"], catch_exceptions=False
    )
    document = json.loads(result.stdout)
    assert document["reward_judge"] == str(lvlm)
    assert document["images_made"] == 0 and document["judge"]["name"] == f"LVLM {lvlm}"
    assert (
        "alarm" in (tmp_path / "out" / "report.html").read_text().partition("<h2")[0].partition("<header>")[2]
    )
