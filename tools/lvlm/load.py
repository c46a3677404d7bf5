"""The door to the LVLM: settings in, a LangChain chat model out.

Critic and rewriter take any chat model; these are the three that come with emoloop. Each understands
`.bind(response_format=...)` with a JSON schema, and the same weights give the same greedy answers in all of
them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from langchain_core.language_models import BaseChatModel
from pydantic import SecretStr

from ...settings import LVLMSettings
from .. import presets


def load_lvlm(settings: LVLMSettings | None = None, *, check: bool = True) -> BaseChatModel:
    """The chat model that the settings name.

    Args:
        settings: Engine, model and limits. Where `max_tokens` is not set, the model's own default holds
            (`max_tokens` in its `emoloop.json`, where `batch_size` and `threads` of the embedded engine may stand too).
        check: Ask a server at once whether it is there, serves the model and takes images.

    Returns:
        `EmbeddedLVLM`, `VLLMChat` or `VLLMOffline`; each has `close()`.

    Raises:
        UserError: No such model or no such server, with what to do about it.
    """
    settings = settings or LVLMSettings()
    own = _defaults(settings)
    limit = settings.max_tokens
    if "max_tokens" not in settings.model_fields_set:
        limit = own.get("max_tokens", limit)
    if settings.engine == "vllm":
        from .vllm import VLLMChat

        chat = VLLMChat(
            model=settings.model,
            base_url=settings.base_url,
            api_key=SecretStr(settings.api_key),
            timeout=settings.timeout,
            patience=settings.patience,
            concurrency=settings.concurrency,
            temperature=settings.temperature,
            max_tokens=limit,
        )
        if check:
            chat.check()
        return chat
    folder = presets.resolve(settings.model, "lvlm")
    if settings.engine == "vllm-offline":
        from ..vllm.offline import VLLMOffline

        return VLLMOffline(
            model=str(folder),
            python=settings.vllm_python,
            temperature=settings.temperature,
            max_tokens=limit,
            dtype=settings.dtype,
        )
    from .embedded import EmbeddedLVLM, check_folder

    if isinstance(folder, Path):
        check_folder(folder)
    return EmbeddedLVLM(
        model=str(folder),
        temperature=settings.temperature,
        max_tokens=limit,
        batch_size=own.get("batch_size", 8),
        threads=own.get("threads"),
        device=settings.device,
        dtype=settings.dtype,
    )


def _defaults(settings: LVLMSettings) -> dict[str, Any]:
    """The model's own; a server may serve one of which nothing is known here."""
    if (
        settings.engine == "vllm"
        and settings.model not in presets.LVLMS
        and not Path(settings.model).is_dir()
    ):
        return {}
    return presets.defaults(settings.model, "lvlm")
