"""The phrasebook: what is an addition, what the reader expects, and which additions are chosen."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from emoloop.domain import Critique, EmotionTarget, UserError
from emoloop.evals.lookup import Planner
from emoloop.rl.config import DataConfig, load_config
from emoloop.rl.data.dataset import Dataset
from emoloop.rl.data.examples import source_for
from emoloop.rl.data.phrasebook import Tried, build
from emoloop.rl.distill import objective_of
from emoloop.rl.rollouts import LogRollouts
from emoloop.tools.reward import load_reward
from emoloop.tools.words import addition
from emoloop.traces.store import open_store
from rl_log import run_events, settings_for

#: What each word adds, and a prompt's own part.
EFFECTS = {"bright": (1.5, 0.5), "dark": (-1.5, 0.0), "storm": (-0.5, 1.5), "calm": (0.5, -1.5)}
PLACES = {"": 0.0, " in town": -0.4, " in snow": 0.4, " in rain": -0.2, " in mud": -0.3, " in hay": 0.3,
          " in sand": 0.2, " in woods": 0.1}  # fmt: skip
NEUTRAL = {f"a {it}{place}": (shift, 0.0) for it in ("dog", "cat", "boat", "house", "owl", "tent")
           for place, shift in PLACES.items()}  # fmt: skip


def law(neutral: str, added: str) -> tuple[float, float]:
    parts = [NEUTRAL[neutral], *(EFFECTS.get(word, (0.0, 0.0)) for word in added.replace(",", " ").split())]
    valence, arousal = np.clip(np.sum(parts, axis=0), -3, 3)
    return float(valence), float(arousal)


def tried(additions: tuple[str, ...]) -> list[Tried]:
    rounds = [Tried(neutral, neutral, *NEUTRAL[neutral], 1.0) for neutral in NEUTRAL]
    return rounds + [Tried(n, f"{n}{a}", *law(n, a), 0.9) for n, a in product(NEUTRAL, additions)]


@pytest.mark.parametrize(
    ("neutral", "refined", "added"),
    [
        ("a dog", "a dog in bright light", " in bright light"),
        ("A dog ", "a  dog, golden hour", ", golden hour"),
        ("a dog", "a dogged cat", None),
        ("a dog", "a bright dog", None),
        ("a dog", "a dog", None),
        ("a dog", "a dog ...", None),
    ],
)
def test_what_an_addition_is(neutral: str, refined: str, added: str | None) -> None:
    assert addition(neutral, refined) == added


def test_the_chosen_additions_reach_the_targets() -> None:
    rounds = tried((", bright", ", dark", ", storm", ", calm", ", bright bright", " in snow, bright"))
    targets = np.array([[1.5, 0.5], [-1.5, np.nan], [np.nan, 1.5], [0.5, -1.5]])
    book = build(rounds, targets, 4)
    assert set(book.phrases) == {", bright", ", dark", ", storm", ", calm"}
    assert book.alignment == pytest.approx(0.9)
    expected = book.expect(["a dog", "a cat in snow"])
    assert expected.shape == (2, 4, 2)
    place = book.phrases.index(", dark")
    assert expected[1, place] == pytest.approx(law("a cat in snow", "dark"), abs=0.2)
    # A place is what other prompts are about, so an addition that names one stays out however useful.
    assert all("snow" not in phrase for phrase in build(rounds, targets, 99).phrases)
    assert len(build(rounds, targets, 1).phrases) == 1
    # What prompts name that nobody refined is free: they are there to be told of what was added to others.
    wishes = [Tried(it, it, 0.0, 0.0, 1.0) for it in ("a dog with a bright kite", "an owl in a storm")]
    assert build(rounds + wishes, targets, 4).phrases == book.phrases


def test_what_a_phrase_is_feared_to_miss() -> None:
    book = build(tried((", bright", ", dark")), np.array([[1.5, 0.5], [-1.5, 0.0]]), 2)
    targets = np.array([[[1.0, np.nan]], [[0.5, 2.0]], [[np.nan, np.nan]]])
    expected = book.expect(["a dog", "a cat in mud"])
    found = book.misses(expected, targets)
    assert found.shape == (3, 2, 2)
    assert found[0] == pytest.approx(np.abs(expected[..., 0] - 1.0) + book.doubt[:, 0])
    assert found[1] == pytest.approx((np.abs(expected - [0.5, 2.0]) + book.doubt).sum(-1))
    assert (found[2] == 0).all()
    # Of two that are expected to do the same, the one that the reader was right about.
    rounds = tried((", bright", ", dark", ", storm", ", calm"))
    odd = [it._replace(valence=3.0) if it.prompt.endswith("a tent, bright") else it for it in rounds]
    odd = [it for it in odd if ", bright" not in it.prompt or it.neutral == "a tent"]
    odd += [Tried("a dog", "a dog, bright !", *law("a dog", "bright"), 1.0)]
    assert build(odd, np.array([[1.5, 0.5]]), 1).phrases == (", bright !",)


def test_rewrites_that_add_nothing_are_an_error() -> None:
    rounds = [Tried(n, n.upper() + " " * 3, 0.0, 0.0, 1.0) for n in NEUTRAL]
    with pytest.raises(UserError, match="phrases=0"):
        build(rounds, np.zeros((3, 2)), 4)


def test_each_prompt_is_told_what_was_added_to_others(tmp_path: Path) -> None:
    settings = settings_for(tmp_path)
    with open_store(settings) as store:
        for run, neutral in enumerate(NEUTRAL):

            def reading(round_: int, index: int, neutral: str = neutral) -> tuple[float, float]:
                return law(neutral, f"bright {round_}" if round_ else "")

            target = EmotionTarget(valence=1.5, arousal=round(-1 + 0.05 * run, 2))
            store.append(*run_events(store, run, prompt=neutral, target=target, reading=reading))
        plain = Dataset(LogRollouts(store), DataConfig(held_out=0.2))
        dataset = Dataset(
            LogRollouts(store), DataConfig(held_out=0.2, phrases=3, phrase_targets=5, min_gain=0.05)
        )
    assert plain.statistics.phrasebook == {} and not len(plain.examples("phrases", "held_out"))
    assert dataset.statistics.data_hash == plain.statistics.data_hash
    assert dataset.statistics.sources | {"phrases": {}} == plain.statistics.sources | {"phrases": {}}
    splits = {split: dataset.examples("phrases", split) for split in ("train", "held_out")}
    assert dataset.statistics.phrasebook == {" bright 1": sum(map(len, splits.values()))}
    book, reward = dataset.phrasebook, load_reward("emotion")
    assert book is not None
    for split, examples in splits.items():
        shown = examples.fetch(range(len(examples)))
        runs = len({it.run_id for it in shown})
        # Each run's own target first; the same prompts with others' after that.
        bests = plain.examples("bests", split)
        own = {it.run_id: it.target.point for it in bests.fetch(range(len(bests)))}
        assert len({it.run_id for it in shown[: runs // 2]}) == runs // 2
        assert all(it.target.point == pytest.approx(own[it.run_id]) for it in shown[: runs // 2])
        assert any(it.target.point != pytest.approx(own[it.run_id]) for it in shown)
        for it in shown[::7]:
            assert it.refined == f"{it.prompt} bright 1" and it.image is None
            valence, arousal = book.expect([it.prompt])[0, 0]
            hit = Critique(valence=valence, arousal=arousal, category=None, alignment=1.0)
            unaided = Critique(valence=NEUTRAL[it.prompt][0], arousal=0.0, category=None, alignment=1.0)
            gain = reward(hit, it.target) - reward(unaided, it.target)
            assert it.advantage == pytest.approx(gain, abs=1e-5) and gain > 0.05


def test_of_a_large_log_a_part_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("emoloop.rl.data.phrasebook._RUNS", 30)
    monkeypatch.setattr("emoloop.rl.data.phrasebook._TOLD", 40)
    settings = settings_for(tmp_path)
    with open_store(settings) as store:
        for run, neutral in enumerate(NEUTRAL):

            def reading(round_: int, index: int, neutral: str = neutral) -> tuple[float, float]:
                return law(neutral, f"bright {round_}" if round_ else "")

            target = EmotionTarget(valence=1.5, arousal=0.5)
            store.append(*run_events(store, run, prompt=neutral, target=target, reading=reading))
        dataset = Dataset(LogRollouts(store), DataConfig(held_out=0, phrases=3))
        shown = dataset.examples("phrases").fetch(range(len(dataset.examples("phrases"))))
    assert len(shown) == 40 and len({it.run_id for it in shown}) == 30


def test_a_log_without_what_a_phrasebook_reads_says_what_it_lacks(tmp_path: Path) -> None:
    with open_store(settings_for(tmp_path)) as store:
        for run in range(6):
            store.append(*run_events(store, run, reward=lambda run, round_, index: 0.2 if round_ else None))
        with pytest.raises(UserError, match="no run's round 0 has readings"):
            Dataset(LogRollouts(store), DataConfig(held_out=0, phrases=3))
    with open_store(settings_for(tmp_path / "other")) as store:
        store.append(*run_events(store, 0))
        with pytest.raises(UserError, match="no run outside the held-out prompts has readings"):
            Dataset(LogRollouts(store), DataConfig(held_out=0.999, phrases=3))


def test_phrases_have_no_images_to_learn_from() -> None:
    keys = frozenset({"prompt", "refined", "target", "advantage"})
    assert source_for(keys, DataConfig(phrases=4)) == "phrases"
    assert source_for(keys, DataConfig()) == "pairs" == source_for(keys)
    with pytest.raises(UserError, match="latents"):
        source_for(keys | {"latents"}, DataConfig(phrases=4))
    with pytest.raises(UserError, match="on_policy=1"):
        objective_of(load_config("opd", sets=["data.phrases=4", "objective.on_policy=0.5"]))


def test_a_planner_edits_each_prompt_by_what_the_log_s_words_promise(tmp_path: Path) -> None:
    settings = settings_for(tmp_path)
    with open_store(settings) as store:
        for run, (neutral, word) in enumerate(product(list(NEUTRAL)[::3], EFFECTS)):

            def reading(
                round_: int, index: int, neutral: str = neutral, word: str = word
            ) -> tuple[float, float]:
                return law(neutral, word if round_ else "")

            events = run_events(store, run, prompt=neutral, reading=reading)
            store.append(*(it.model_copy(update=_said(it, neutral, word)) for it in events))
    plan = Planner(settings)
    for neutral in ("a dog", "a cat in snow", "a lighthouse"):
        for word, (valence, arousal) in EFFECTS.items():
            assert plan.edit(neutral, EmotionTarget(valence=valence, arousal=arousal)) == f"{neutral} {word}"
    # An axis that is not wanted decides nothing.
    assert plan.edit("a dog", EmotionTarget(arousal=-1.5)) == "a dog calm"


def _said(event: Any, neutral: str, word: str) -> dict[str, str]:
    refined = getattr(event, "round", 0) and hasattr(event, "prompt")
    return {"prompt": f"{neutral} {word}"} if refined else {}
