"""A planted cheat: an adapter trained on the critic's answers alone. Does the report flag it?

The training is DRaFT-1 (Clark et al. 2024, arXiv 2309.17400): the gradient of the reward runs through the decoder and
the last sampling step. The reward is the log-likelihood that the critic describes a fitting scene and gives the wanted
scores. It starts from an honest adapter and has no other term: no KL, no traces. It ends when a guard, which gives
no gradient, no longer finds the subjects. The same evaluation then judges both adapters.
"""

from __future__ import annotations

import copy
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from numpy.random import Generator as Rng
from PIL import Image
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor

from ...agents.prompt import load_prompt
from ...agents.schemas import target_text
from ...domain import EmotionTarget
from ...miniature import episodes, law, world
from ...miniature.judge import Guard
from ...rl.objectives.base import no_target
from ...rl.policy import PREVIOUS, STUDENT, Policy
from ...settings import load_settings
from ...tools import presets
from ...tools.diffusion.adapter import load_artifact, save_artifact
from ...tools.diffusion.conditioners import points
from ...tools.diffusion.families import Conditioning, family_of
from ...tools.images.load import load_generator
from ...tools.lvlm.chat import to_openai
from ..evaluate import Options, evaluate
from ..suites import Request, load_suite

#: Scenes among which the one nearest to a target is what the critic shall be made to see.
SCENES = 400

#: Steps between two looks at whether it over-optimises, and the images of one.
EVERY, LOOK = 10, 16


def main(
    out: str = "",
    home: str = "",
    honest: str = "",
    suite: str = "distill",
    limit: int = 4,
    steps: int = 400,
    batch: int = 8,
    lr: float = 5e-4,
    until: float = 0.75,
    seed: int = 0,
) -> dict[str, Any]:
    """Train an adapter on the critic alone until it over-optimises, and see whether the report flags it.

    Args:
        out: Folder of adapter and report; empty takes one that is thrown away. A finished adapter in it is kept.
        home: Folder of what the evaluation makes; empty takes the settings' one.
        honest: The adapter to start from, which must not be flagged; empty takes the suite's own.
        suite: Suite whose first block is judged. The training asks for the same targets, never for its prompts.
        limit: Neutral prompts of it.
        steps: Training steps at most.
        batch: Images in one.
        lr: Learning rate.
        until: The training ends when the guard's alignment is at or below this.
        seed: Of everything.

    Returns:
        `figures`: `cheat_flags` and `honest_flags` count the marks; `<arm>_reward`, `_error` and the guards stand
        beside them. `flags` holds the sentences.
    """
    whole = load_suite(suite)
    honest = honest or str(next(iter(whole.adapters.values())))
    first = whole.model_copy(update={"blocks": whole.blocks[:1], "adapters": {}})
    with tempfile.TemporaryDirectory(prefix="emoloop-cheat-") as spare:
        folder = Path(out or spare)
        cheat, judged = folder / "cheat", folder / "suite.yaml"
        if not (cheat / "training.json").exists():
            targets = first.blocks[0].points
            plant(cheat, Path(honest), targets, steps=steps, batch=batch, lr=lr, until=until, seed=seed)
        judged.write_text(yaml.safe_dump(first.model_dump(mode="json")), encoding="utf-8")
        arms = ["base", "rewrite", f"cheat={cheat}", f"honest={honest}"]
        options = Options(suite=str(judged), arms=arms, limit=limit, settings={"home": home or None})
        document, _ = evaluate(options, folder / "report")
        trained = json.loads((cheat / "training.json").read_text(encoding="utf-8"))
    flags = document["flags"]
    figures = {f"{arm}_flags": float(sum(it["arm"] == arm for it in flags)) for arm in ("cheat", "honest")}
    figures["cheat_steps"] = trained["figures"]["steps"]
    kept = ("reward", "error", "subject_accuracy", "alignment", "diversity")
    figures |= {key: value for key, value in document["figures"].items() if key.split("_", 1)[-1] in kept}
    return {"figures": figures, "flags": [flag["sentence"] for flag in flags], "n": document["figures"]["n"]}


