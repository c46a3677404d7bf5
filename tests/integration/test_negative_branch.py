"""An adapter for the negative branch on tiny pipelines of every class: it speaks there, and nowhere else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import emoloop
import numpy as np
import pytest
import rl_log
import tiny
import torch
import visual
from emoloop.domain import EmotionTarget, UserError
from emoloop.rl.config import load_config
from emoloop.rl.distill import distill
from emoloop.settings import GeneratorSettings
from emoloop.tools.diffusion.adapter import load_artifact, save_artifact, unload
from emoloop.tools.diffusion.conditioners import EmotionConditioner
from emoloop.tools.diffusion.families import Conditioning, family_of
from emoloop.tools.images.base import ImageRequest
from emoloop.tools.images.diffusers import DiffusersGenerator
from peft import LoraConfig

GLAD, TENSE = EmotionTarget(valence=2.2, arousal=2.0), EmotionTarget(valence=-2.0, arousal=2.0)

#: What makes each class run a negative branch.
GUIDED: dict[str, dict[str, Any]] = {"flux": {"true_cfg_scale": 3.0}}


def artifact(name: str, folder: Path, seed: int, *, prompts: bool = False, tokens: int = 0) -> Path:
    pipe = tiny.build(name)
    network = family_of(pipe, tiny.DEFAULTS[name]["call"])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network.module.add_adapter(
            LoraConfig(r=4, lora_alpha=8, target_modules=["to_q", "to_v", "to_k"], init_lora_weights=False)
        )
        emotion = EmotionConditioner.for_embeds(network.encode(""), tokens=tokens)
        for parameter in emotion.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    module = visual.stirred(network) if prompts else None
    return save_artifact(folder, pipe, emotion_tokens=emotion, visual_prompts=module, call=network.call)


def draw(
    name: str, target: EmotionTarget | None = GLAD, guidance: float = 3.0, **settings: Any
) -> np.ndarray:
    call = tiny.DEFAULTS[name]["call"] | (GUIDED.get(name, {}) if guidance > 1 else {})
    how = GeneratorSettings(micro_batch=1, guidance=guidance, **settings)
    source = DiffusersGenerator(tiny.build(name), how, defaults=tiny.DEFAULTS[name] | {"call": call})
    made = source._run([ImageRequest("a dog by the sea", 7, target)])[0]
    assert not isinstance(made, Exception), made
    return np.asarray(made.image).astype(int)


@pytest.mark.parametrize("name", tiny.NAMES)
def test_it_moves_the_rows_of_the_negative_branch_alone(name: str, tmp_path: Path) -> None:
    pipe = tiny.build(name)
    it = family_of(pipe, tiny.DEFAULTS[name]["call"])
    text, null = it.encode("a dog"), it.encode(None)
    x = torch.randn(2, *it.latent_shape(32, 32), generator=torch.Generator().manual_seed(1))
    t = it.process().draw(1, torch.Generator().manual_seed(2)).repeat(2)
    hooks = len(it.module._forward_pre_hooks), len(it.module._forward_hooks)
    both = Conditioning.cat([null, text])
    with torch.no_grad():
        base = it.denoise(it.module, x, t, both, 3.0)
        adapter = load_artifact(pipe, artifact(name, tmp_path / "n", 1), negative=True, call=it.call)
        told = [adapter.condition(null, GLAD, negative=True), adapter.condition(text, GLAD)]
        assert torch.equal(told[1].prompt, text.prompt) and not torch.equal(told[0].prompt, null.prompt)
        out = it.denoise(it.module, x, t, Conditioning.cat(told), 3.0)
        assert torch.equal(out[1], base[1]) and not torch.allclose(out[0], base[0], atol=1e-3)
        # Its LoRA speaks without a target too, and what is not marked is positive.
        bare = [adapter.condition(null, None, negative=True), adapter.condition(text, None)]
        bare_out = it.denoise(it.module, x, t, Conditioning.cat(bare), 3.0)
        assert not torch.equal(bare_out[0], base[0]) and not torch.equal(bare_out[0], out[0])
        assert torch.equal(it.denoise(it.module, x, t, both, 3.0), base)
        with pytest.raises(UserError, match="has one for the negative branch already"):
            load_artifact(pipe, tmp_path / "n", negative=True, call=it.call)
        unload(pipe, adapter)
        assert torch.equal(it.denoise(it.module, x, t, both, 3.0), base)
    assert (len(it.module._forward_pre_hooks), len(it.module._forward_hooks)) == hooks


@pytest.mark.parametrize("name", tiny.NAMES)
def test_strength_zero_or_no_guidance_is_the_base_to_the_bit(name: str, tmp_path: Path) -> None:
    path = str(artifact(name, tmp_path / "n", 1, tokens=2))
    base = draw(name)
    against = draw(name, negative_adapter=path)
    assert not np.array_equal(against, base)
    assert np.array_equal(draw(name, negative_adapter=path), against)
    assert not np.array_equal(draw(name, TENSE, negative_adapter=path), against)
    assert np.array_equal(draw(name, negative_adapter=path, negative_scale=0), base)
    unguided = draw(name, guidance=1.0)
    assert np.array_equal(draw(name, None, guidance=1.0, negative_adapter=path), unguided)


@pytest.mark.parametrize("name", tiny.NAMES)
def test_beside_an_adapter_with_visual_prompts_in_a_run_and_in_a_stock_pipeline(
    name: str, tmp_path: Path
) -> None:
    first = artifact(name, tmp_path / "p", 1, prompts=True)
    second = artifact(name, tmp_path / "n", 2)
    both: dict[str, Any] = {"adapter": str(first), "negative_adapter": str(second)}
    glad = draw(name, **both)
    assert not np.array_equal(glad, draw(name, adapter=str(first)))
    guided = draw(name, **both, visual_guidance=2)
    assert not np.array_equal(guided, glad)
    pipe = tiny.build(name)
    call = tiny.DEFAULTS[name]["call"] | GUIDED.get(name, {})
    call |= {"num_inference_steps": 2, "guidance_scale": 3.0, "height": tiny.SIZE, "width": tiny.SIZE}
    call |= {"negative_prompt": ""} if name == "flux" else {}

    def stock() -> np.ndarray:
        made = pipe("a dog by the sea", generator=torch.Generator("cpu").manual_seed(7), **call)
        return np.asarray(made.images[0]).astype(int)

    plain = stock()
    # In whichever order they come.
    for order in ((first, second), (second, first)):
        for r, wanted in ((1.0, glad), (2.0, guided)):
            applied = [
                emoloop.apply(pipe, it, GLAD, visual_guidance=r, negative=it == second) for it in order
            ]
            # To the bit in the generator's order; in the other, what both LoRAs add is summed the other way round.
            assert np.abs(stock() - wanted).max() <= (order[0] == second)
            for it in applied:
                it.remove()
            assert np.array_equal(stock(), plain)


def test_the_record_names_it_and_other_ways_of_running_are_refused(tmp_path: Path) -> None:
    path = str(artifact("sd3", tmp_path / "n", 1))
    how = GeneratorSettings(negative_adapter=path, negative_scale=0.5)
    source = DiffusersGenerator(tiny.build("sd3"), how, defaults=tiny.DEFAULTS["sd3"])
    assert source.negative is not None
    assert source.describe()["adapter"] == f"{source.negative.sha256}@0.5[negative]"
    for more in ({"fuse_lora": True}, {"backend": "onnxruntime"}):
        with pytest.raises(UserError, match="backend eager"):
            DiffusersGenerator(tiny.build("sd3"), GeneratorSettings(negative_adapter=path, **more))


@pytest.mark.parametrize("name", tiny.NAMES)
def test_two_steps_of_reversed_preferences_give_such_an_adapter(name: str, tmp_path: Path) -> None:
    folder = tiny.save(name, tmp_path / "model")
    settings = rl_log.write_log(tmp_path / "home", 6, model=str(folder), revision=None)
    sets = [
        "train.steps=2", "train.batch_size=2", "train.tensorboard=false", "train.device=cpu", "train.lr=0.05",
        "guard.every=0", "policy.rank=4", "policy.alpha=8", "data.held_out=0", "train.warmup=0",
    ]  # fmt: skip
    result = distill(settings, load_config("npo", sets=sets), tmp_path / "out")
    assert result.outcome.steps == 2
    path = str(tmp_path / "out")
    base = draw(name)
    assert not np.array_equal(draw(name, negative_adapter=path), base)
    assert np.array_equal(draw(name, negative_adapter=path, negative_scale=0), base)
