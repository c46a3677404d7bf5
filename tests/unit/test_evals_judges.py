"""Judges: readers become judges, ratings are pooled, and who gave the reward is found out."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import tiny_clip
import torch
from emoloop.domain import Critique, Emotion, EmotionTarget, Missing, UserError
from emoloop.evals import judges
from emoloop.evals.judges import ClipHeadJudge, HumanJudge, Item, LVLMJudge, PixelJudge, conflict, load_judge
from emoloop.settings import load_settings
from emoloop.traces.blobs import BlobStore
from PIL import Image
from safetensors.torch import save_file

TARGET = EmotionTarget(valence=1, arousal=1)


class Brightness:
    """A reader that knows one thing: how bright the picture is."""

    version = 3

    def read(self, images):
        return [
            SimpleNamespace(
                valence=np.float32(np.asarray(i).mean() / 85 - 1.5), arousal=0, subject="dog", features=[1]
            )
            for i in images
        ]

    def subject_of(self, prompt):
        return next((word for word in ("dog", "cat") if word in prompt), None)

    def alignment(self, image, prompt):
        return 0.5


@pytest.fixture
def items(tmp_path):
    blobs = BlobStore(tmp_path / "blobs")
    return [
        Item(blobs.put_image(Image.new("RGB", (8, 8), (shade,) * 3)), blobs, prompt, TARGET)
        for shade, prompt in ((0, "a dog"), (255, "a cat"), (128, "something"))
    ]


async def test_a_reader_of_pixels_is_a_judge(items):
    judge = PixelJudge(Brightness(), "brightness", batch=2)
    readings = await judge.read(items)
    assert [r.valence for r in readings] == pytest.approx([-1.5, 1.5, 128 / 85 - 1.5], abs=1e-5)
    assert [r.subject_right for r in readings] == [True, False, None]
    assert readings[0].features == [1.0] and readings[0].alignment == 0.5
    assert judge.version == "3"


def test_the_laws_version_is_part_of_its_judges():
    from emoloop.miniature import law

    assert f"law {law.VERSION}" in load_judge("law", load_settings()).version


async def test_a_dotted_path_is_a_judge(items):
    judge = load_judge(f"{__name__}:Brightness", load_settings())
    assert (await judge.read(items))[0].arousal == 0


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("oracle", "unknown judge"),
        ("emoloop.nowhere:Judge", "cannot import"),
        ("emoloop.domain:LOW", "no read"),
        ("human:nowhere.csv", "no ratings"),
        ("clip:model", "ENCODER,HEAD"),
    ],
)
def test_an_unknown_judge_is_one_clear_line(spec, said):
    with pytest.raises(UserError, match=said):
        load_judge(spec, load_settings())


async def test_an_lvlm_judge_leaves_what_it_cannot_read_missing(items):
    class Critic:
        async def critique(self, image, prompt, target):
            if prompt == "something":
                return Missing(reason="timed out")
            return Critique(valence=1.0, arousal=-1.0, alignment=0.7, category=Emotion.AWE)

    readings = await LVLMJudge(Critic(), "LVLM x", "x", "1").read(items)
    assert readings[2] is None
    assert (readings[0].valence, readings[0].category, readings[0].alignment) == (1.0, Emotion.AWE, 0.7)


async def test_human_ratings_are_pooled_over_people(items, tmp_path):
    sha = items[0].sha256
    path = tmp_path / "ratings.csv"
    path.write_text(f"sha256,valence,arousal,category\n{sha},1,,awe\n{sha},2,-1,awe\n{sha},3,,fear\n")
    readings = await HumanJudge(path).read(items)
    assert (readings[0].valence, readings[0].arousal, readings[0].category) == (2.0, -1.0, Emotion.AWE)
    assert readings[1:] == [None, None]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("image,valence\nx,1\n", "sha256"),
        ("sha256,valence\nx,much\n", "line 2"),
        ("sha256,category\nx,joy\n", "joy"),
        ("sha256,valence\nx,1\nx,30\n", "line 3: valence 30 lies outside"),
        ("sha256,arousal\nx,nan\n", "line 2: arousal nan lies outside"),
        ("sha256,alignment\nx,inf\n", "line 2: alignment inf"),
        ("sha256,valance\nx,1\n", "line 1: unknown column 'valance'"),
        ("sha256,valence\nx,1,2\n", "line 2: more values than columns"),
        ("sha256,valence\n,1\n", "line 2: no sha256"),
    ],
)
def test_a_bad_rating_is_named_with_its_line(tmp_path, content, said):
    path = tmp_path / "ratings.csv"
    path.write_text(content)
    with pytest.raises(UserError, match=said):
        HumanJudge(path)


def test_ratings_of_a_spreadsheet_are_read_and_other_encodings_refused(tmp_path):
    path = tmp_path / "ratings.csv"
    path.write_bytes("\ufeffsha256,valence\r\nx,1\r\n".encode())
    assert HumanJudge(path).ratings["x"][0].valence == 1
    path.write_bytes("sha256,valence\né,1\n".encode("latin-1"))
    with pytest.raises(UserError, match="not UTF-8"):
        HumanJudge(path)


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    return tiny_clip.save(tmp_path_factory.mktemp("clip"))


async def test_a_head_of_eight_reads_categories_and_their_prototypes(clip_folder, items, tmp_path):
    weight = torch.zeros(8, 12)
    head = tmp_path / "head.safetensors"
    save_file({"fc.weight": weight, "fc.bias": torch.tensor([0.0, 0, 0, 0, 0, 0, 30, 0])}, head)
    judge = ClipHeadJudge(str(clip_folder), head)
    readings = await judge.read(items)
    assert readings[0].category is Emotion.FEAR
    assert (readings[0].valence, readings[0].arousal) == pytest.approx((-1.6, 1.4), abs=1e-4)
    assert len(readings[0].features) == 12
    assert all(0 <= r.alignment <= 1 for r in readings)


async def test_clip_alignment_equals_torchmetrics(clip_folder, items, tmp_path, monkeypatch):
    from torchmetrics.multimodal import CLIPScore

    save_file({"w.weight": torch.ones(2, 12)}, tmp_path / "head.safetensors")
    judge = ClipHeadJudge(str(clip_folder), tmp_path / "head.safetensors")
    ours = [reading.alignment for reading in await judge.read(items[:2])]
    for kind in ("image", "text"):  # torchmetrics 1.9 expects what transformers 4 gave
        get = getattr(judge.model, f"get_{kind}_features")
        monkeypatch.setattr(judge.model, f"get_{kind}_features", lambda *a, get=get: get(*a).pooler_output)
    score = CLIPScore(model_name_or_path=lambda: (judge.model, judge.processor))
    for item, alignment in zip(items, ours, strict=False):
        image = torch.from_numpy(np.array(item.open())).permute(2, 0, 1)
        score.reset()
        score.update(image, item.prompt)
        assert float(score.compute()) / 100 == pytest.approx(alignment, abs=1e-4)


async def test_clip_iqa_and_an_aesthetic_head_by_hand(clip_folder, items, tmp_path):
    save_file({"w.weight": torch.ones(2, 12)}, tmp_path / "head.safetensors")
    torch.save({"weight": torch.full((1, 12), 2.0), "bias": torch.tensor([1.0])}, tmp_path / "beauty.pth")
    judge = ClipHeadJudge(str(clip_folder), tmp_path / "head.safetensors", tmp_path / "beauty.pth")
    found = (await judge.read(items))[0]
    words = judge.processor(text=["Good photo.", "Bad photo."], return_tensors="pt", padding=True)
    image = judge.processor(images=items[0].open(), return_tensors="pt")
    with torch.inference_mode():
        text = torch.nn.functional.normalize(judge.model.get_text_features(**words).pooler_output, dim=-1)
        picture = torch.nn.functional.normalize(judge.model.get_image_features(**image).pooler_output, dim=-1)
    shares = torch.exp(100 * (picture @ text.T))[0]
    assert found.quality == pytest.approx(float(shares[0] / shares.sum()), abs=1e-4)
    assert found.aesthetic == pytest.approx(2 * float(picture.sum()) + 1, abs=1e-4)


def test_a_head_of_another_shape_is_refused(clip_folder, tmp_path):
    save_file({"w.weight": torch.zeros(3, 12)}, tmp_path / "three.safetensors")
    with pytest.raises(UserError, match="gives 3 numbers; wanted are 12 and 2 or 8"):
        ClipHeadJudge(str(clip_folder), tmp_path / "three.safetensors")
    save_file({"w.weight": torch.zeros(2, 5)}, tmp_path / "five.safetensors")
    with pytest.raises(UserError, match="takes 5 features"):
        ClipHeadJudge(str(clip_folder), tmp_path / "five.safetensors")
    with pytest.raises(UserError, match="encoder"):
        ClipHeadJudge(str(tmp_path / "empty"), tmp_path / "five.safetensors")


def test_who_gave_the_reward_is_found_in_settings_and_training_files(tmp_path):
    settings = load_settings(
        {
            "lvlm": {"model": "critic-x"},
            "loop": {"reward": "my.mod:Reward"},
            "generator": {"adapter": str(tmp_path)},
        }
    )
    (tmp_path / "training.json").write_text(
        json.dumps(
            {
                "reward": {"name": "emotion", "version": "1"},
                "critics": ["old-critic"],
                "config": {"rewards": "law", "data": {"critic": "law"}},
            }
        )
    )
    sources = judges.reward_sources(settings)
    assert {"critic-x", "my.mod:Reward", "old-critic", "emotion"} <= sources
    assert conflict(LVLMJudge(None, "j", "old-critic", "1"), sources) == "old-critic"
    assert conflict(LVLMJudge(None, "j", "other", "1"), sources) is None
    # Only the two keys that name them count, not every word below a key that speaks of rewards.
    assert conflict(PixelJudge(Brightness(), "law"), sources) is None


def test_the_judges_prompt_does_not_tell_the_target():
    from pathlib import Path

    from emoloop.agents.prompt import load_prompt

    prompt = load_prompt(str(Path(judges.__file__).parent / "prompts" / "judge.yaml"))
    system, question = prompt.messages(("data:,",), prompt="a dog")
    assert "target" not in str(system.content) + str(question.content)
    assert "a dog" in str(question.content)


async def test_weights_tell_versions_of_a_reader_apart():
    def reader(value, version=None):
        made = Brightness()
        made.version = version
        made.model = torch.nn.Linear(1, 1)
        torch.nn.init.constant_(made.model.weight, value)
        torch.nn.init.zeros_(made.model.bias)
        return PixelJudge(made, "r").version

    assert reader(1.0) == reader(1.0) != reader(2.0)
    assert reader(1.0, 1) != reader(1.0, 2), "the rule that reads the weights counts too"
