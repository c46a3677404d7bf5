"""What a model folder may look like, and what is said about those that it may not."""

import json
import sys
from pathlib import Path

import emoloop
import numpy as np
import pytest
import tiny
import torch
from diffusers import StableDiffusion3Pipeline
from emoloop.domain import UserError
from emoloop.settings import GeneratorSettings
from emoloop.tools.images.base import ImageRequest
from emoloop.tools.images.load import load_generator

CODEC = '''
import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config


class TinyCodec(ModelMixin, ConfigMixin):
    """Latents of 2 by 2 pixels through one linear map."""

    @register_to_config
    def __init__(self, latent_channels=8, block_out_channels=(8, 16), scaling_factor=1.0, shift_factor=0.0):
        super().__init__()
        self.to_pixels = torch.nn.Conv2d(latent_channels, 12, 1)

    def decode(self, latents, return_dict=True):
        pixels = torch.nn.functional.pixel_shuffle(self.to_pixels(latents), 2)
        return {"sample": pixels} if return_dict else (pixels,)
'''


@pytest.fixture(scope="module")
def sd3(tmp_path_factory) -> Path:
    return tiny.save("sd3", tmp_path_factory.mktemp("sd3"))


def edit(folder: Path, tmp_path: Path, **changes) -> Path:
    """The folder again, by links, with other entries in its model_index.json."""
    copy = tmp_path / "model"
    copy.mkdir()
    for path in folder.iterdir():
        (copy / path.name).symlink_to(path)
    index = json.loads((folder / "model_index.json").read_text())
    (copy / "model_index.json").unlink()
    (copy / "model_index.json").write_text(json.dumps(index | changes))
    return copy


async def test_a_component_of_this_package_is_found_by_its_name_in_the_index(tmp_path: Path, monkeypatch):
    (tmp_path / "tiny_codec_room.py").write_text(CODEC)
    monkeypatch.setattr(emoloop, "__path__", [*emoloop.__path__, str(tmp_path)])
    from emoloop.tiny_codec_room import TinyCodec  # pyright: ignore[reportMissingImports]

    torch.manual_seed(0)
    tiny.save("sd3", tmp_path / "model", vae=TinyCodec().eval())
    index = json.loads((tmp_path / "model" / "model_index.json").read_text())
    assert index["vae"] == ["emoloop.tiny_codec_room", "TinyCodec"]
    monkeypatch.delitem(sys.modules, "emoloop.tiny_codec_room")
    source = load_generator(tmp_path / "model")
    (made,) = await source.generate([ImageRequest("a dog", 1)])
    assert made.image.size == (tiny.SIZE, tiny.SIZE)
    assert np.asarray(made.image).std() > 0
    await source.aclose()


def test_a_component_of_an_unknown_library_is_not_imported(sd3: Path, tmp_path: Path):
    with pytest.raises(
        UserError, match=r"does not load as a StableDiffusion3Pipeline: .*has not been imported"
    ):
        load_generator(edit(sd3, tmp_path, vae=["antigravity", "Codec"]))
    assert "antigravity" not in sys.modules


@pytest.mark.parametrize("absent", [[None, None], None])
def test_absent_encoders_may_be_null_or_left_out(sd3: Path, tmp_path: Path, absent):
    folder = edit(sd3, tmp_path, text_encoder_3=absent, tokenizer_3=absent)
    if absent is None:
        index = json.loads((folder / "model_index.json").read_text())
        index = {key: value for key, value in index.items() if not key.endswith("_3")}
        (folder / "model_index.json").write_text(json.dumps(index))
    assert load_generator(folder).describe()["pipeline"] == "StableDiffusion3Pipeline"


def test_settings_win_over_the_folder_and_the_folder_over_the_pipeline(sd3: Path, tmp_path: Path):
    described = load_generator(sd3, GeneratorSettings(steps=5, height=64)).describe()
    assert (described["steps"], described["guidance"], described["height"], described["width"]) == (
        5,
        3.0,
        64,
        32,
    )
    bare = edit(sd3, tmp_path)
    (bare / "emoloop.json").unlink()
    described = load_generator(bare).describe()
    assert (described["steps"], described["guidance"], described["height"]) == (28, 7.0, 32)
    assert described["micro_batch"] == 1
    assert described["revision"] != load_generator(sd3).describe()["revision"]


def test_a_pipeline_object_keeps_to_the_defaults_of_its_folder(sd3: Path):
    pipe = StableDiffusion3Pipeline.from_pretrained(sd3, text_encoder_3=None, tokenizer_3=None)
    ours, loaded = load_generator(pipe).describe(), load_generator(sd3).describe()
    assert ours == loaded


def test_a_dotted_path_makes_any_generator():
    made = load_generator(f"{__name__}:fake_generator", GeneratorSettings(steps=3))
    assert made == ("fake", 3)


def fake_generator(settings: GeneratorSettings) -> tuple[str, int | None]:
    return "fake", settings.steps


def test_dtype_is_overridable(sd3: Path):
    source = load_generator(sd3, GeneratorSettings(dtype="bfloat16"))
    assert source.describe()["dtype"] == "bfloat16"
    assert load_generator(sd3).describe()["dtype"] in ("float32", "bfloat16")


def test_loading_is_silent(sd3: Path, capfd):
    load_generator(sd3)
    captured = capfd.readouterr()
    assert captured.out == ""
    assert captured.err == ""


def test_wrong_folders_are_one_line(sd3: Path, tmp_path: Path):
    for spec, words in {
        tmp_path / "gone": "not a folder",
        tmp_path: "is not a diffusers pipeline",
    }.items():
        with pytest.raises(UserError, match=words):
            load_generator(spec)


def test_an_unsupported_class_is_one_line(sd3: Path, tmp_path: Path):
    with pytest.raises(
        UserError, match="SanaPipeline is not supported; these are: StableDiffusion3Pipeline, Flux"
    ):
        load_generator(edit(sd3, tmp_path, _class_name="SanaPipeline"))


def test_a_damaged_model_is_one_line(sd3: Path, tmp_path: Path):
    folder = edit(sd3, tmp_path)
    (folder / "transformer").unlink()
    with pytest.raises(UserError, match="does not load as a StableDiffusion3Pipeline") as error:
        load_generator(folder)
    assert "\n" not in str(error.value)


def test_an_unknown_call_argument_is_one_line(sd3: Path, tmp_path: Path):
    folder = edit(sd3, tmp_path)
    (folder / "emoloop.json").unlink()
    (folder / "emoloop.json").write_text('{"call": {"max_sequnce_length": 0}}')
    with pytest.raises(UserError, match="takes no 'max_sequnce_length'"):
        load_generator(folder)
