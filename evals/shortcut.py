"""Both sides of the affective shortcut (Emotion-Director, arXiv 2512.19479), over all answers of one arm.

The semantic side: how far apart the judge reads the pictures of one neutral prompt that were made for different
targets. The expressive side looks at what the arm's prompts add to the neutral ones, since these are alike by the
suite's own making: distinct-n (Li et al. 2016), self-BLEU (Zhu et al., Texygen, 2018), the share of the commonest
recipes, and words that nobody can draw.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from itertools import combinations, pairwise

from ..agents.rewriters.mc_agent.drawable import undrawable
from ..tools.words import addition
from .metrics import mean
from .records import Row

#: Longest n-gram of self-BLEU: an addition has a dozen words.
_LONGEST = 3

#: So many of the commonest recipes count.
_COMMONEST = 3


def added(row: Row) -> list[str]:
    """The words that an answer's prompt adds to the neutral one; all of them, where it is said otherwise."""
    more = addition(row.request.prompt, row.prompt)
    same = row.prompt == row.request.prompt
    return re.findall(r"\w+", ("" if same else row.prompt if more is None else more).casefold())


def of_rows(rows: Sequence[Row]) -> list[dict[str, float | None]]:
    """For each row of an arm: its share of what only all of them together have.

    `distinct_2` is made of sums: `new_bigrams` over `bigrams`; a bigram that stands in k places counts 1/k in each.
    """
    texts = [added(row) if row.handed_over else [] for row in rows]
    grams = [list(pairwise(text)) for text in texts]
    seen = Counter(gram for row in grams for gram in row)
    recipes = [frozenset(text) for text in texts]
    common = {it for it, _ in Counter(it for it in recipes if it).most_common(_COMMONEST)}
    blue = self_bleu(texts)
    apart = sensitivity(rows)
    return [
        {
            "sensitivity": apart.get(row.request.prompt),
            "new_bigrams": sum(1 / seen[gram] for gram in own) if text else None,
            "bigrams": float(len(own)) if text else None,
            "self_bleu": alike,
            "recipe_share": float(recipe in common) if text else None,
            "drawability_violations": float(_violations(row)) if row.handed_over else None,
        }
        for row, text, own, recipe, alike in zip(rows, texts, grams, recipes, blue, strict=True)
    ]


def sensitivity(rows: Sequence[Row]) -> dict[str, float | None]:
    """Neutral prompt → mean distance, in points of valence and arousal, between what its targets were read as."""
    read: defaultdict[str, list[tuple[float, float]]] = defaultdict(list)
    for row in rows:
        valence = mean(it.valence for it in row.readings if it)
        arousal = mean(it.arousal for it in row.readings if it)
        if valence is not None and arousal is not None:
            read[row.request.prompt].append((valence, arousal))
    return {prompt: mean(math.dist(a, b) for a, b in combinations(it, 2)) for prompt, it in read.items()}


def self_bleu(texts: Sequence[Sequence[str]]) -> list[float | None]:
    """BLEU of each text against all others, in [0, 1]: 1 says nothing of its own. None for an empty one.

    Geometric mean of the clipped precisions of n-grams up to `_LONGEST`, with one added to hits and counts above
    unigrams (Lin and Och 2004), and the brevity penalty against the nearest length.
    """
    some = [text for text in texts if text]
    if len(some) < 2:
        return [None] * len(texts)
    best: list[dict[tuple[str, ...], list[int]]] = []
    for n in range(1, _LONGEST + 1):
        # The two highest counts of each n-gram: a text's own must not be its reference.
        top: defaultdict[tuple[str, ...], list[int]] = defaultdict(list)
        for text in some:
            for gram, count in _counted(text, n).items():
                top[gram] = sorted([*top[gram], count], reverse=True)[:2]
        best.append(top)
    lengths = Counter(map(len, some))
    return [_bleu(text, best, lengths) if text else None for text in texts]


def _bleu(
    text: Sequence[str], best: Sequence[dict[tuple[str, ...], list[int]]], lengths: Counter[int]
) -> float:
    logs: list[float] = []
    for n, top in enumerate(best, 1):
        own = _counted(text, n)
        hits = sum(min(count, _without(top[gram], count)) for gram, count in own.items())
        more = n > 1
        if not hits + more:
            return 0.0
        logs.append(math.log((hits + more) / (own.total() + more)))
    others = lengths - Counter([len(text)])
    near = min(others, key=lambda it: (abs(it - len(text)), it))
    return math.exp(min(0.0, 1 - near / len(text)) + sum(logs) / len(logs))


def _without(top: Sequence[int], own: int) -> int:
    """The highest count in another text."""
    rest = list(top)
    if own in rest:
        rest.remove(own)
    return max(rest, default=0)


def _counted(text: Sequence[str], n: int) -> Counter[tuple[str, ...]]:
    return Counter(tuple(text[place : place + n]) for place in range(len(text) - n + 1))


def _violations(row: Row) -> int:
    own = undrawable(row.request.prompt)
    return sum(word not in own for word in undrawable(row.prompt))
