"""The known scorers on tiny random weights of their own classes, as rewards and as judges."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tiny_clip
import torch
import yaml
from emoloop import EmotionTarget, open_loop
from emoloop.domain import UserError
from emoloop.evals.document import Options
from emoloop.evals.evaluate import evaluate
from emoloop.evals.judges import Item, conflict, load_judge, reward_sources
from emoloop.events import Rewarded
from emoloop.settings import load_settings
from emoloop.tools.reward import load_reward
from emoloop.tools.scorers import as_transformers
from emoloop.traces.blobs import BlobStore
from painter import Painter
from PIL import Image
from scripted import Scripted
from torch.nn.functional import normalize
from transformers import AutoProcessor, CLIPModel

TARGET = EmotionTarget(valence=2, arousal=-1)
PROMPTS = ["a dog", "a cat", "a dog cat"]


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_clip.save(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("head") / "head.pth"
    torch.manual_seed(1)
    layers = torch.nn.Sequential(torch.nn.Linear(12, 4), torch.nn.Dropout(), torch.nn.Linear(4, 1))
    torch.save(layers.state_dict(), file)
    return file


@pytest.fixture(scope="module")
def hps(clip: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model's weights under OpenCLIP's names, as HPSv2's file has them."""
    file = tmp_path_factory.mktemp("hps") / "HPS.pt"
    torch.save({"state_dict": tiny_clip.as_open_clip(CLIPModel.from_pretrained(clip).state_dict())}, file)
    return file


def pictures(size: tuple[int, int] = (16, 16)) -> list[Image.Image]:
    noise = np.random.default_rng(0).integers(0, 255, (3, *size, 3), dtype=np.uint8)
    return [Image.fromarray(it) for it in noise]


@torch.inference_mode()
def embeddings(clip: Path) -> tuple[torch.Tensor, torch.Tensor, float]:
    model, processor = CLIPModel.from_pretrained(clip), AutoProcessor.from_pretrained(clip)
    seen = processor(images=pictures(), return_tensors="pt")
    said = processor(text=PROMPTS, return_tensors="pt", padding=True)
    image, text = model.get_image_features(**seen), model.get_text_features(**said)
    scale = float(model.logit_scale.exp())
    return normalize(image.pooler_output, dim=-1), normalize(text.pooler_output, dim=-1), scale


def scores(spec: str) -> list[float]:
    reward = load_reward(spec)
    assert reward.sees
    return reward.parts[0].call(pictures(), PROMPTS, None, None)


def test_scores_are_what_their_papers_say(clip: Path, head: Path, hps: Path):
    image, text, scale = embeddings(clip)
    cosine = (image * text).sum(-1)
    assert scores(f"clipscore:{clip}") == pytest.approx(cosine.clamp(min=0).tolist(), abs=1e-4)
    assert scores(f"pickscore:{clip}") == pytest.approx((scale * cosine).tolist(), abs=1e-4)
    state = torch.load(head, weights_only=True)
    beauty = (image @ state["0.weight"].T + state["0.bias"]) @ state["2.weight"].T + state["2.bias"]
    assert scores(f"aesthetic:{clip},{head}") == pytest.approx(beauty[:, 0].tolist(), abs=1e-4)


def test_hpsv2_is_its_own_weights_in_the_model_that_was_fine_tuned(clip: Path, hps: Path, tmp_path: Path):
    from emoloop.tools.scorers import HPSv2

    image, text, _ = embeddings(clip)
    base = tiny_clip.save(tmp_path / "base", seed=5)
    scorer = HPSv2(str(hps), str(base))
    assert scorer(pictures(), PROMPTS, None, None) == pytest.approx((image * text).sum(-1).tolist(), abs=1e-4)
    wide = pictures((16, 32))[0]
    assert len(scorer([wide], ["a dog"], None, None)) == 1
    torch.save({"state_dict": {}}, tmp_path / "empty.pt")
    with pytest.raises(UserError, match=r"empty.pt holds no weights of .*base: Error"):
        HPSv2(str(tmp_path / "empty.pt"), str(base))


@torch.inference_mode()
def test_the_names_are_those_of_openclip(tmp_path: Path):
    open_clip = pytest.importorskip("open_clip")
    torch.manual_seed(3)
    theirs = open_clip.CLIP(
        12,
        open_clip.CLIPVisionCfg(layers=2, width=16, head_width=8, patch_size=8, image_size=16, mlp_ratio=1.0),
        open_clip.CLIPTextCfg(context_length=8, vocab_size=8, width=16, heads=2, layers=2, mlp_ratio=1.0),
    ).eval()
    folder = tiny_clip.save(tmp_path, hidden_act="gelu", num_hidden_layers=2)
    ours = CLIPModel.from_pretrained(folder).eval()
    ours.load_state_dict(as_transformers(theirs.state_dict()))
    pixels, ids = (
        torch.randn(2, 3, 16, 16),
        torch.tensor([[1, 4, 2, 7, 0, 0, 0, 0], [1, 5, 7, 0, 0, 0, 0, 0]]),
    )
    ours.text_model.eos_token_id = 7
    image = ours.get_image_features(pixel_values=pixels).pooler_output
    text = ours.get_text_features(input_ids=ids).pooler_output
    assert torch.allclose(image, theirs.encode_image(pixels), atol=1e-5)
    assert torch.allclose(text, theirs.encode_text(ids), atol=1e-5)


