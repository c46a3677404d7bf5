"""Rows of an evaluation with planted effects, for tests that need no model."""

from __future__ import annotations

import numpy as np
from emoloop.domain import Candidate, Critique, EmotionTarget, Round, RunResult
from emoloop.evals.records import Cost, Outcome, Reading, Row
from emoloop.evals.suites import Request
from emoloop.traces.blobs import BlobStore
from PIL import Image

CORNERS = [EmotionTarget(valence=v, arousal=a) for v in (-2, 2) for a in (-1, 1)]
SWEEP = [EmotionTarget(valence=v, arousal=0) for v in (-2, 0, 2)]


def row(arm, request, readings, guards=None, rewards=None, blobs=None):
    """A row whose images are named after their place, or are real where there are blobs."""
    guards = guards or [None] * len(readings)
    rewards = rewards or [None] * len(readings)
    shots = []
    for place, reward in enumerate(rewards):
        name = f"{arm}{request.id}{place}"
        if blobs is not None:
            shade = sum(name.encode()) % 256
            name = blobs.put_image(Image.new("RGB", (16, 16), (shade, 128, 255 - shade)))
        critique = (
            None if reward is None else Critique(valence=0, arousal=0, alignment=1, analysis="it is calm")
        )
        shots.append(
            Candidate(
                round=0,
                index=place,
                sha256=name,
                prompt=request.prompt,
                seed=place,
                reward=reward,
                critique=critique,
            )
        )
    run = run_of(
        request, [Round(prompt=request.prompt, changes="light", why="brighter", candidates=shots)], arm
    )
    cost = Cost(images=1, rewrites=1, tokens=15)
    return Row(arm, request, run, shots, cost, readings=readings, guard=guards)


def run_of(request, rounds, arm="loop"):
    """A completed run of a request."""
    return RunResult(
        run_id=f"eval-{arm}-{request.id}",
        status="completed",
        stop_reason="rounds_used",
        prompt=request.prompt,
        target=request.target,
        rounds=rounds,
    )


def off(target, by, **more):
    """A reading that misses the target by so much in valence."""
    away = np.sign(target.valence) or 1
    valence = float(np.clip(target.valence - by * away, -3, 3))
    return Reading(valence=valence, arousal=target.arousal, **more)


def rows_of(arms, prompts=12, noise=0.2, seed=0, targets=None, blobs=None):
    """arm → (mean error, alignment, spread over seeds, reward), with a prompt's own part shared by all arms."""
    rng = np.random.default_rng(seed)
    made = []
    for number in range(prompts):
        own = rng.normal(0, 0.3)
        for target in targets or CORNERS:
            request = Request(prompt=f"thing {number}", target=target)
            for arm, (miss, aligned, spread, reward) in arms.items():
                misses = np.abs(miss + own * miss + rng.normal(0, noise * max(miss, 0.1), 2))
                readings = [off(target, m, subject_right=True) for m in misses]
                guards = [
                    Reading(
                        alignment=float(aligned + rng.normal(0, 0.01)),
                        features=[1.0, spread * (-1) ** i, 0.0],
                    )
                    for i in range(2)
                ]
                rewards = [float(reward + rng.normal(0, 0.02)) for _ in range(2)]
                made.append(row(arm, request, readings, guards, rewards, blobs))
    return made


def outcome_of(home, arms, sweep=False, prompts=4):
    """An outcome over real pictures."""
    rows = rows_of(arms, prompts=prompts, targets=SWEEP if sweep else None, blobs=BlobStore(home / "blobs"))
    order = list(arms)
    rows.sort(key=lambda row: order.index(row.arm))
    pace = {"image": 0.1, "critique": 0.02, "rewrite": 0.5}
    return Outcome(
        rows, home, {"": {"model": "tiny", "device": "cpu"}}, {"reward": ["emotion", "1"]}, 8, 1.0, pace
    )


def document_of(outcome, trained=()):
    """The report's document over an outcome."""
    from emoloop.evals.arms import Arm
    from emoloop.evals.document import Options, Plan, describe
    from emoloop.evals.judges import PixelJudge
    from emoloop.evals.suites import Suite
    from emoloop.settings import load_settings
    from eval_parts import Light

    requests = list(dict.fromkeys(row.request for row in outcome.rows))
    arms = list(dict.fromkeys(row.arm for row in outcome.rows))
    blocks = [{"prompts": [request.prompt], "targets": [request.target.model_dump()]} for request in requests]
    suite = Suite.model_validate(
        {"name": "planted", "version": 1, "about": "planted effects", "arms": arms, "blocks": blocks}
    )
    plan = Plan(
        suite,
        load_settings(),
        [
            Arm(arm, models={"generator": {"adapter": str(outcome.home)}} if arm in trained else {})
            for arm in arms
        ],
        PixelJudge(Light(), "light"),
        None,
        None,
    )
    return describe(plan, outcome, Options("planted"))
