"""Addresses as they may be shown: without the password that may stand in them."""

from __future__ import annotations

import re


def redact(text: str) -> str:
    """A URL, or a text that holds some, with user names and passwords replaced by `***`."""
    return re.sub(r"(?<=://)[^/@\s]*(?:@[^/@\s]*)*@", "***@", text)
