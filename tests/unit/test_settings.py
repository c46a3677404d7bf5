"""Settings: one resolved answer whatever the source, refusals of one line, and no secret in any of them."""

import os
import sys

import pytest
from emoloop.cli.options import overrides, read_where
from emoloop.domain import UserError
from emoloop.graph.loop import open_loop
from emoloop.rl.config import DistillConfig
from emoloop.settings import load_settings, read_set
from emoloop.tools import registry
from emoloop.tools.urls import redact


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.upper().startswith("EMOLOOP_")]:
        monkeypatch.delenv(name)
    return tmp_path


def test_a_home_is_expanded_and_absolute_from_every_source(here, monkeypatch):
    monkeypatch.setenv("HOME", str(here))
    assert load_settings().home == here / ".emoloop"
    assert load_settings({"home": "~/a"}).home == here / "a"
    monkeypatch.setenv("EMOLOOP_HOME", "~/b")
    assert load_settings().home == here / "b"
    resolved = load_settings()
    monkeypatch.chdir("/")
    assert load_settings({}, resolved).home == here / "b"
    with pytest.raises(UserError, match="no such user"):
        load_settings({"home": "~nobody-of-this-name/x"})


def test_none_is_a_value_and_wins_over_the_environment(here, monkeypatch):
    monkeypatch.setenv("EMOLOOP_GENERATOR__ADAPTER", "from-the-environment")
    assert load_settings().generator.adapter == "from-the-environment"
    bare = load_settings({"generator": {"adapter": None}})
    assert bare.generator.adapter is None
    # Resolved settings do not meet the environment again.
    assert open_loop(bare).settings.generator.adapter is None
    assert open_loop(bare, loop={"rounds": 2}).settings.generator.adapter is None
    assert open_loop(loop={"rounds": 2}).settings.generator.adapter == "from-the-environment"
    assert open_loop(generator={"adapter": None}).settings.generator.adapter is None


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(
    "key",
    [
        "generator.adapter_scale",
        "generator.guidance",
        "generator.batch_window_ms",
        "lvlm.temperature",
        "lvlm.timeout",
        "loop.tolerance",
        "loop.node_timeout",
    ],
)
def test_numbers_are_finite(key, value):
    section, _, name = key.partition(".")
    with pytest.raises(UserError, match=name):
        load_settings({section: {name: value}})
    with pytest.raises(UserError, match=name):
        load_settings({section: {name: value}}, load_settings())


def test_variables_of_kubernetes_are_no_settings(monkeypatch):
    for name, value in {
        "EMOLOOP_SERVICE_HOST": "10.0.0.7",
        "EMOLOOP_SERVICE_PORT": "80",
        "EMOLOOP_SERVICE_PORT_HTTP": "80",
        "EMOLOOP_PORT": "tcp://10.0.0.7:80",
        "EMOLOOP_PORT_80_TCP": "tcp://10.0.0.7:80",
        "EMOLOOP_PORT_80_TCP_PROTO": "tcp",
        "EMOLOOP_VIEWER_PORT_80_UDP_ADDR": "10.0.0.7",
    }.items():
        monkeypatch.setenv(name, value)
    load_settings()
    monkeypatch.setenv("EMOLOOP_LOOP__RUONDS", "3")
    with pytest.raises(UserError, match="EMOLOOP_LOOP__RUONDS"):
        load_settings()


@pytest.mark.parametrize(
    ("variable", "value"),
    [("EMOLOOP_LOOP", "fast"), ("EMOLOOP_LOOP", "[1]"), ("EMOLOOP_CONFIG", "gone.toml")],
)
def test_a_variable_that_cannot_be_read_is_one_line(monkeypatch, variable, value):
    monkeypatch.setenv(variable, value)
    with pytest.raises(UserError) as caught:
        load_settings()
    assert "\n" not in str(caught.value)


def test_a_file_in_another_encoding_is_one_line(here):
    (here / "emoloop.toml").write_bytes("# café".encode("latin-1"))
    with pytest.raises(UserError, match=r"emoloop\.toml.*UTF-8"):
        load_settings()


def test_a_secret_is_in_no_message(monkeypatch):
    for given in (
        {"lvlm": {"api_key": ["s3cret"]}},
        {"lvlm": {"api_key": {"a": "s3cret"}}},
        {"traces": {"database_url": 5.5, "otlp_endpoint": ["http://u:s3cret@h"]}},
        {"lvlm": ["s3cret"]},
    ):
        with pytest.raises(UserError) as caught:
            load_settings(given)
        assert "s3cret" not in str(caught.value) and "5.5" not in str(caught.value)
    with pytest.raises(UserError) as caught:
        read_set(["lvlm.max_tokens=[s3cret"])
    assert "s3cret" not in str(caught.value)
    assert (
        redact("see http://me:pa@ss@host/v1 and https://x.org") == "see http://***@host/v1 and https://x.org"
    )


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("lvlm.api_key=12345", "12345"),
        ("generator.negative_prompt=1984", "1984"),
        ("generator.negative_prompt=true", "true"),
        ("generator.negative_prompt=a: b", "a: b"),
        ("generator.adapter=1e5", "1e5"),
        ("generator.adapter=null", None),
        ('lvlm.api_key="x=y"', "x=y"),
        ("generator.dtype=float16", "float16"),
        ("lvlm.timeout=60", 60.0),
        ("lvlm.temperature=1e-2", 0.01),
        ("loop.rounds=2", 2),
        ("loop.review=true", True),
        ("generator.steps=null", None),
    ],
)
def test_the_setting_decides_how_its_word_is_read(word, value):
    section, _, key = word.partition("=")[0].partition(".")
    settings = load_settings(overrides({"set_": [word]}))
    assert getattr(getattr(settings, section), key) == value


def test_words_of_other_models_are_read_alike():
    assert read_set(["train.lr=1e-4", "objective.beta=0.5", "model=7"], DistillConfig) == {
        "train": {"lr": 1e-4},
        "objective": {"beta": 0.5},
        "model": "7",
    }


def test_conditions_are_read_and_refused_in_one_line():
    where = read_where(["gain=0.2,emotion=awe", "valence=-1..2", "run=a+b", "run=c"], default_limit=50)
    assert (where.min_gain, where.category, where.valence, where.limit) == (0.2, "awe", (-1.0, 2.0), 50)
    assert where.run_ids == ("a", "b", "c")
    for word in ("status=interrupted", "since=99999999999d", "colour=red", "gain"):
        with pytest.raises(UserError, match="--where"):
            read_where([word])


def test_a_dotted_path_sees_the_current_folder(here, monkeypatch):
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry not in ("", str(here))])
    (here / "mine_of_this_folder.py").write_text("def flat(critique, target):\n    return 0.5\n")
    assert registry.resolve("mine_of_this_folder:flat", {})(None, None) == 0.5
