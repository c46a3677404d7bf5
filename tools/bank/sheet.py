"""A bank as a page: what stands behind each emotion's entries, and which a prompt finds first."""

from __future__ import annotations

import base64
from pathlib import Path

import jinja2
from PIL import Image

from ...domain import EmotionTarget
from ...files import write_atomic
from ..images.base import encoded
from .bank import Bank, Floats


def save_sheet(bank: Bank, path: Path, prompt: str = "", query: Floats | None = None, k: int = 4) -> Path:
    """Write the page; it stands alone, pictures included.

    Args:
        bank: The bank.
        path: An HTML file.
        prompt: What was asked.
        query: Its text feature: entries then stand in the order in which it finds them; None keeps the bank's order.
        k: Entries that are marked.
    """
    groups = []
    for index in sorted(set(bank.emotion.tolist())):
        point = bank.head.points[index]
        rows = [(row, None) for row, emotion in enumerate(bank.emotion) if emotion == index]
        if query is not None:
            target = EmotionTarget(valence=point[0], arousal=point[1])
            rows = bank.retrieve(query, target, len(rows))
        entries = [
            {
                "caption": bank.head.captions[row],
                "count": int(bank.count[row]),
                "cosine": cosine,
                "picture": _packed(Image.fromarray(bank.thumbnails[row])),
            }
            for row, cosine in rows
        ]
        groups.append({"emotion": bank.head.emotions[index], "point": point, "entries": entries})
    template = jinja2.Environment(autoescape=True).from_string(
        Path(__file__).with_name("sheet.html.jinja").read_text(encoding="utf-8")
    )
    return write_atomic(path, template.render(head=bank.head, groups=groups, prompt=prompt, k=k))


def _packed(picture: Image.Image) -> str:
    return base64.b64encode(encoded(picture, "WEBP", quality=85)).decode()
