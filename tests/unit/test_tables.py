"""Tables in the docs equal what the committed results say."""

import json
from pathlib import Path

import pytest
import tables
from eval_rows import document_of, outcome_of

ROOT = Path(tables.__file__).resolve().parent.parent


@pytest.mark.parametrize("page", tables.pages(ROOT), ids=lambda page: page.name)
def test_committed_tables_are_up_to_date(page):
    text = page.read_text(encoding="utf-8")
    assert tables.filled(text, ROOT / "docs" / "results") == text, "run: python tests/tables.py"


@pytest.fixture
def results(tmp_path):
    arms = {
        "base": (2.4, 0.9, 0.9, 0.1),
        "rewrite_best_of_n": (1.0, 0.9, 0.4, 0.7),
        "loop": (0.5, 0.9, 0.4, 0.9),
    }
    document = document_of(outcome_of(tmp_path / "home", arms))
    document["measures"] = {
        "judge_valence_mae": {"value": 0.1, "low": 0.05, "high": 0.15, "n": 9, "clusters": 9}
    }
    (tmp_path / "planted.json").write_text(json.dumps(document))
    return tmp_path, document


def block(suite, kind, inside="old\n"):
    return f"before\n<!-- results: {suite} {kind} -->\n{inside}<!-- /results -->\nafter\n"


def test_a_table_is_made_of_the_document(results):
    folder, document = results
    text = tables.filled(block("planted", "arms"), folder)
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    found = document["arms"]["loop"]["metrics"]["error"]
    assert f"| `loop` | {found['value']:.2f} ({found['low']:.2f} to {found['high']:.2f})" in text
    assert tables.filled(text, folder) == text
    widths = {line.replace("\\|", "").count("|") for line in text.splitlines() if line.startswith("|")}
    assert len(widths) == 1


def test_gain_and_health(results):
    folder, document = results
    assert document["verdict"] in tables.filled(block("planted", "gain"), folder)
    assert "| judge valence mae | 0.100 | 0.050 to 0.150 | 9 |" in tables.filled(
        block("planted", "health"), folder
    )


def test_results_that_are_not_there_are_said_to_be_missing(tmp_path):
    assert "No results are committed yet" in tables.filled(block("loop", "arms"), tmp_path)


def test_an_unknown_kind_is_an_error(results):
    with pytest.raises(ValueError, match="no table of kind"):
        tables.filled(block("planted", "pie"), results[0])
