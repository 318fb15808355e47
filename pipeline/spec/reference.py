"""The keys of a job spec as a table for people, from the models' own docstrings."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, get_args

from pydantic.fields import FieldInfo

from pipeline.spec import Choice, JobSpec
from pipeline.spec.data import Constant, Section

WITHOUT_ROWS = (Constant,)
"""Sections whose one key is told where it is used."""


def table() -> str:
    """A Markdown table: key, default, meaning."""
    lines = ["| key | default | meaning |", "|---|---|---|"]
    for key, field in _fields(JobSpec):
        meaning = " ".join((field.description or "").split()).replace("|", "\\|")
        lines.append(f"| `{key}` | {_default(field)} | {meaning} |")
    return "\n".join(lines)


def _fields(section: type[Section], path: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Each key with its dotted path, those of a section after the section itself."""
    for name, field in section.model_fields.items():
        if issubclass(section, Choice) and name in ("name", "options"):
            continue  # `pipeline list` tells them
        if field.description or not any(_sections(field.annotation)):
            yield path + name, field
        for inner in _sections(field.annotation):
            yield from _fields(inner, f"{path}{name}.")


def _sections(annotation: Any) -> Iterator[type[Section]]:
    """The sections that a type is made of."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        if annotation not in WITHOUT_ROWS:
            yield annotation
        return
    for argument in get_args(annotation):
        yield from _sections(argument)


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if value is None or isinstance(value, Section) or value in ({}, []):
        return ""
    return f"`{value if isinstance(value, str) else json.dumps(value)}`"
