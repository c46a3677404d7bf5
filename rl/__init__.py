"""Offline distillation: the log teaches the diffusion weights.

`dataset` turns runs into examples, `objectives` are the losses, `policy` is the model in its several voices,
`trainer` the loop, `distill` the whole job. Nothing here imports the graph: what a training job needs to know
about the loop stands in the log.
"""
