"""Typed records in JSON files with a checksum: what is read is what was written."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from pipeline.files.atomic import replacing


class Sealed(BaseModel):
    """A record in a file of its own: one JSON object, with the SHA-256 of the rest in `sha256`."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=True)

    def to_bytes(self) -> bytes:
        """The file's content."""
        value = self.model_dump(mode="json", by_alias=True)
        return json.dumps({**value, "sha256": _sha256(value)}, indent=1).encode()

    @classmethod
    def from_bytes(cls, content: bytes) -> Self:
        """The record. Raises ValueError if the content is not what was written."""
        value = json.loads(content)
        if not isinstance(value, dict) or value.pop("sha256", None) != _sha256(value):
            raise ValueError("it is damaged")
        try:
            return cls.model_validate(value)
        except ValidationError:
            raise ValueError("it was written by another version") from None

    def write(self, path: Path, check: Callable[[], None] = lambda: None) -> None:
        """Put the record in the place of `path`, or leave that as it is; see `replacing`."""
        with replacing(path, check) as file:
            file.write(self.to_bytes())

    @classmethod
    def read(cls, path: Path) -> Self:
        """The record in a file. Raises OSError without it, and ValueError if it is damaged."""
        try:
            return cls.from_bytes(path.read_bytes())
        except ValueError as error:
            problem = str(error) if "version" in str(error) else "it is damaged"
            raise ValueError(f"{path}: {problem}") from None


def _sha256(value: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
