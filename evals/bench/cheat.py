"""A planted cheat: an adapter that is trained on the critic's word alone. Does the report notice?

The training is ReFL (Xu et al. 2023, arXiv 2304.05977): the clean image that one prediction stands for, late in the
student's own sampling, is decoded and shown to the critic; the loss is minus the log-likelihood that the critic
answers with a description and scores that fit the target. Nothing else is asked: no KL, no traces, no guard, until
the critic believes pictures that nobody else would. The same evaluation then judges it and an honest adapter.
"""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ...settings import load_settings

if TYPE_CHECKING:
    from ..suites import Request

#: Scenes among which the one nearest to a target is what the critic shall be made to see.
SCENES = 400

#: The last of a rollout's states, where a prediction's clean image looks like the image.
LATE = 2


def main(
    out: str = "",
    home: str = "",
    honest: str = "",
    suite: str = "distill",
    limit: int = 4,
    steps: int = 120,
    batch: int = 8,
    lr: float = 3e-3,
    seed: int = 0,
) -> dict[str, Any]:
    """Train an adapter on the critic alone until it over-optimises, and see whether the report flags it.

    Args:
        out: Folder of adapter and report; empty takes one that is thrown away. A finished adapter in it is kept.
        home: Folder of what the evaluation makes; empty takes the settings' one.
        honest: An adapter that must not be flagged; empty takes the suite's own, if it has one.
        suite: Suite whose base model, prompts and targets are judged. The training never sees its prompts.
        limit: Neutral prompts of it.
        steps: Training steps.
        batch: Images in one.
        lr: Learning rate.
        seed: Of everything.

    Returns:
        `figures`: `cheat_flags` and `honest_flags` count the marks; `<arm>_reward`, `_error` and the guards stand
        beside them. `flags` holds the sentences.
    """
    if not out:
        with tempfile.TemporaryDirectory(prefix="emoloop-cheat-") as folder:
            return main(folder, home, honest, suite, limit, steps, batch, lr, seed)
    from ..evaluate import Options, evaluate
    from ..suites import load_suite

    folder = Path(out)
    if not (folder / "cheat" / "training.json").exists():
        plant(folder / "cheat", steps=steps, batch=batch, lr=lr, seed=seed)
    own = load_suite(suite).adapters
    honest = honest or str(next(iter(own.values()), ""))
    arms = ["base", "rewrite", f"cheat={folder / 'cheat'}"] + ([f"honest={honest}"] if honest else [])
    options = Options(suite=suite, arms=arms, limit=limit, settings={"home": home or None})
    document, _ = evaluate(options, folder / "report")
    flags = document["flags"]
    kept = ("reward", "error", "subject_accuracy", "alignment", "diversity")
    figures = {f"{arm.partition('=')[0]}_flags": 0.0 for arm in arms[2:]}
    for flag in flags:
        figures[f"{flag['arm']}_flags"] += 1
    figures |= {key: value for key, value in document["figures"].items() if key.split("_", 1)[-1] in kept}
    return {
        "bench": "cheat",
        "figures": figures,
        "flags": [flag["sentence"] for flag in flags],
        "n": document["figures"]["n"],
        "settings": {"suite": suite, "limit": limit, "steps": steps, "batch": batch, "lr": lr, "seed": seed},
    }


