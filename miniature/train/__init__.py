"""Recipes: each rebuilds one model of the miniature from nothing.

    python -m emoloop.miniature.train generator|lvlm|judge|guard [--steps N] [--minutes M] [--out DIR]

Seeded, check-pointed every few minutes, resumed by the same command; batch `i` is drawn from (seed, i), so that
a resumed run sees what an undisturbed one would have seen.
"""
