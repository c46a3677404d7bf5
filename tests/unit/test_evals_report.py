"""The report: complete, self-contained, honest in its wording, and the two reports compare."""

import json
import re
from html.parser import HTMLParser

import pytest
from emoloop.domain import UserError
from emoloop.evals.compare import compare, load_report
from emoloop.evals.report import write_report
from emoloop.evals.wording import interval, number
from eval_rows import document_of, outcome_of

ARMS = {
    "base": (2.4, 0.9, 0.9, 0.1),
    "rewrite": (1.2, 0.9, 0.4, 0.5),
    "best_of_n": (2.0, 0.9, 0.9, 0.3),
    "rewrite_best_of_n": (1.0, 0.9, 0.4, 0.7),
    "loop": (0.5, 0.9, 0.4, 0.9),
    "opd": (0.7, 0.9, 0.4, 0.8),
}


class Page(HTMLParser):
    """Tags and text of a page; fails on a tag that is closed wrongly."""

    VOID = frozenset({"meta", "link", "img", "br", "line", "circle", "rect", "path"})

    def __init__(self, html):
        super().__init__()
        self.open, self.tags, self.ids, self.links, self.words = [], [], set(), [], []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        for key, value in attrs:
            if key == "id":
                self.ids.add(value)
            if key in ("src", "href"):
                self.links.append(value)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def written(tmp_path, arms=ARMS, name="out", **changes):
    outcome = outcome_of(tmp_path / "home", arms)
    document = {**document_of(outcome, trained=["opd"] if "opd" in arms else []), **changes}
    out = tmp_path / name
    out.mkdir()
    write_report(document, outcome, out)
    return document, out, (out / "report.html").read_text()


def test_the_page_is_whole_and_loads_nothing(tmp_path):
    document, _, html = written(tmp_path)
    page = Page(html)
    assert {"arms", "gain", "cost", "planes", "cases", "made", "pairs"} <= page.ids
    assert "script" not in page.tags
    assert all(link.startswith("data:") for link in page.links)
    assert "http" not in re.sub(r"<pre>.*?</pre>", "", html, flags=re.S).replace("http-equiv", "")
    text = " ".join(page.words)
    for arm in ARMS:
        assert arm in text
    assert document["verdict"] in text
    assert "nan" not in text.lower().split() and "None" not in text
    for run in document["arms"]["loop"]["runs"]:
        assert run in text


def test_the_page_warns_in_red(tmp_path):
    _, _, html = written(tmp_path, reward_judge="critic-x")
    assert re.search(r'class="alarm">The judge also gave the reward \(critic-x\)', html)
    assert "data-flag" not in html  # the honest adapter


def test_a_planted_cheat_is_on_the_page(tmp_path):
    _, _, html = written(tmp_path, {**ARMS, "opd": (2.5, 0.9, 0.4, 1.2)})
    assert 'data-flag="judge"' in html and "reward hacking" in html


def test_words_of_prompts_cannot_break_the_page(tmp_path):
    _, _, html = written(tmp_path, about="<script>alert(1)</script>")
    assert "<script" not in html


def test_json_and_csv_hold_every_row(tmp_path):
    document, out, _ = written(tmp_path)
    stored = json.loads((out / "report.json").read_text())
    assert stored["figures"] == document["figures"]
    assert len(stored["rows"]) == len((out / "report.csv").read_text().splitlines()) - 1
    assert {row["arm"] for row in stored["rows"]} == set(ARMS)


def test_sweeps_become_strips(tmp_path):
    outcome = outcome_of(tmp_path / "home", {"base": ARMS["base"], "opd": ARMS["opd"]}, sweep=True)
    out = tmp_path / "out"
    out.mkdir()
    write_report(document_of(outcome, trained=["opd"]), outcome, out)
    page = Page((out / "report.html").read_text())
    assert "sweeps" in page.ids
    assert "τ valence" in " ".join(page.words)


def test_numbers_for_people():
    assert number(None) == "–"
    assert number(-1.234) == "\N{MINUS SIGN}1.23"
    assert number(-0.001, 2, sign=True) == "0.00"
    assert number(0.5, 1, sign=True) == "+0.5"
    assert interval({"low": None, "high": None}) == "–"
    assert interval({"low": -1.0, "high": 2.0}, 1) == "\N{MINUS SIGN}1.0 to 2.0"


def test_two_reports_compare_pairwise(tmp_path):
    _, a, _ = written(tmp_path, name="a")
    _, b, _ = written(tmp_path, {**ARMS, "loop": (0.3, 0.9, 0.4, 0.9)}, name="b", suite_sha256="other")
    found = compare(load_report(a), load_report(b / "report.json"))
    by = {(row["arm"], row["metric"]): row for row in found["changes"]}
    loop = by["loop", "error"]
    assert (
        loop["value"] == pytest.approx(loop["b"] - loop["a"]) and loop["high"] < 0 and loop["better"] is True
    )
    assert by["base", "error"]["value"] == 0 and by["base", "error"]["better"] is None
    assert any("suites differ" in warning for warning in found["warnings"])


def test_what_is_no_report_is_refused(tmp_path):
    with pytest.raises(UserError, match="no report at"):
        load_report(tmp_path / "nowhere")
    (tmp_path / "report.json").write_text("{}")
    with pytest.raises(UserError, match="not a report of"):
        load_report(tmp_path)