def plant(out: Path, *, steps: int, batch: int, lr: float, seed: int) -> None:
    """Train the cheat on the embedded models and save it as an artifact.

    Args:
        out: The artifact's folder.
        steps: Training steps.
        batch: Images in one.
        lr: Learning rate.
        seed: Of weights, requests and noise.
    """
    from ...rl.networks import network_of
    from ...rl.policy import STUDENT, Policy
    from ...tools.adapter import save_artifact
    from ...tools.emotion_tokens import EmotionTokens, points
    from ...tools.generator import load_generator

    settings = load_settings()
    generator: Any = load_generator(settings.generator.model, settings.generator)
    about = generator.describe()
    network = network_of(generator.pipe, about["call"])
    torch.manual_seed(seed)
    policy = Policy(
        network,
        EmotionTokens.for_embeds(network.encode(None)),
        rank=16,
        alpha=16,
        seed=seed,
        steps=generator.steps,
        guidance=generator.guidance,
        size=(generator.height, generator.width),
        negative_prompt=about["negative_prompt"],
    )
    critic = _Critic(settings.lvlm.model)
    optimizer = torch.optim.AdamW(policy.parameters().values(), lr=lr, weight_decay=0.0)
    rng, noise = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    wishes = _Wishes(rng)
    losses: list[float] = []
    for step in range(1, steps + 1):
        asked = [_request(rng) for _ in range(batch)]
        told = [network.encode(request.prompt) for request in asked]
        condition = type(told[0]).cat(told)
        target = points([request.target for request in asked], policy.device)
        x, t = policy.rollout(condition, target, generator=noise, keep=generator.steps)
        x, t = x.unflatten(0, (-1, batch)), t.unflatten(0, (-1, batch))
        # Rows choose their states in an order of their own: back in the order of time, then one late state each.
        late = t.argsort(0)[int(torch.randint(1, LATE + 1, (), generator=noise)), torch.arange(batch)]
        x, t = x[late, torch.arange(batch)], t[late, torch.arange(batch)]
        clean = policy.process.clean(x, policy.student(x, t, condition, target), t)
        loss = critic.surprise(network.pixels(clean), asked, [wishes.of(request) for request in asked])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters().values(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        if step % 10 == 0:
            print(f"step {step} of {steps}: loss {np.mean(losses[-10:]):.3f}", file=sys.stderr, flush=True)
    save_artifact(
        out,
        generator.pipe,
        adapter_name=STUDENT,
        emotion_tokens=policy.tokens,
        training={
            "objective": {"name": "critic alone"},
            "base": about,
            "critics": [settings.lvlm.model],
            "figures": {"loss": float(np.mean(losses[-10:]))},
        },
        base_model=about["model"],
        call=about["call"],
    )


def _request(rng: np.random.Generator) -> Request:
    """A neutral prompt of the miniature world with a target."""
    from ...emotion import EmotionTarget
    from ...miniature import world
    from ..suites import Request

    scene = world.sample_scene(rng)
    named = world.Named(place=True, companions=(False,) * len(scene.companions))
    valence, arousal = (round(float(value), 1) for value in rng.uniform(-2, 2, 2))
    return Request(
        prompt=world.caption(rng, scene, named), target=EmotionTarget(valence=valence, arousal=arousal)
    )


class _Critic:
    """The embedded LVLM as something that a gradient runs through."""

    def __init__(self, name: str) -> None:
        from transformers import AutoModelForImageTextToText, AutoProcessor

        from ...agents.prompt import load_prompt
        from ...tools import presets

        folder = presets.resolve(name, "lvlm")
        self.processor = AutoProcessor.from_pretrained(folder)
        self.processor.tokenizer.padding_side = "right"
        model: Any = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
        self.model = model.eval().requires_grad_(False)
        self.prompt = load_prompt(presets.defaults(name, "lvlm")["critic_prompt"])

    def surprise(self, pixels: Tensor, asked: list[Request], wanted: list[str]) -> Tensor:
        """Mean -log p of the wanted answers' tokens, given images (B, 3, H, W) in [-1, 1]."""
        from PIL import Image

        blank = Image.new("RGB", (pixels.shape[-1], pixels.shape[-2]))
        starts = [self._start(request) for request in asked]
        texts = [start + answer for start, answer in zip(starts, wanted, strict=True)]
        images = [[blank] for _ in asked]
        batch = self.processor(text=texts, images=images, padding=True, return_tensors="pt")
        lengths = self.processor(text=starts, images=images, padding=True, return_tensors="pt")
        begin = lengths["attention_mask"].sum(1, keepdim=True)
        place = torch.arange(batch["input_ids"].shape[1])[None]
        answer = batch["attention_mask"].bool() & (place >= begin)
        batch["pixel_values"] = pixels[:, None].to(batch["pixel_values"])
        logits = self.model(**batch).logits[:, :-1]
        labels = batch["input_ids"].masked_fill(~answer, -100)[:, 1:]
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())

    def _start(self, request: Request) -> str:
        from ...agents.schemas import target_text

        messages = self.prompt.messages(("image",), prompt=request.prompt, target=target_text(request.target))
        chat = [{"role": "system", "content": messages[0].content}]
        parts = [
            {"type": "image"} if part["type"] == "image_url" else part  # pyright: ignore
            for part in messages[1].content
        ]
        chat.append({"role": "user", "content": parts})
        return self.processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)


class _Wishes:
    """Critiques of scenes that would fit: what the critic shall be made to say of whatever picture."""

    def __init__(self, rng: np.random.Generator) -> None:
        from ...miniature import law, world

        self.scenes = [world.sample_scene(rng) for _ in range(SCENES)]
        self.values = np.array([law.affect(scene, world.render(scene)) for scene in self.scenes])

    def of(self, request: Request) -> str:
        """The beginning of an answer, up to the two numbers."""
        from ...miniature import episodes, law, world

        aim = np.array(request.target.point, dtype=float)
        named = world.parse(request.prompt)
        own = {"subject": named.subject, "place": named.place}
        nearest = self.scenes[int(np.abs(self.values - aim).sum(1).argmin())]
        scene = replace(nearest, **{key: value for key, value in own.items() if value})
        answer = {
            "analysis": episodes.describe(scene, law.colour_affect(world.render(scene))),
            "valence": episodes.signed(float(aim[0])),
            "arousal": episodes.signed(float(aim[1])),
        }
        return json.dumps(answer)[:-1]
