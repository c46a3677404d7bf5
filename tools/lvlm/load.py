"""The door to the LVLM: settings in, a LangChain chat model out.

Critic and rewriter take any chat model; these are the three that come with emoloop. Each understands
`.bind(response_format=...)` with a JSON schema, and the same weights give the same greedy answers in all of them.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import SecretStr

from ...settings import LVLMSettings
from .. import presets
from .vllm import VLLMChat, VLLMOffline

if TYPE_CHECKING:
    from .embedded import EmbeddedLVLM


def load_lvlm(
    settings: LVLMSettings | None = None, *, check: bool = True, images: bool = True
) -> EmbeddedLVLM | VLLMChat:
    """The chat model that the settings name.

    Args:
        settings: Engine, model and limits. Where `max_tokens` is not set, the model's own default holds
            (`max_tokens` in its `emoloop.json`, where `batch_size` and `threads` of the embedded engine may stand too).
        check: Ask a server at once whether it is there, serves the model and takes images; start one's own.
        images: Whether a server must take them: a critic must see, a rewriter need not.

    Raises:
        UserError: No such model or no such server, with what to do about it.
    """
    settings = settings or LVLMSettings()
    known = settings.model in presets.LVLMS or Path(settings.model).is_dir()
    # A server may serve a model of which nothing is known here.
    own = presets.defaults(settings.model, "lvlm") if known or settings.engine != "vllm" else {}
    limits: dict[str, Any] = {"temperature": settings.temperature, "max_tokens": settings.max_tokens}
    if "max_tokens" not in settings.model_fields_set:
        limits["max_tokens"] = own.get("max_tokens", settings.max_tokens)
    if settings.engine == "embedded":
        from .embedded import EmbeddedLVLM, check_model

        folder = str(presets.resolve(settings.model, "lvlm"))
        check_model(folder)
        return EmbeddedLVLM(
            model=folder,
            batch_size=own.get("batch_size", 8),
            threads=own.get("threads"),
            device=settings.device,
            dtype=settings.dtype,
            **limits,
        )
    limits |= settings.model_dump(include={"timeout", "patience", "concurrency"})
    if settings.engine == "vllm":
        key = SecretStr(settings.api_key)
        chat = VLLMChat(model=settings.model, base_url=settings.base_url, api_key=key, **limits)
    else:
        chat = VLLMOffline(
            model=str(presets.resolve(settings.model, "lvlm")),
            python=settings.vllm_python,
            device=settings.device,
            dtype=settings.dtype,
            **limits,
        )
    if check:
        try:
            chat.check(images)
        except BaseException:
            chat.close()
            raise
    return chat
