"""All arms of the suites `dev` and `test` on the embedded models, as small as they get."""

import asyncio
import json
import shutil
from pathlib import Path

import emoloop
import pytest
import yaml
from emoloop.domain import UserError
from emoloop.evals.document import Options
from emoloop.evals.evaluate import evaluate, plan
from emoloop.evals.suites import load_suite
from emoloop.graph.loop import open_loop

ADAPTER = Path(emoloop.__file__).parent / "miniature" / "adapters" / "opd"
ARMS = [*load_suite("test").arms, "lookup", "planner", "tokens_of_opd", "lora_of_opd"]
SUITE = {
    "name": "small",
    "version": 1,
    "about": "a prompt and what it says in other words",
    "images": 2,
    "rounds": 2,
    "arms": ARMS,
    "adapters": {"opd": str(ADAPTER)},
    "judge": "law",
    "guard": "guard",
    "ledger": "readings.jsonl",
    "blocks": [
        {
            "prompts": {
                "place": ["a dog by the sea with a balloon"],
                "paraphrase": ["with a balloon, a puppy at the shore"],
            },
            "targets": [{"valence": -1.5, "arousal": 1.0}],
        }
    ],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A home whose log holds one run, and the suite."""
    folder = tmp_path_factory.mktemp("arms")
    (folder / "small.yaml").write_text(yaml.safe_dump(SUITE))

    async def collect():
        async with open_loop(home=folder / "home", loop={"rounds": 2, "images": 1}) as loop:
            return await loop.run("a cat in the snow", {"valence": 2, "arousal": 1}, seed=3)

    collected = asyncio.run(collect())
    return folder, collected


@pytest.fixture(scope="module")
def report(folder):
    where, _ = folder
    return evaluate(Options(str(where / "small.yaml"), settings={"home": where / "home"}), where / "out")


def test_each_arm_does_what_it_is_named_for(report, folder):
    document, outcome = report
    assert all(arm["delivered"] == 2 and not arm["failures"] for arm in document["arms"].values())
    rows = {arm: [row for row in outcome.rows if row.arm == arm] for arm in (*ARMS, "opd")}
    assert all(not row.handed_over and row.readings[0].valence == 0 for row in rows["constant"])
    for row in rows["diverse_best_of_n"]:
        prompts = [one.prompt for one in row.made]
        assert len(prompts) == len(set(prompts)) == 4 and row.request.prompt not in prompts
    added = {
        one.prompt.removeprefix("a cat in the snow") for round in folder[1].rounds for one in round.candidates
    }
    assert all(row.prompt.removeprefix(row.request.prompt) in added - {""} for row in rows["lookup"])
    shots = {
        arm: {one.sha256 for row in rows[arm] for one in row.made}
        for arm in ("base", "opd", "tokens_of_opd", "lora_of_opd")
    }
    assert len(set.union(*shots.values())) == sum(map(len, shots.values())) == 4 * 4
    adapters = {
        row.made[0].adapter.rpartition(":")[2]
        for arm in ("tokens_of_opd", "lora_of_opd")
        for row in rows[arm]
    }
    assert adapters == {"tokens", "lora"}
    # What the tokens do is nearly all that the adapter does.
    flat = document["figures"]
    assert abs(flat["tokens_of_opd_error"] - flat["opd_error"]) < abs(
        flat["lora_of_opd_error"] - flat["opd_error"]
    )


def test_the_report_has_the_figures(report, folder):
    document, outcome = report
    flat = document["figures"]
    assert flat["constant_error"] == pytest.approx(2.5)
    for arm in ("best_of_n", "rewrite_best_of_n", "diverse_best_of_n", "loop", "loop_on_opd"):
        assert flat[f"{arm}_error_at_4"] == pytest.approx(flat[f"{arm}_error"])
        assert 1 <= flat[f"{arm}_images_to_target"] <= 4
        assert flat[f"{arm}_error_at_1"] >= 0 and f"{arm}_error_at_8" not in flat
        assert 0 <= flat[f"{arm}_content_kept"] <= 1 and flat[f"{arm}_drift"] >= 0
        row = next(row for row in outcome.rows if row.arm == arm)
        seen, read = row.handed_over[0].critique, row.readings[0]
        misses = [abs(it.valence + 1.5) + abs(it.arousal - 1.0) for it in (read, seen)]
        assert next(it for it in rows_of(folder, arm))["estimate_bias"] == pytest.approx(
            misses[0] - misses[1]
        )
    assert {
        "gain_feedback",
        "gain_feedback_low",
        "gain_feedback_at_1",
        "gain_variety",
        "loop_paraphrase_gap",
    } <= flat.keys()
    assert set(document["kinds"]) == {"place", "paraphrase"}
    page = (folder[0] / "out" / "report.html").read_text()
    assert 'id="curves"' in page and page.count("<polyline") == len(document["arms"]) and 'id="kinds"' in page


def rows_of(folder, arm):
    stored = json.loads((folder[0] / "out" / "report.json").read_text())
    return [row for row in stored["rows"] if row["arm"] == arm]


def test_a_release_is_read_once(report, folder, tmp_path):
    where, _ = folder
    options = Options(str(where / "small.yaml"), settings={"home": where / "home"})
    with pytest.raises(UserError, match=r"'small' was read for emoloop .*--again"):
        evaluate(options, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    options.again = True
    document, _ = evaluate(options, tmp_path / "out")
    assert (document["images_made"], document["figures"]) == (0, report[0]["figures"])
    lines = [json.loads(line) for line in (where / "readings.jsonl").read_text().splitlines()]
    assert [line["again"] for line in lines] == [False, True]
    assert lines[0]["error"]["loop"] == pytest.approx(report[0]["figures"]["loop_error"])


def test_lookup_needs_a_log(folder, tmp_path):
    options = Options(str(folder[0] / "small.yaml"), settings={"home": tmp_path / "home"})
    with pytest.raises(UserError):
        plan(options)
    assert not (tmp_path / "home").exists()


def test_an_ablation_crosses_generators_critics_and_the_loop(folder):
    given = {"adapters": {"flow": ADAPTER}, "critic": "miniature"}
    ready = plan(Options("emofeedback", **given))
    assert ready.suite.requests == load_suite("test").requests
    loops = ["loop", "loop_on_opd", "loop_on_flow"]
    wanted = ["base", "opd", "flow", *loops, *(f"{loop}+critic" for loop in loops)]
    assert [arm.name for arm in ready.arms] == wanted
    with pytest.raises(UserError, match="--critic MODEL"):
        plan(Options("dev", arms=["loop+critic"]))

    where, _ = folder
    tuned = where / "tuned"
    shutil.copytree(ADAPTER.parents[1] / "weights" / "lvlm", tuned)
    small = SUITE | {"name": "crossed", "cross": True, "arms": ["base"], "rounds": 1, "ledger": None}
    (where / "crossed.yaml").write_text(yaml.safe_dump(small))
    options = Options(
        str(where / "crossed.yaml"), critic=str(tuned), settings={"home": where / "home"}, limit=1
    )
    document, _ = evaluate(options, where / "crossed")
    arms = document["arms"]
    assert list(arms) == ["base", "opd", "loop", "loop_on_opd", "loop+critic", "loop_on_opd+critic"]
    assert arms["loop_on_opd+critic"]["settings"]["lvlm"] == {"model": str(tuned)}
    # The same weights by another name: the same pictures, read anew.
    assert document["figures"]["loop+critic_error"] == document["figures"]["loop_error"]