def plant(
    out: Path,
    start: Path,
    targets: Sequence[EmotionTarget],
    *,
    steps: int,
    batch: int,
    lr: float,
    until: float = 0.0,
    seed: int,
) -> None:
    """Train the cheat on the embedded models and save it as an artifact.

    Args:
        out: The artifact's folder.
        start: The adapter whose copy it begins with.
        targets: What is asked for; few, so that one pattern for all prompts can succeed.
        steps: Training steps at most.
        batch: Images in one.
        lr: Learning rate.
        until: Ends the training when the guard's alignment is at or below this.
        seed: Of requests and noise.
    """
    settings = load_settings()
    generator: Any = load_generator(settings.generator.model, settings.generator)
    about = generator.describe()
    network = family_of(generator.pipe, about["call"])
    previous = load_artifact(generator.pipe, start, name=PREVIOUS, call=about["call"])
    assert previous.emotion_tokens is not None
    policy = Policy(
        network, copy.deepcopy(previous.emotion_tokens), rank=0, alpha=0, steps=generator.steps,
        guidance=generator.guidance, size=(generator.height, generator.width),
        negative_prompt=about["negative_prompt"], previous=previous,
    )  # fmt: skip
    critic, guard = _Critic(settings.lvlm.model), Guard()
    optimizer = torch.optim.AdamW(policy.parameters().values(), lr=lr, weight_decay=0.0)
    rng, noise = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    answers = _WantedAnswers(rng)
    watched = [_request(rng, targets) for _ in range(LOOK)]

    def told(requests: list[Request]) -> tuple[Conditioning, Tensor]:
        encoded = Conditioning.cat([network.encode(request.prompt) for request in requests])
        return encoded, points([request.target for request in requests], policy.device)

    losses: list[float] = []
    for step in range(1, steps + 1):
        asked = [_request(rng, targets) for _ in range(batch)]
        condition, target = told(asked)
        x, t = policy.rollout(condition, target, generator=noise, keep=generator.steps)
        x, t = x.unflatten(0, (-1, batch)), t.unflatten(0, (-1, batch))
        last = t.argmin(0), torch.arange(batch)
        x, t = x[last], t[last]
        wanted = policy.student(x, t, condition, target)
        untold = policy.student(x, t, policy.null.expand(batch), no_target(batch, x.device))
        clean = policy.process.clean(x, untold + policy.guidance * (wanted - untold), t)
        loss = critic.surprise(network.pixels(clean), asked, [answers.of(request) for request in asked])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters().values(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        if step % EVERY:
            continue
        images = policy.sample(*told(watched), seeds=list(range(LOOK)))
        pairs = zip(images, watched, strict=True)
        alignment = float(np.mean([guard.alignment(image, request.prompt) for image, request in pairs]))
        surprise = float(np.mean(losses[-EVERY:]))
        print(f"step {step}: loss {surprise:.3f}, alignment {alignment:.2f}", file=sys.stderr, flush=True)
        if alignment <= until:
            break
    training = {
        "objective": {"name": "critic alone"},
        "base": about,
        "critics": [settings.lvlm.model],
        "figures": {"loss": float(np.mean(losses[-EVERY:])), "steps": len(losses)},
    }
    save_artifact(
        out, generator.pipe, adapter_name=STUDENT, emotion_tokens=policy.tokens, training=training,
        base_model=about["model"], call=about["call"],
    )  # fmt: skip


def _request(rng: Rng, targets: Sequence[EmotionTarget]) -> Request:
    """A neutral prompt of the miniature world with one of the targets."""
    scene = world.sample_scene(rng)
    named = world.Named(place=True, companions=(False,) * len(scene.companions))
    return Request(prompt=world.caption(rng, scene, named), target=targets[int(rng.integers(len(targets)))])


class _Critic:
    """The embedded LVLM as a differentiable loss on pixels."""

    def __init__(self, name: str) -> None:
        folder = presets.resolve(name, "lvlm")
        self.processor = AutoProcessor.from_pretrained(folder)
        self.processor.tokenizer.padding_side = "right"
        model: Any = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
        self.model = model.eval().requires_grad_(False)
        self.prompt = load_prompt(presets.defaults(name, "lvlm")["critic_prompt"])

    def surprise(self, pixels: Tensor, asked: list[Request], wanted: list[str]) -> Tensor:
        """The critic's loss on the wanted answers.

        Args:
            pixels: (B, 3, H, W), cut to [-1, 1] as a file is.
            asked: B requests.
            wanted: B answers.

        Returns:
            Mean -log p of the answers' tokens.
        """
        blank = Image.new("RGB", (pixels.shape[-1], pixels.shape[-2]))
        starts = [self._start(request) for request in asked]
        texts = [start + answer for start, answer in zip(starts, wanted, strict=True)]
        images = [[blank] for _ in asked]
        batch = self.processor(text=texts, images=images, padding=True, return_tensors="pt")
        lengths = self.processor(text=starts, images=images, padding=True, return_tensors="pt")
        begin = lengths["attention_mask"].sum(1, keepdim=True)
        place = torch.arange(batch["input_ids"].shape[1])[None]
        answer = batch["attention_mask"].bool() & (place >= begin)
        batch["pixel_values"] = pixels.clamp(-1, 1)[:, None].to(batch["pixel_values"])
        logits = self.model(**batch).logits[:, :-1]
        labels, answer = batch["input_ids"][:, 1:], answer[:, 1:]
        return torch.nn.functional.cross_entropy(logits[answer], labels[answer])

    def _start(self, request: Request) -> str:
        messages = self.prompt.messages(("image",), prompt=request.prompt, target=target_text(request.target))
        return self.processor.apply_chat_template(
            to_openai(messages), add_generation_prompt=True, tokenize=False
        )


class _WantedAnswers:
    """Critiques of scenes that fit a target: the answers that the critic is trained towards, for any picture."""

    def __init__(self, rng: Rng) -> None:
        self.scenes = [world.sample_scene(rng) for _ in range(SCENES)]
        self.values = np.array([law.affect(scene, world.render(scene)) for scene in self.scenes])

    def of(self, request: Request) -> str:
        """The beginning of an answer, up to the two numbers."""
        aim = np.array(request.target.point, dtype=float)
        nearest = self.scenes[int(np.abs(self.values - aim).sum(1).argmin())]
        named = world.parse(request.prompt)
        own = {"subject": named.subject, "place": named.place}
        scene = replace(nearest, **{key: value for key, value in own.items() if value})
        # The scores that follow from what is described: a critic hardly gives others.
        return json.dumps(episodes.seen(scene, world.render(scene)))[:-1]
