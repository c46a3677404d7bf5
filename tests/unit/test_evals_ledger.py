"""A suite with a ledger is read once for a release, and each reading is a line."""

import json

import pytest
from emoloop.domain import UserError
from emoloop.evals.ledger import check, readings, record, release_of
from emoloop.settings import load_settings

RELEASE = {"version": "1.0", "weights": "abc"}
DOCUMENT = {
    "suite": "test",
    "suite_version": 1,
    "suite_sha256": "0" * 64,
    "time": "2026-11-27T12:00:00+00:00",
    "command": "emoloop eval test",
    "n": 160,
    "prompts": 40,
    "judge": {"name": "law"},
    "arms": {"loop": {"metrics": {"error": {"value": 0.5}}}, "down": {"metrics": {}}},
}


def test_a_second_reading_of_a_release_is_refused_unless_one_insists(tmp_path):
    ledger = tmp_path / "docs" / "readings.jsonl"
    check(ledger, "test", RELEASE, again=False)
    assert readings(ledger) == []
    record(ledger, DOCUMENT, RELEASE, again=False)
    with pytest.raises(
        UserError, match=r"'test' was read for emoloop 1.0 with weights abc on 2026-11-27 .*--again"
    ):
        check(ledger, "test", RELEASE, again=False)
    check(ledger, "test", RELEASE, again=True)
    record(ledger, DOCUMENT, RELEASE, again=True)
    assert [line["again"] for line in readings(ledger)] == [False, True]
    assert readings(ledger)[0]["error"] == {"loop": 0.5}
    assert all(json.loads(line) for line in ledger.read_text().splitlines())


@pytest.mark.parametrize("other", [{"version": "1.1"}, {"weights": "def"}])
def test_another_version_or_other_weights_are_another_release(tmp_path, other):
    ledger = tmp_path / "readings.jsonl"
    record(ledger, DOCUMENT, RELEASE, again=False)
    check(ledger, "test", RELEASE | other, again=False)
    check(ledger, "test-sweeps", RELEASE, again=False)


def test_a_release_is_known_by_the_weights_of_all_arms(tmp_path):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "lora.safetensors").write_bytes(b"one")
    (adapter / "README.md").write_text("a card")
    base = load_settings()
    with_adapter = load_settings({"generator": {"adapter": str(adapter)}}, base)
    first, both = release_of([base]), release_of([base, with_adapter])
    assert first["version"] == both["version"] and first["weights"] != both["weights"]
    assert release_of([with_adapter, base]) == both == release_of([base, with_adapter, base])
    (adapter / "README.md").write_text("another card")
    assert release_of([base, with_adapter]) == both
    (adapter / "lora.safetensors").write_bytes(b"two")
    assert release_of([base, with_adapter]) != both
    assert release_of([load_settings({"loop": {"rounds": 5}}, base)]) == first


def test_a_ledger_that_is_none_or_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "broken.jsonl").write_text("{\n")
    with pytest.raises(UserError, match="not a ledger"):
        check(tmp_path / "broken.jsonl", "test", RELEASE, again=False)
    with pytest.raises(UserError, match="cannot be written"):
        check(tmp_path / "broken.jsonl" / "readings.jsonl", "test", RELEASE, again=False)
