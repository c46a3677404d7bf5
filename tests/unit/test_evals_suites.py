"""Suites: the format, its errors, and that seeds and identities never move."""

import pytest
import yaml
from emoloop.domain import EmotionTarget, UserError
from emoloop.evals.suites import Request, Suite, load_suite, shipped

SMALL = {
    "name": "small",
    "version": 1,
    "arms": ["base", "loop"],
    "blocks": [
        {
            "prompts": ["a dog", "a cat"],
            "targets": [{"valence": 2, "arousal": -1}, {"category": "awe"}],
            "grid": {"valence": [-1.5, 1.5], "arousal": [0]},
            "sweeps": [{"axis": "arousal", "values": [-2, 0, 2], "other": 1.5}],
        }
    ],
}


def test_a_block_is_prompts_times_targets_without_repeats():
    suite = Suite.model_validate(SMALL)
    # 2 listed + 2 of the grid + 3 of the sweep, of which (1.5, 0) is in the grid already
    assert len(suite.requests) == 2 * 6
    assert len({request.id for request in suite.requests}) == 12


def test_prompts_by_kind():
    block = {"prompts": {"place": ["a dog by the sea"], "bare": ["a cat"]}, "targets": [{"valence": 2}]}
    block["prompts"]["paraphrase"] = ["by the sea, a dog"]
    suite = Suite.model_validate(SMALL | {"blocks": [block]})
    assert suite.kinds == {"a dog by the sea": "place", "a cat": "bare", "by the sea, a dog": "paraphrase"}
    assert suite.restated == {"by the sea, a dog": "a dog by the sea"}
    assert [request.prompt for request in suite.limited(2).requests] == ["a dog by the sea", "a cat"]
    assert suite.limited(2).kinds == {"a dog by the sea": "place", "a cat": "bare"}


def test_an_open_axis_in_a_sweep():
    block = {"prompts": ["a dog"], "sweeps": [{"axis": "valence", "values": [-1, 0, 1], "other": None}]}
    suite = Suite.model_validate(SMALL | {"blocks": [block]})
    assert [request.target.point for request in suite.requests] == [(-1, None), (0, None), (1, None)]


def test_identity_and_seed_are_frozen():
    request = Request(prompt="a dog by the sea", target=EmotionTarget(valence=2, arousal=-1))
    assert request.id == "f8e7dabf5928"
    suite = Suite.model_validate(SMALL)
    assert suite.seed_of("a dog by the sea") == 305186830
    assert suite.seed_of("a dog by the sea") != suite.seed_of("a cat")
    assert 0 <= suite.seed_of("a cat") < 2**31


def test_the_hash_follows_requests_and_budget_but_not_the_choice_of_arms():
    suite = Suite.model_validate(SMALL)
    assert Suite.model_validate(SMALL | {"arms": ["base"], "about": "words"}).sha256 == suite.sha256
    assert Suite.model_validate(SMALL | {"images": 4}).sha256 != suite.sha256


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"colour": 1}, "colour"),
        ({"arms": ["base", "base"]}, "twice"),
        ({"blocks": [{"prompts": ["a"]}]}, "targets"),
        ({"blocks": [{"prompts": [""], "targets": [{"valence": 1}]}]}, "prompts"),
        ({"blocks": [{"prompts": ["a"], "targets": [{"valence": 7}]}]}, "valence"),
    ],
)
def test_a_wrong_field_is_one_line_that_names_it(tmp_path, change, named):
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(SMALL | change))
    with pytest.raises(UserError, match=named) as caught:
        load_suite(path)
    assert "\n" not in str(caught.value)


def test_unknown_names_and_files(tmp_path):
    with pytest.raises(UserError, match="no suite 'nowhere'"):
        load_suite("nowhere")
    (tmp_path / "bad.yaml").write_text("name: [")
    with pytest.raises(UserError, match="not YAML"):
        load_suite(tmp_path / "bad.yaml")
    (tmp_path / "latin.yaml").write_bytes("name: caf\xe9".encode("latin-1"))
    with pytest.raises(UserError, match="not UTF-8"):
        load_suite(tmp_path / "latin.yaml")


def test_adapters_and_ledger_are_found_from_the_suites_file(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(SMALL | {"adapters": {"opd": "weights/opd"}, "ledger": "../read.jsonl"}))
    assert load_suite(path).ledger == tmp_path.resolve().parent / "read.jsonl"
    assert load_suite(path).sha256 == Suite.model_validate(SMALL).sha256
    assert load_suite(path).adapters["opd"] == (tmp_path / "weights" / "opd").resolve()


@pytest.mark.parametrize("name", shipped())
def test_shipped_suites_are_named_after_their_files(name):
    suite = load_suite(name)
    assert suite.name == name
    assert suite.about


def test_the_miniatures_health_is_judged_on_the_loops_requests():
    loop, health = load_suite("loop"), load_suite("miniature")
    assert health.requests == loop.requests
    assert [health.seed_of(r.prompt) for r in health.requests] == [
        loop.seed_of(r.prompt) for r in loop.requests
    ]


def test_the_grid_has_the_papers_size():
    suite = load_suite("emoticrafter")
    assert len(suite.requests) == 132 * 25
    assert suite.judge is None  # whoever steers must not judge, so the user names one


@pytest.mark.parametrize("name", ["loop", "distill", "shortcut", "miniature"])
def test_miniature_suites_use_words_that_the_world_knows(name):
    from emoloop.miniature import world

    for request in load_suite(name).requests:
        assert set(request.prompt.split()) <= set(world.words()), request.prompt
        assert world.parse(request.prompt).subject is not None
