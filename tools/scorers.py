"""The known scorers of pictures as rewards and judges: CLIPScore, PickScore, HPSv2, LAION's aesthetic predictor.

All are CLIP models. Values are rounded to four digits: batches of different size differ in the last bits, and a
run that is resumed shall pick what an undisturbed one would have.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from PIL import ImageOps
from PIL.Image import Image, Resampling
from safetensors.torch import load_file
from torch import Tensor, nn

from ..domain import UserError, first_line
from .fingerprint import content_hash
from .images.pipelines import device_of
from .quiet import quiet


class Scorer(ABC):
    """A CLIP model that scores pictures for prompts, on its own scale.

    Attributes:
        name: Its name in `tools.reward.REWARDS`.
        says: The field of a judge's reading that it fills.
        model: The model's id, folder or file.
        version: The model and its revision.
    """

    name: str
    says: str

    def __init__(self, model: str) -> None:
        from transformers import AutoProcessor, CLIPModel

        try:
            with quiet():
                self.clip = CLIPModel.from_pretrained(model).eval()
                self.processor = AutoProcessor.from_pretrained(model)
        except (OSError, ValueError) as error:
            raise UserError(f"{self.name}: no CLIP model {model!r}: {first_line(error)}") from error
        self.device = device_of("auto")
        self.clip.to(self.device)  # pyright: ignore[reportArgumentType]
        self.model = model
        found = content_hash(Path(model)) if Path(model).is_dir() else self.clip.config._commit_hash
        self.version = f"{Path(model).name}@{(found or 'unknown')[:12]}"

    @abstractmethod
    def score(self, pictures: Sequence[Image], prompts: Sequence[str]) -> Tensor:
        """The scores, (N,)."""

    @torch.inference_mode()
    def __call__(self, pictures: Any, prompts: Any, critiques: Any, targets: Any) -> list[float]:
        """As a reward: neither critique nor target counts."""
        return [round(float(value), 4) for value in self.score(pictures, prompts)]

    def encode(self, pictures: Sequence[Image], prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Normalised embeddings of pictures and prompts, (N, D) each."""
        inputs = self.processor(
            text=list(prompts), images=list(pictures), return_tensors="pt", padding=True, truncation=True
        )
        out = self.clip(**inputs.to(self.device))
        return out.image_embeds, out.text_embeds


class ClipScore(Scorer):
    """CLIPScore (Hessel et al., arXiv 2104.08718) without its factor: max(cos, 0)."""

    name, says = "clipscore", "alignment"

    def __init__(self, model: str = "openai/clip-vit-large-patch14") -> None:
        super().__init__(model)

    def score(self, pictures: Sequence[Image], prompts: Sequence[str]) -> Tensor:
        """See `Scorer`."""
        return torch.cosine_similarity(*self.encode(pictures, prompts)).clamp(min=0)


class PickScore(Scorer):
    """PickScore (Kirstain et al., arXiv 2305.01569): the cosine times the model's logit scale, about 20."""

    name, says = "pickscore", "preference"

    def __init__(self, model: str = "yuvalkirstain/PickScore_v1") -> None:
        super().__init__(model)

    def score(self, pictures: Sequence[Image], prompts: Sequence[str]) -> Tensor:
        """See `Scorer`."""
        return self.clip.logit_scale.exp() * torch.cosine_similarity(*self.encode(pictures, prompts))


class Aesthetic(Scorer):
    """LAION's aesthetic predictor V2: linear layers on the normalised picture embedding, about 1 to 10.

    Args:
        model: The CLIP model, and behind a comma the file of the head.
    """

    name, says = "aesthetic", "aesthetic"

    def __init__(self, model: str = "openai/clip-vit-large-patch14") -> None:
        encoder, _, head = model.partition(",")
        super().__init__(encoder)
        file = Path(head or fetched("trl-lib/ddpo-aesthetic-predictor", "aesthetic-model.pth"))
        self.head = load_head(file, self.clip.config.projection_dim, (1,)).to(self.device)
        self.model, self.version = model, f"{self.version} {content_hash(file)[:12]}"

    def score(self, pictures: Sequence[Image], prompts: Sequence[str]) -> Tensor:
        """See `Scorer`."""
        return self.head(self.encode(pictures, prompts)[0])[:, 0]


