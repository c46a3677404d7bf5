"""Longer experiments on trained weights, run by `emoloop bench`."""