def test_versions_tell_weights_apart_and_what_is_not_there_is_said(clip: Path, head: Path, tmp_path: Path):
    other = tiny_clip.save(tmp_path / clip.name, seed=9)
    one, two = (load_reward(f"pickscore:{folder}") for folder in (clip, other))
    assert one.name == two.name == "pickscore"
    assert one.version != two.version and one.version.startswith(f"{clip.name}@")
    with pytest.raises(UserError, match="pickscore: no CLIP model"):
        load_reward(f"pickscore:{tmp_path / 'none'}")
    with pytest.raises(UserError, match="no head at"):
        load_reward(f"aesthetic:{clip},{tmp_path / 'none.pth'}")


async def test_a_loop_is_rewarded_by_a_weighted_sum_of_reading_and_picture(clip: Path, tmp_path: Path):
    spec = {"emotion": 1, f"clipscore:{clip}": 0.5}
    loop = open_loop(
        generator=Painter(), lvlm=Scripted(), reward=spec, home=str(tmp_path), loop={"rounds": 1, "images": 3}
    )
    async with loop:
        result = await loop.run("a dog", TARGET, seed=7)
        events = [e for e in await loop.recorder.events(result.run_id) if isinstance(e, Rewarded)]
        blobs = loop.recorder.store.blobs
        seen = load_reward(f"clipscore:{clip}").parts[0].call
        for candidate in result.rounds[0].candidates:
            mine = {e.name: e for e in events if e.index == candidate.index}
            assert set(mine) == {"emotion", "clipscore", "emotion + 0.5*clipscore"}
            picture = blobs.get_image(candidate.sha256)
            assert mine["clipscore"].value == pytest.approx(
                seen([picture], ["a dog"], None, None)[0], abs=1e-3
            )
            total = mine["emotion"].value + 0.5 * mine["clipscore"].value
            assert candidate.reward == mine["emotion + 0.5*clipscore"].value == pytest.approx(total)
            assert [mine[name].weight for name in mine] == [1, 0.5, None]
            assert mine["clipscore"].version in mine["emotion + 0.5*clipscore"].version


@pytest.mark.parametrize("name, field", [("clipscore", "alignment"), ("pickscore", "preference")])
async def test_a_scorer_judges(clip: Path, tmp_path: Path, name: str, field: str):
    blobs = BlobStore(tmp_path / "blobs")
    items = [
        Item(blobs.put_image(it), blobs, prompt, TARGET)
        for it, prompt in zip(pictures(), PROMPTS, strict=True)
    ]
    judge = load_judge(f"{name}:{clip}", load_settings())
    readings = await judge.read(items)
    assert [getattr(it, field) for it in readings] == scores(f"{name}:{clip}")
    assert all(it is not None and it.valence is None for it in readings)
    assert not judge.sees_target and judge.name == name


def test_a_scorer_that_gave_a_part_of_the_reward_is_no_judge(clip: Path):
    judge = load_judge(f"pickscore:{clip}", load_settings())
    for reward in (f"emotion + 0.5*pickscore:{clip}", "pickscore"):
        assert conflict(judge, reward_sources(load_settings({"loop": {"reward": reward}})))
    assert conflict(judge, reward_sources(load_settings())) is None


def test_an_evaluation_by_a_scorer_has_its_figures_and_no_error_of_emotion(clip: Path, tmp_path: Path):
    suite = {
        **{"name": "tiny", "version": 1, "about": "one prompt", "seed": 3, "images": 2, "rounds": 1},
        **{"arms": ["base", "best_of_n"], "judge": "law"},
        "blocks": [{"prompts": ["a dog"], "targets": [{"valence": 2, "arousal": -1}]}],
    }
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(suite))
    settings = {
        "home": tmp_path / "home",
        "generator": {"model": "eval_parts:painter"},
        "lvlm": {"critic_prompt": "critic", "rewriter_prompt": "rewriter"},
    }
    options = Options(str(path), judge=f"pickscore:{clip}", settings=settings)
    document, _ = evaluate(options, tmp_path / "out", lvlm=Scripted())
    figures = document["figures"]
    assert {"base_preference", "best_of_n_preference"} <= set(figures)
    assert not [name for name in figures if name.endswith("_error")]
    assert "preference" in (tmp_path / "out" / "report.html").read_text()
