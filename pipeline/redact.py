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
PASSWORD = re.compile(r"://[^@:/]*:[^@]*@|^https?://[^@/]+@", re.I)
"""A user alone is one only before a web address, where it is a token."""
SPACED_USER = re.compile(r"://[^/@\s:]*:[^/@\n]*@")
"""A password may hold spaces."""
SECRET_KEY = re.compile("token|key|secret|pass|sig|cred|auth", re.I)
SHORTEST = 4
"""Characters of a secret that is hidden outside of its URI: less would hide ordinary words."""
OPTION = re.compile(r"([?&;#])([^?&;#=]*)=([^?&;#]*)")


def redact(text: str, uri: str = "") -> str:
    """The text with users, passwords and keys in its URIs hidden, and rather too much than less.

    Those of `uri` are hidden wherever they stand: some errors tell parts of an address.
    """
    if "://" in text:
        text = SPACED_USER.sub(f"://{HIDDEN}@", text)
        text = URI.sub(lambda match: OPTION.sub(_option, _nobody(match[1])) + match[2], text)
    for secret in sorted(_secrets(uri), key=len, reverse=True):
        text = text.replace(secret, HIDDEN)
    return text


def holds_secret(text: str) -> bool:
    """Whether a URI in the text has a password, a token as its user, or an option like a key."""
    for uri, _ in URI.findall(text):
        options = [(key, unquote(value)) for _, key, value in OPTION.findall(uri)]
        if any(SECRET_KEY.search(key) or PASSWORD.search(value) for key, value in options):
            return True
        if PASSWORD.search(uri):
            return True
    return False


def _secrets(uri: str) -> set[str]:
    """Passwords and keys in a URI, as they stand there and decoded."""
    user = USER.search(uri)
    parts = [user[0][3:-1].rpartition(":")[2]] if user else []  # the password, or a token
    parts += [match[3] for match in OPTION.finditer(uri) if SECRET_KEY.search(match[2])]
    return {text for part in parts for text in (part, unquote(part)) if len(text) >= SHORTEST}


def _nobody(uri: str) -> str:
    return USER.sub(f"://{HIDDEN}@", uri)


def _option(match: re.Match[str]) -> str:
    mark, key, value = match.groups()
    plain = unquote(value)
    if key in HARMLESS and _nobody(plain) == plain:
        return match[0]
    return f"{mark}{key}={HIDDEN}"


def redact_tree(value: Any) -> Any:
    """The same of all texts in lists and mappings."""
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, list | tuple):
        return [redact_tree(item) for item in value]
    if isinstance(value, dict):
        return {key: redact_tree(item) for key, item in value.items()}
    return value
