"""Faults of a job spec in its own words: key path, line, and the nearest known name."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from pydantic import ValidationError

from pipeline.errors import Fault
from pipeline.registry import nearest
from pipeline.spec.components import Choice, Model, Optimizer, Schedule, Term
from pipeline.spec.job import JobSpec
from pipeline.spec.section import Section, sections_of

Lines = dict[tuple[Any, ...], int]
"""The line of each key path."""
CHOICES: dict[str, type[Choice]] = {
    "loss": Term,
    "model": Model,
    "optimizer": Optimizer,
    "schedule": Schedule,
}
"""What a spec names, with options."""


def faults_of(
    error: ValidationError, tree: Any, lines: Lines, texts: dict[str, str]
) -> Iterator[Fault]:
    """Pydantic's errors in the words of the spec."""
    branches: dict[tuple[Any, ...], list[Fault]] = {}
    for item in error.errors(include_url=False):
        path = _spec_path(item["loc"], tree)
        if item["type"] == "extra_forbidden":
            known = _keys_beside(path, tree)
            problem = f"unknown key{nearest(path[-1], known)}"
            advice = f"allowed: {', '.join(known)}"
            if home := _positional(path, tree):
                problem = "unknown key"
                advice = f"{home} takes it by position: options stand after `*,` in its parameters"
        elif item["type"] == "missing":
            problem, advice = "missing", ""
        elif item["type"] in ("model_type", "model_attributes_type", "dict_type"):
            problem = f"expected a mapping, found {shorten(item['input'])}"
            known = _keys_beside((*path, ""), tree)
            advice = f"with keys such as {', '.join(known)}" if known else ""
        else:
            own = item["type"] in _OWN_ERRORS
            message = _must(item["msg"]) if own else _reword(item["msg"])
            problem = message if own else f"{message}, found {shorten(item['input'])}"
            advice = ""
        shown = dotted(path)
        if own_path := re.match(r"^((?:loss|training|optimizer)\.[\w.]+): (.*)", problem):
            shown, problem = own_path.groups()
            path = tuple(int(k) if k.isdigit() else k for k in shown.split("."))
        override = texts.get(max((k for k in texts if _overlap(shown, k)), key=len, default=""), "")
        if override:
            advice = f"{advice + '; ' if advice else ''}from --set {override}"
        fault = Fault(shown, problem, None if override else _line(path, lines), advice)
        same = branches.setdefault(path, [])
        if fault not in same:
            same.append(fault)
    yield from (_merge(same) for same in branches.values())


def _merge(faults: list[Fault]) -> Fault:
    """One fault of those that each branch of a union reports of a value: any of them will do."""
    first, end = faults[0], re.search(", found .*$", faults[0].problem, re.DOTALL)
    wanted = [fault.problem.removesuffix(end[0]) for fault in faults] if end else []
    if len(faults) == 1:
        return first
    if end is None or not all(text.startswith("must be ") for text in wanted):
        return replace(first, problem="; ".join(fault.problem for fault in faults))
    others = [text.removeprefix("must be ") for text in wanted[1:]]
    return replace(first, problem=f"{' or '.join([wanted[0], *others])}{end[0]}")


def _reword(message: str) -> str:
    """One of pydantic's messages as a reader of YAML would say it."""
    kind = _must(message.partition(", unable to parse")[0])
    for theirs, ours in {
        "a valid integer": "a whole number",
        "a valid number": "a number",
        "a valid string": "text",
        "a valid boolean": "true or false",
        "a valid list": "a list, as [a, b]",
        "a valid tuple": "a list, as [a, b]",
        "a valid dictionary": "a mapping",
    }.items():
        kind = kind.replace(theirs, ours)
    return kind


def _must(message: str) -> str:
    return re.sub(r"\b[A-Z][a-z]+ should", "must", message)


_OWN_ERRORS = {
    "unknown_name",
    "choice",
    "twice",
    "empty",
    "leak",
    "labels",
    "fits",
    "unknown_target",
    "reserved",
    "fraction",
    "bool",
    "workers",
    "policy",
    "split",
}


def _overlap(path: str, other: str) -> bool:
    """Whether one key path is the other or lies above it."""
    one, two = sorted([path.split("."), other.split(".")], key=len)
    return two[: len(one)] == one


def _spec_path(loc: tuple[Any, ...], tree: Any) -> tuple[Any, ...]:
    """Pydantic's location without the steps that are not keys of the spec."""
    path: list[Any] = []
    for key in loc:
        if key == "options" and path and path[0] in ("loss", "model", "optimizer", "schedule"):
            continue
        branch = isinstance(key, str) and re.match(r"(str|float|int|bool)$|\w+[\[-]", key)
        if branch and _at(tree, (*path, key)) is None:
            continue  # the branch of a union
        if path == ["loss"] and isinstance(key, int) and not isinstance(_at(tree, path), list):
            continue  # a single loss is a list of one
        path.append(key)
    return tuple(path)


def _at(tree: Any, path: list[Any] | tuple[Any, ...]) -> Any:
    for key in path:
        try:
            tree = tree[key]
        except (KeyError, IndexError, TypeError):
            return None
    return tree


def _keys_beside(path: tuple[Any, ...], tree: Any) -> list[str]:
    """Keys allowed where the last key of `path` stands."""
    section = _section_at(path[:-1])
    known = [key for key in section.model_fields if key != "options"] if section else []
    here = _at(tree, path[:-1])
    name = here.get("name") if isinstance(here, dict) else None
    if section and issubclass(section, Choice) and name in section.registry.entries:
        known += list(section.registry[name].options.model_fields)
    return known


def _section_at(path: tuple[Any, ...]) -> type[Section] | None:
    """The section of the spec that stands at a key path, or whose list does."""
    section: type[Section] | None = JobSpec
    for key in path:
        if isinstance(key, int):
            continue
        field = section.model_fields.get(key) if section else None
        section = next(sections_of(field.annotation), None) if field else None
    return section


def _positional(path: tuple[Any, ...], tree: Any) -> str | None:
    """Name and place of the component that has such a parameter, but not as an option."""
    here = _at(tree, path[:-1])
    name = here.get("name") if isinstance(here, dict) else None
    if path[0] not in CHOICES or name not in CHOICES[path[0]].registry.entries:
        return None
    entry = CHOICES[path[0]].registry[name]
    parameter = inspect.signature(entry.build).parameters.get(path[-1])
    is_option = parameter is not None and parameter.default is not parameter.empty
    return f"{name} ({entry.place})" if is_option else None


def _line(path: tuple[Any, ...], lines: Lines) -> int | None:
    """Line of the deepest part of `path` that the file holds."""
    for end in range(len(path), -1, -1):
        if path[:end] in lines:
            return lines[path[:end]]
    return None


def dotted(path: tuple[Any, ...]) -> str:
    """A key path as the user writes it."""
    return ".".join(str(key) for key in path) or "job spec"


def shorten(value: Any) -> str:
    """A value for a message."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
