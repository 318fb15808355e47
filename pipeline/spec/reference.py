"""The keys of a job spec as a table for people, from the models' own docstrings."""

from __future__ import annotations

import json
from collections.abc import Iterator

from pydantic.fields import FieldInfo

from pipeline.spec import Choice, JobSpec
from pipeline.spec.data import Constant
from pipeline.spec.section import Section, sections_of

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
        if name == "options" or (issubclass(section, Choice) and name == "name"):
            continue  # `pipeline list` tells them
        if field.description or not any(_shown(field)):
            yield path + name, field
        for inner in _shown(field):
            yield from _fields(inner, f"{path}{name}.")


def _shown(field: FieldInfo) -> list[type[Section]]:
    return [one for one in sections_of(field.annotation) if one not in WITHOUT_ROWS]


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if value is None or isinstance(value, Section) or value in ({}, [], ()):
        return ""
    return f"`{value if isinstance(value, str) else json.dumps(value)}`"
