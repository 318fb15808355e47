"""Secrets in URIs, which people put there: never in what is shown, recorded or logged."""

from __future__ import annotations

import re
from typing import Any
from urllib.parse import unquote

HARMLESS = ("scheme", "endpoint_override", "region", "allow_bucket_creation")
"""Options of a URI that say where, not who."""
HIDDEN = "***"
URI = re.compile(r"""(\b[a-z][a-z0-9+.-]*://\S*?)(['"),;\]}]*)(?=\s|$)""", re.I)
"""Up to the next space, but for the punctuation of a text around it."""
USER = re.compile(r"://(?:[^@:/]*:.*|[^@/]+)@")
OPTION = re.compile(r"([?&;#])([^?&;#=]*)=([^?&;#]*)")


def redacted(text: str) -> str:
    """The text with users, passwords and keys in its URIs hidden, and rather too much than less."""
    if "://" not in text:
        return text
    return URI.sub(lambda found: OPTION.sub(_option, _nobody(found[1])) + found[2], text)


def _nobody(uri: str) -> str:
    return USER.sub(f"://{HIDDEN}@", uri)


def _option(found: re.Match[str]) -> str:
    mark, key, value = found.groups()
    plain = unquote(value)
    if key in HARMLESS and _nobody(plain) == plain:
        return found[0]
    return f"{mark}{key}={HIDDEN}"


def redacted_tree(value: Any) -> Any:
    """The same of all texts in lists and mappings."""
    if isinstance(value, str):
        return redacted(value)
    if isinstance(value, list | tuple):
        return [redacted_tree(item) for item in value]
    if isinstance(value, dict):
        return {key: redacted_tree(item) for key, item in value.items()}
    return value
