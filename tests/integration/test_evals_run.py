"""The whole evaluation on a real tiny pipeline: arms share images, nothing is made twice, reports add up."""

import asyncio
import csv
import json
import sys
from contextlib import asynccontextmanager
from dataclasses import asdict, replace

import numpy as np
import pytest
import tiny
import yaml
from emoloop.domain import Failure, UserError
from emoloop.evals.arms import ARMS
from emoloop.evals.document import Options
from emoloop.evals.evaluate import evaluate
from emoloop.evals.records import Reading
from emoloop.evals.runner import open_harness
from emoloop.evals.suites import Suite
from emoloop.settings import load_settings
from emoloop.traces.store import open_store
from rich.progress import Progress
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
    rows = {(row.arm, row.request.id): row for row in outcome.rows}
    for request in {row.request.id for row in outcome.rows}:
        base = [shot.sha256 for shot in rows["base", request].made]
        assert len(base) == 3
        assert [shot.sha256 for shot in rows["best_of_n", request].made][:3] == base
        assert [shot.sha256 for shot in rows["loop", request].made if shot.round == 0] == base
        rewritten = [shot.sha256 for shot in rows["rewrite", request].made]
        assert [shot.sha256 for shot in rows["rewrite_best_of_n", request].made][:3] == rewritten
        found = rows["loop", request]
        assert {shot.prompt for shot in rows["teacher", request].made} == {found.prompt}
        seen = {shot.seed for shot in found.made}
        assert not seen & {shot.seed for shot in rows["teacher", request].made}


def test_an_arm_that_selects_takes_the_critics_favourite(report):
    _, outcome, _ = report
    for row in outcome.rows:
        if row.arm in ("best_of_n", "rewrite_best_of_n", "loop"):
            (picked,) = row.handed_over
            assert picked.reward == max(shot.reward for shot in row.made)
            assert row.cost.images == len(row.made)


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
            run = store.run(row.run_id)
            assert run.prompt == row.request.prompt
            assert sum(len(round.candidates) for round in run.rounds) == len(row.made)
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

    with pytest.raises(Failure, match="arm 'rewrite' failed on all 4 requests"):
        evaluate(options, tmp_path / "one", lvlm=Scripted(fail=down))
    document, outcome = evaluate(options, tmp_path / "one", lvlm=Scripted())
    assert document["arms"]["rewrite"]["delivered"] == 4
    base = {shot.sha256 for row in outcome.rows if row.arm == "base" for shot in row.made}
    everything = {shot.sha256 for row in outcome.rows for shot in row.made}
    assert document["images_made"] == len(everything - base)


