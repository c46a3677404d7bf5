"""The critic in training: its model, which of its weights learn, how it answers, and the folder that it becomes."""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor

from ...agents.prompt import load_prompt
from ...domain import Failure, UserError
from ...files import replacing
from ...tools import presets
from ...tools.lvlm.embedded import check_model
from ...tools.quiet import quiet
from .config import CriticConfig
from .data import Sample, question

#: What families call the vision tower and what leads from it to the text.
_VISION = re.compile(r"(^|\.)(vision_model|vision_tower|visual|connector|multi_modal_projector)\.")

#: Files of a model folder that hold weights, or speak of them.
_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "*.bin", "README.md", "training.json")


class CriticPolicy:
    """A vision-language model that is taught to read pictures.

    Args:
        config: Everything.

    Attributes:
        model: The model; a peft model where a LoRA learns.
        processor: Its processor.
        prompt: The critic's prompt file.
    """

    def __init__(self, config: CriticConfig) -> None:
        self.config = config
        found = presets.resolve(config.model, "lvlm")
        check_model(str(found))
        self.base = found
        self.defaults = presets.defaults(config.model, "lvlm")
        self.prompt = load_prompt(config.policy.prompt or self.defaults.get("critic_prompt", "critic"))
        self.max_tokens: int = config.policy.max_tokens or self.defaults.get("max_tokens", 512)
        with quiet():
            self.processor: Any = AutoProcessor.from_pretrained(found)
            loaded: Any = AutoModelForImageTextToText.from_pretrained(found, dtype="auto")
        self.processor.tokenizer.padding_side = "left"
        self._dtype = loaded.dtype
        cpu = config.train.device == "cpu" or not torch.accelerator.is_available()
        loaded.to(torch.float32 if config.train.precision == "fp32" else torch.bfloat16)
        # The CPU's fused attention has a backward pass that takes half of a small model's step.
        if cpu:
            loaded.set_attn_implementation("eager")
        elif torch.accelerator.is_available():
            loaded.to(torch.accelerator.current_accelerator())
        self.model: Any = self._learning(loaded)

    def _learning(self, model: Any) -> Any:
        knobs = self.config.policy
        if knobs.parts == "lora":
            from peft import LoraConfig, get_peft_model

            torch.manual_seed(self.config.train.seed)
            lora = LoraConfig(
                r=knobs.rank, lora_alpha=int(knobs.alpha), lora_dropout=knobs.dropout, target_modules="all-linear",
                task_type="CAUSAL_LM",
            )  # fmt: skip
            return get_peft_model(model, lora)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(knobs.parts == "full" or bool(_VISION.search(name)))
        if not any(parameter.requires_grad for parameter in model.parameters()):
            raise UserError(
                f"policy.parts=vision: no vision tower is known in a {model.config.model_type} model"
            )
        return model

    def weights(self) -> dict[str, Tensor]:
        """The weights that learn, by name, on the CPU."""
        learning = {name: value for name, value in self.model.named_parameters() if value.requires_grad}
        return {name: value.detach().cpu().clone() for name, value in learning.items()}

    def save_weights(self, file: Path) -> None:
        """Write them."""
        with replacing(file) as beside:
            save_file(self.weights(), beside)

    def load_weights(self, file: Path) -> None:
        """Read them back."""
        own = dict(self.model.named_parameters())
        with torch.no_grad():
            for name, value in load_file(file).items():
                own[name].copy_(value)

    @torch.no_grad()
    def answers(self, samples: Sequence[Sample], temperature: float = 0.0, batch: int = 64) -> list[str]:
        """What the model answers, without a grammar: whether it keeps to its form is one of the figures.

        Args:
            samples: The pictures.
            temperature: 0 takes the likeliest token.
            batch: Pictures in one pass.
        """
        texts: list[str] = []
        was_training = self.model.training
        self.model.eval()
        sampling = (
            {"do_sample": True, "temperature": temperature, "top_k": 0}
            if temperature
            else {"do_sample": False}
        )
        for start in range(0, len(samples), batch):
            inputs = self.inputs(samples[start : start + batch])
            length = inputs["input_ids"].shape[1]
            with quiet():
                out = self.model.generate(**inputs, max_new_tokens=self.max_tokens, **sampling)
            texts += self.processor.batch_decode(out[:, length:], skip_special_tokens=True)
        self.model.train(was_training)
        return texts

    def inputs(self, samples: Sequence[Sample], answers: Sequence[str] = ()) -> Any:
        """The model's inputs for the questions, padded on the left; with `answers`, for questions and answers.

        Args:
            samples: Pictures.
            answers: One for each; an end token follows.
        """
        size = self.config.data.size
        asked = [question(sample, self.prompt) for sample in samples]
        texts = [
            self.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            for messages in asked
        ]
        if answers:
            end = self.processor.tokenizer.eos_token
            texts = [f"{text}{answer}{end}" for text, answer in zip(texts, answers, strict=True)]
        images = [[sample.picture(size)] for sample in samples]
        return self.processor(text=texts, images=images, padding=True, return_tensors="pt").to(
            self.model.device
        )

    def save(self, folder: Path) -> None:
        """Write the whole model, merged, in the precision that it came in, with all else that the base's folder holds.

        `lvlm.model` takes the folder, and a vLLM server serves it.
        """
        model = self.model.merge_and_unload() if self.config.policy.parts == "lora" else self.model
        if isinstance(self.base, Path):
            shutil.copytree(self.base, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns(*_WEIGHTS))
        else:
            self.processor.save_pretrained(folder)
        told = (self.base / "config.json").read_bytes() if isinstance(self.base, Path) else None
        model.to(self._dtype).save_pretrained(folder)
        if told is not None:
            # Ours would name the attention of the training.
            (folder / "config.json").write_bytes(told)


def check_loss(loss: Tensor, step: int, stage: str) -> None:
    """End a training whose loss is no number, before it reaches the weights.

    Raises:
        Failure: It is none.
    """
    if not math.isfinite(loss.item()):
        raise Failure(f"the loss became {loss.item()} at step {step}: lower {stage}.lr")