class HPSv2(Scorer):
    """HPS v2.1 (Wu et al., arXiv 2306.09341): the cosine of a fine-tuned CLIP model, about 0.2 to 0.35.

    Args:
        model: The file of its weights, by OpenCLIP's names.
        base: The CLIP model that was fine-tuned, in transformers' format.
    """

    name, says = "hpsv2", "preference"

    def __init__(self, model: str | None = None, base: str = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K") -> None:
        super().__init__(base)
        file = Path(model or fetched("xswu/HPSv2", "HPS_v2.1_compressed.pt"))
        try:
            state = torch.load(file, map_location="cpu", weights_only=True)
            self.clip.load_state_dict(as_transformers(state["state_dict"]))
        except (OSError, KeyError, RuntimeError) as error:
            raise UserError(f"hpsv2: {file} holds no weights of {base}: {first_line(error)}") from error
        self.model, self.version = str(file), f"{file.name}@{content_hash(file)[:12]}"
        self.size = self.clip.config.vision_config.image_size

    def score(self, pictures: Sequence[Image], prompts: Sequence[str]) -> Tensor:
        """See `Scorer`; as in HPSv2's own code the longer side fits, and the rest is black."""
        fitted = [ImageOps.pad(it, (self.size, self.size), Resampling.BICUBIC) for it in pictures]
        return torch.cosine_similarity(*self.encode(fitted, prompts))


#: OpenCLIP's names of what stands outside the blocks, and transformers'; those in `_TURNED` are transposed there.
_NAMES = {
    "logit_scale": "logit_scale",
    "text_projection": "text_projection.weight",
    "token_embedding": "text_model.embeddings.token_embedding",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final": "text_model.final_layer_norm",
    "visual.proj": "visual_projection.weight",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.conv1": "vision_model.embeddings.patch_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.ln_pre": "vision_model.pre_layrnorm",
    "visual.ln_post": "vision_model.post_layernorm",
}
_TURNED = ("text_projection", "visual.proj")
_IN_BLOCKS = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_BLOCK = re.compile(r"(visual\.)?transformer\.resblocks\.(\d+)\.(.+?)[._](weight|bias)")


def as_transformers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A CLIP model's weights by transformers' names, from OpenCLIP's."""
    out: dict[str, Tensor] = {}
    for key, value in state.items():
        if match := _BLOCK.fullmatch(key):
            visual, number, part, kind = match.groups()
            block = f"{'vision' if visual else 'text'}_model.encoder.layers.{number}"
            if part == "attn.in_proj":
                for name, piece in zip("qkv", value.chunk(3), strict=True):
                    out[f"{block}.self_attn.{name}_proj.{kind}"] = piece
            else:
                out[f"{block}.{_IN_BLOCKS[part]}.{kind}"] = value
        elif key in _NAMES:
            out[_NAMES[key]] = value.T if key in _TURNED else value
        elif key != "attn_mask":
            part, _, kind = key.rpartition(".")
            out[f"{_NAMES[part]}.{kind}"] = value
    return out


def fetched(repo: str, file: str) -> str:
    """The path of a hub file.

    Raises:
        UserError: The hub did not give it.
    """
    try:
        return hf_hub_download(repo, file)
    except Exception as error:
        raise UserError(f"the model hub did not give {file} of {repo}: {first_line(error)}") from error


def load_head(
    path: Path, takes: Any, outputs: Sequence[int], between: Sequence[nn.Module] = ()
) -> nn.Sequential:
    """The linear layers of a state dict (safetensors, or .pth with weights alone), in eval mode.

    Args:
        path: The file.
        takes: Features that the first layer takes.
        outputs: Numbers that the last may give.
        between: What stands between the layers.

    Raises:
        UserError: No file, or layers of another shape.
    """
    if not path.is_file():
        raise UserError(f"no head at {path}: the file of its state dict is wanted")
    if path.suffix == ".safetensors":
        state = load_file(path)
    else:
        state = torch.load(path, map_location="cpu", weights_only=True)
    linear: list[nn.Linear] = []
    for key, weight in state.items():
        if key.endswith("weight") and weight.ndim == 2:
            bias = state.get(key.removesuffix("weight") + "bias")
            layer = nn.Linear(weight.shape[1], weight.shape[0])
            layer.weight.data = weight.float()
            layer.bias.data = torch.zeros(weight.shape[0]) if bias is None else bias.float()
            linear.append(layer)
    if not linear or any(a.out_features != b.in_features for a, b in pairwise(linear)):
        raise UserError(f"{path}: not a stack of linear layers")
    if linear[0].in_features != takes or linear[-1].out_features not in outputs:
        raise UserError(
            f"{path}: takes {linear[0].in_features} features and gives {linear[-1].out_features} numbers; "
            f"wanted are {takes} and {' or '.join(map(str, outputs))}"
        )
    return nn.Sequential(*[part for layer in linear for part in (*between, layer)][len(between) :]).eval()