def test_one_failed_request_is_missing_and_the_rest_counts(options, tmp_path):
    options.arms = ["base", "rewrite"]
    document, _ = evaluate(
        options,
        tmp_path / "one",
        lvlm=Scripted(
            fail=lambda role, number: ValueError("gone") if role == "rewriter" and number < 1 else None
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

    with pytest.raises(Failure, match="on all 2 requests: round 1: no critique at all: ValueError"):
        evaluate(options, tmp_path / "one", lvlm=Scripted(fail=down))
    document, outcome = evaluate(options, tmp_path / "one", lvlm=Scripted())
    assert document["arms"]["loop"]["delivered"] == 2
    assert all(len(row.made) == 6 for row in outcome.rows)


@asynccontextmanager
async def painted(tmp_path, lvlm=None):
    """A harness over a painter, and the suite's first request."""
    suite = Suite.model_validate(SUITE)
    settings = {"home": tmp_path, "generator": {"model": "eval_parts:painter"}}
    async with open_harness(suite, load_settings(settings), lvlm=lvlm or Scripted()) as harness:
        yield harness, harness.reuse.generator, suite.requests[0]


async def test_what_an_arm_lacked_is_made_the_next_time(tmp_path):
    async with painted(tmp_path) as (harness, painter, request):
        painter.fail = lambda number: ValueError("bad weather") if number == 1 else None
        first = await harness.run(ARMS["best_of_n"], request, 1)
        assert (first.failure, len(first.made)) == (None, 5)
    async with painted(tmp_path) as (harness, painter, request):
        again = await harness.run(ARMS["best_of_n"], request, 1)
        assert again.failure is None and len(again.made) == 6 and len(painter.requests) == 1
        assert again.run_id == f"{first.run_id}.2"
        assert all(one.reward is not None for one in again.made)
        assert {one.sha256 for one in first.made} < {one.sha256 for one in again.made}
    async with painted(tmp_path) as (harness, painter, request):
        third = await harness.run(ARMS["best_of_n"], request, 1)
        assert (third.run_id, painter.requests) == (again.run_id, [])


async def test_equal_work_is_done_once_however_many_ask_at_a_time(tmp_path):
    lvlm = Scripted()
    async with painted(tmp_path, lvlm) as (harness, painter, request):
        names = ["base", "best_of_n", "rewrite", "rewrite_best_of_n", "loop", "loop", "teacher"]
        arms = [ARMS[name] for name in names]
        rows = await asyncio.gather(
            *(
                arm.answer(harness, request, 1, arm.name) if arm.answer else harness.run(arm, request, 1)
                for arm in arms
            )
        )
        assert rows[4] is rows[5]
        made = {one.sha256 for row in rows for one in row.made}
        assert len(painter.requests) == len({(it.prompt, it.seed) for it in painter.requests})
        assert len(painter.requests) == harness.reuse.fresh >= len(made)
        calls = len(lvlm.calls)
    # A home that knows the pictures but not the runs: another seed of the same models asks for other pictures.
    async with painted(tmp_path, lvlm) as (harness, painter, request):
        arm = replace(ARMS["best_of_n"], name="again")
        row = await harness.run(arm, request, 1)
        assert row.run_id != rows[1].run_id and (painter.requests, len(lvlm.calls)) == ([], calls)
        assert [one.sha256 for one in row.made] == [one.sha256 for one in rows[1].made]
        assert row.cost == rows[1].cost


async def test_a_rewrite_is_not_taken_from_several_of_another_arm(tmp_path):
    lvlm = Scripted()
    async with painted(tmp_path, lvlm) as (harness, _painter, request):
        several = replace(ARMS["loop"], name="several", options={"proposals": 3, "rounds": 1})
        row = await harness.run(several, request, 1)
        assert len({one.prompt for one in row.made}) > 1
        asked = lvlm.calls["rewriter"]
        await harness.run(ARMS["rewrite"], request, 1)
        assert lvlm.calls["rewriter"] == asked + 1


async def test_an_image_whose_file_is_gone_is_made_again(tmp_path):
    async with painted(tmp_path) as (harness, painter, request):
        first = await harness.run(ARMS["base"], request, 1)
        gone = first.made[0]
        gone.path.unlink()
    async with painted(tmp_path) as (harness, painter, request):
        row = await harness.run(replace(ARMS["base"], name="again"), request, 1)
        assert [one.seed for one in painter.requests] == [gone.seed]
        assert [one.sha256 for one in row.made] == [one.sha256 for one in first.made]


async def test_a_base_without_a_critic_hands_over_its_images(tmp_path):
    down = Scripted(fail=lambda role, number: ValueError("gone"))
    async with painted(tmp_path, down) as (harness, _, request):
        row = await harness.run(ARMS["base"], request, 1)
        assert (row.failure, len(row.handed_over)) == (None, 3)
        assert (await harness.run(ARMS["best_of_n"], request, 1)).failure


async def test_a_round_without_any_image_fails_an_arm_that_selects(tmp_path):
    async with painted(tmp_path) as (harness, painter, request):
        painter.fail = lambda number: ValueError("bad weather") if number > 2 else None
        row = await harness.run(ARMS["best_of_n"], request, 1)
        assert "bad weather" in (row.failure or "") and not row.handed_over and len(row.made) == 3
    async with painted(tmp_path) as (harness, painter, request):
        again = await harness.run(ARMS["best_of_n"], request, 1)
        assert (again.run_id, again.failure, len(painter.requests)) == (row.run_id, None, 3)


def test_an_arm_is_named_by_its_settings(options, tmp_path):
    options.arms = ["base", "loop"]
    options.more_arms = [
        "bright=rewriter=eval_parts:Bright,rewrite_first=true,rounds=1",
        "short=rounds=2,images=2,exhaust=true",
        "quick=generator.steps=1,rewriter=keep,rounds=1",
    ]
    document, outcome = evaluate(options, tmp_path / "out", lvlm=Scripted())
    assert list(document["arms"]) == ["base", "loop", "bright", "short", "quick"]
    assert document["arms"]["short"]["settings"] == {"loop": {"rounds": 2, "images": 2, "exhaust": True}}
    rows = {name: [row for row in outcome.rows if row.arm == name] for name in document["arms"]}
    assert all(row.prompt.startswith("bright ") and len(row.handed_over) == 3 for row in rows["bright"])
    assert all((len(row.made), len(row.handed_over)) == (4, 1) for row in rows["short"])
    steps = {label: about["steps"] for label, about in document["generators"].items()}
    assert steps == {"": 2, '{"generator": {"steps": 1}}': 1}
    assert {one.sha256 for row in rows["quick"] for one in row.made}.isdisjoint(
        one.sha256 for row in rows["base"] for one in row.made
    )


def test_a_run_of_an_evaluation_can_be_resumed(options, lvlm, tmp_path):
    from emoloop.cli import app
    from typer.testing import CliRunner

    options.arms, options.limit = ["base"], 1
    options.settings = {**options.settings, "lvlm": {"model": str(lvlm), "max_tokens": 400}}
    document, outcome = evaluate(options, tmp_path / "out")
    words = ["resume", outcome.rows[0].run_id, "--home", document["home"], "--out", str(tmp_path / "run")]
    result = CliRunner().invoke(app, [*words, "--json"], catch_exceptions=False)
    assert json.loads(result.stdout)["run_id"] == outcome.rows[0].run_id, result.stderr


def test_a_reward_that_fails_is_a_failure_of_the_arm(options, tmp_path):
    options.arms = ["base", "best_of_n"]
    options.settings = {**options.settings, "loop": {"reward": "eval_parts:odd"}}
    with pytest.raises(Failure, match=r"'best_of_n' failed on all 4 requests: round .* reward odd gave nan"):
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


def test_a_child_makes_its_share(options, monkeypatch):
    from emoloop.evals import evaluate as module

    seen = []

    async def noted(suite, settings, arms, judge, guard, shard):
        seen.append((suite.name, [arm.name for arm in arms], shard))

    words = json.dumps({**asdict(options), "arms": ["base"], "shard": [1, 2]}, default=str)
    monkeypatch.setattr(module, "run", noted)
    monkeypatch.setattr(sys, "argv", ["evaluate", words])
    module.main()
    assert seen == [("tiny", ["base"], (1, 2))]
    monkeypatch.setattr(sys, "argv", ["evaluate", words.replace("base", "bsae")])
    with pytest.raises(SystemExit, match="unknown arm 'bsae'"):
        module.main()


def test_a_users_arm_by_dotted_path(options, tmp_path):
    options.arms = ["base", "twice=eval_parts:twice"]
    document, outcome = evaluate(options, tmp_path / "out", lvlm=Scripted())
    assert document["arms"]["twice"]["delivered"] == 4
    assert {row.prompt for row in outcome.rows if row.arm == "twice"} == {
        "bright a dog by the sea",
        "bright a cat on a hill",
    }


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"arms": ["lop"]}, "unknown arm 'lop'"),
        ({"arms": ["adapter"]}, "--adapter DIR"),
        ({"arms": ["mine=nowhere"]}, "no adapter at"),
        ({"arms": ["mine=adapter=nowhere"]}, "no adapter at"),
        ({"arms": ["mine=rewriter=nobody"]}, "unknown rewriter"),
        ({"arms": ["mine=ruonds=2"]}, "ruonds"),
        ({"arms": ["mine=rounds=0"]}, "rounds"),
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
    words = ["eval", str(suite), "--arms", "base", "--arm", "other=rewriter=keep,rounds=1", "--limit", "1"]
    words += ["--json", "--model"]
    words += [options.settings["generator"]["model"], "--lvlm", str(lvlm)]
    words += ["--home", str(tmp_path / "home"), "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(app, words, catch_exceptions=False)
    assert result.exit_code == 0, result.stderr
    document = json.loads(result.stdout)
    assert list(document["arms"]) == ["base", "other"]
    assert document["command"].endswith("--arms base --arm other=rewriter=keep,rounds=1")
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


async def test_arms_learn_from_the_log_beside_theirs_and_not_from_each_other(options):
    settings, suite = load_settings(options.settings), Suite.model_validate(SUITE)
    async with open_harness(suite, settings, lvlm=Scripted()) as harness:
        assert harness.loop.parts.knowledge.store is None
    with open_store(settings):
        pass
    async with open_harness(suite, settings, lvlm=Scripted()) as harness:
        known = harness.loop.parts.knowledge.store
        assert known is not None and known.home == settings.home != harness.loop.parts.recorder.store.home


def test_each_bar_counts_its_own_to_the_end_also_with_arms_on_other_models(options, tmp_path):
    options.arms, options.more_arms = ["base"], ["slow=generator.steps=3,rounds=1"]
    progress = Progress(disable=True)
    evaluate(options, tmp_path / "out", progress, lvlm=Scripted())
    assert all(task.completed == task.total for task in progress.tasks)
    read = ["readings by eval_parts:Light", "readings by eval_parts:Guard"]
    assert [task.description for task in progress.tasks] == ["requests × arms", *read, *read]
