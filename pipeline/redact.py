"""Secrets in URIs, which people put there: never in what is shown, recorded or logged."""

from __future__ import annotations

import re
from typing import Any

HARMLESS = ("scheme", "endpoint_override", "region", "allow_bucket_creation")
"""Options of a URI that say where, not who."""
HIDDEN = "***"
USER = re.compile(r"""(\b[a-z][a-z0-9+.-]*://)(?:[^\s'"@:/]*:[^\s'"]*|[^\s'"@/]+)@""", re.I)
QUERY = re.compile(r"""(\b[a-z][a-z0-9+.-]*://[^\s'"?]*\?)([^\s'"]+)""", re.I)
OPTION = re.compile(r"([^&=]+)=([^&]*)")


def redacted(text: str) -> str:
    """The text with users, passwords and keys in its URIs hidden."""
    if "://" not in text:
        return text
    return QUERY.sub(lambda found: found[1] + OPTION.sub(_option, found[2]), USER.sub(
        rf"\1{HIDDEN}@", text
    ))  # fmt: skip


def _option(found: re.Match[str]) -> str:
    return found[0] if found[1] in HARMLESS else f"{found[1]}={HIDDEN}"


def redacted_tree(value: Any) -> Any:
    """The same of all texts in lists and mappings."""
    if isinstance(value, str):
        return redacted(value)
    if isinstance(value, list | tuple):
        return [redacted_tree(item) for item in value]
    if isinstance(value, dict):
        return {key: redacted_tree(item) for key, item in value.items()}
    return value
