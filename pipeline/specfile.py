"""Job specs from YAML: every fault at once, with its line, key path and the nearest known name."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from pipeline.dataspec import Data, SampleWeight, Section, Split, Stream
from pipeline.errors import Fault, SpecError
from pipeline.registry import nearest
from pipeline.spec import (
    FLOAT,
    Cache,
    Checkpoint,
    Choice,
    JobSpec,
    Model,
    Optimizer,
    Schedule,
    Term,
    Tracking,
    Training,
    Workers,
)

LARGEST_SPEC_BYTES = 1_000_000
MOST_DEPTH = 50
CHOICES: dict[str, type[Choice]] = {
    "loss": Term, "model": Model, "optimizer": Optimizer, "schedule": Schedule
}  # fmt: skip
"""What a spec names, with options."""
YAML_TAG = "tag:yaml.org,2002:"
PLAIN_TAGS = {YAML_TAG + kind for kind in ("map", "seq", "str", "int", "float", "bool", "null")}


class _Loader(yaml.SafeLoader):
    """YAML 1.2's scalars: `1e-3` is a number, `no` and dates are text."""


_Loader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in [
    ("null", r"^(?:~|null|Null|NULL|)$", ["~", "n", "N", ""]),
    ("bool", r"^(?:true|True|TRUE|false|False|FALSE)$", list("tTfF")),
    ("int", r"^[-+]?[0-9]+$", list("-+0123456789")),
    ("float", FLOAT.pattern, list("-+.0123456789")),
]:
    _Loader.add_implicit_resolver(YAML_TAG + _tag, re.compile(_pattern), _first)
_Loader.add_constructor(YAML_TAG + "int", lambda loader, node: int(node.value))
_Loader.add_constructor(
    YAML_TAG + "float",
    lambda loader, node: float(re.sub(r"\.(?=inf|nan)", "", node.value.lower())),
)

Lines = dict[tuple[Any, ...], int]


def _parse(text: str, source: str) -> tuple[Any, Lines, list[Fault]]:
    """Values, the line of each key path, and the faults of the YAML itself."""
    lines: Lines = {}
    faults: list[Fault] = []

    def build(node: yaml.Node, path: tuple[Any, ...]) -> Any:
        lines.setdefault(path, node.start_mark.line + 1)
        if node.tag not in PLAIN_TAGS:
            tag = node.tag.removeprefix(YAML_TAG)
            problem = f"a tag ({tag}): write a plain value"
            faults.append(Fault(_dotted(path), problem, node.start_mark.line + 1))
            return None
        if isinstance(node, yaml.SequenceNode):
            return [build(child, (*path, i)) for i, child in enumerate(node.value)]
        if not isinstance(node, yaml.MappingNode):
            try:
                return loader.construct_object(node)
            except (ValueError, KeyError) as error:
                problem = f"cannot be read as {node.tag.removeprefix(YAML_TAG)}: {error}"
                faults.append(Fault(_dotted(path), problem, node.start_mark.line + 1))
                return None
        mapping: dict[str, Any] = {}
        for key_node, child in node.value:
            key, line = str(key_node.value), key_node.start_mark.line + 1
            if key in mapping:
                first = lines[(*path, key)]
                faults.append(
                    Fault(_dotted((*path, key)), f"given twice, first on line {first}", line)
                )
                continue
            lines[(*path, key)] = line
            mapping[key] = build(child, (*path, key))
        return mapping

    try:
        depth = 0
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            depth += isinstance(event, yaml.CollectionStartEvent)
            depth -= isinstance(event, yaml.CollectionEndEvent)
            problem = "an alias (*): write the value out" * isinstance(event, yaml.AliasEvent)
            if problem or depth > MOST_DEPTH:
                line = event.start_mark.line + 1 if event.start_mark else None
                problem = problem or f"nested deeper than {MOST_DEPTH} levels"
                raise SpecError(source, [Fault("YAML", problem, line)])
        loader = _Loader(text)
        node = loader.get_single_node()
        return (build(node, ()) if node else None), lines, faults
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        at = f" at column {mark.column + 1}" if mark else ""
        problem = f"not YAML that can be read{at}: {error.problem or error.context}"
        raise SpecError(source, [Fault("YAML", problem, mark.line + 1 if mark else None)]) from None
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise SpecError(source, [Fault("YAML", f"cannot be read: {error}")]) from None


def _override(tree: Any, path: str, value: Any) -> None:
    """Set `value` at the dotted `path`, making the mappings on the way."""
    *parents, last = path.split(".")
    for depth, key in enumerate(parents):
        index = _index(tree, key, path)
        try:
            child = tree[index]
        except (KeyError, IndexError, TypeError):
            child = None
        field = JobSpec.model_fields.get(key) if depth == 0 else None
        if child is None and field and isinstance(field.default, str):
            child = field.default  # `--set optimizer.lr=1` without an optimizer in the spec
        if isinstance(child, str) and field:
            child = {"name": child}  # `loss: huber` and `--set loss.delta=2`
        if not isinstance(child, dict | list):
            child = {}
        tree[index] = child
        tree = child
    tree[_index(tree, last, path)] = value


def _index(tree: Any, key: str, path: str) -> Any:
    """The key as it is in a mapping, as a number in a list. Raises SpecError outside of it."""
    if not isinstance(tree, list):
        return key
    if not key.isdigit() or int(key) >= len(tree):
        problem = f"{key!r} is no place in a list of {len(tree)}: they are numbered from 0"
        raise SpecError(f"--set {path}", [Fault(path, problem)])
    return int(key)


def _faults(
    error: ValidationError, tree: Any, lines: Lines, texts: dict[str, str]
) -> Iterator[Fault]:
    """Pydantic's errors in the words of the spec."""
    branches: dict[tuple[Any, ...], list[str]] = {}
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
            problem = f"expected a mapping, found {_short(item['input'])}"
            known = _keys_beside((*path, ""), tree)
            advice = f"with keys such as {', '.join(known)}" if known else ""
        else:
            own = item["type"] in _OWN_ERRORS
            message = item["msg"] if own else _in_plain_words(item["msg"])
            problem = message if own else f"{message}, found {_short(item['input'])}"
            advice = ""
        dotted = _dotted(path)
        if own_path := re.match(r"^((?:loss|training)\.[\w.]+): (.*)", problem):
            dotted, problem = own_path.groups()
            path = tuple(int(k) if k.isdigit() else k for k in dotted.split("."))
        override = texts.get(
            max((k for k in texts if _overlap(dotted, k)), key=len, default=""), ""
        )
        if override:
            advice = f"{advice + '; ' if advice else ''}from --set {override}"
        fault = Fault(dotted, problem, None if override else _line(path, lines), advice)
        seen = branches.setdefault(path, [])
        if problem not in seen:  # a union reports once for each of its branches
            seen.append(problem)
            yield fault


def _in_plain_words(message: str) -> str:
    """One of pydantic's messages as a reader of YAML would say it."""
    kind = re.sub("^[A-Z][a-z]+ should", "must", message.partition(", unable to parse")[0])
    for theirs, ours in {
        "a valid integer": "a whole number", "a valid number": "a number",
        "a valid string": "text", "a valid boolean": "true or false", "a valid list": "a list",
        "a valid tuple": "a list", "a valid dictionary": "a mapping",
    }.items():  # fmt: skip
        kind = kind.replace(theirs, ours)
    return kind


_OWN_ERRORS = {
    "unknown_name", "choice", "twice", "empty", "leak", "labels", "fits", "unknown_target",
    "reserved", "fraction", "bool", "workers", "policy", "split",
}  # fmt: skip


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
    sections: dict[str, type[Section]] = {
        "data": Data, "training": Training, "workers": Workers, "checkpoint": Checkpoint,
        "cache": Cache, "tracking": Tracking,
    }  # fmt: skip
    if len(path) == 1:
        return list(JobSpec.model_fields)
    if path[:2] == ("data", "sample_weight") and len(path) == 3:
        return list(SampleWeight.model_fields)
    if path[:2] == ("data", "stream") and len(path) == 3:
        return list(Stream.model_fields)
    if path[:2] == ("data", "validation") and len(path) == 3:
        return list(Split.model_fields)
    if path[0] in sections and len(path) == 2:
        return list(sections[path[0]].model_fields)
    if path[0] in CHOICES and len(path) <= 3:
        choice, here = CHOICES[path[0]], _at(tree, path[:-1])
        own = [key for key in choice.model_fields if key != "options"]
        name = here.get("name") if isinstance(here, dict) else None
        if name in choice.registry.entries:
            own += list(choice.registry[name].options.model_fields)
        return own
    return []


def _positional(path: tuple[Any, ...], tree: Any) -> str | None:
    """Name and place of the component that has such a parameter, but not as an option."""
    here = _at(tree, path[:-1])
    name = here.get("name") if isinstance(here, dict) else None
    if path[0] not in CHOICES or name not in CHOICES[path[0]].registry.entries:
        return None
    entry = CHOICES[path[0]].registry[name]
    found = inspect.signature(entry.build).parameters.get(path[-1])
    is_option = found is not None and found.default is not found.empty
    return f"{name} ({entry.place})" if is_option else None


def _line(path: tuple[Any, ...], lines: Lines) -> int | None:
    """Line of the deepest part of `path` that the file holds."""
    for end in range(len(path), -1, -1):
        if path[:end] in lines:
            return lines[path[:end]]
    return None


def _dotted(path: tuple[Any, ...]) -> str:
    return ".".join(str(key) for key in path) or "job spec"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def load(
    source: str | Path | Mapping[str, Any], overrides: Mapping[str, Any] | None = None
) -> JobSpec:
    """The job spec in a YAML file (or a mapping), with dotted `overrides` applied.

    Raises SpecError with every fault found.
    """
    overrides = dict(overrides or {})
    lines: Lines = {}
    faults: list[Fault] = []
    if isinstance(source, Mapping):
        name, tree = "job spec", json.loads(json.dumps(source, default=str))
    else:
        name = str(source)
        try:
            if Path(source).stat().st_size > LARGEST_SPEC_BYTES:
                raise SpecError(name, [Fault("file", "larger than 1 MB: not a job spec")])
            text = Path(source).read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
            raise SpecError(name, [Fault("file", f"cannot be read: {reason}")]) from None
        tree, lines, faults = _parse(text, name)
    if not isinstance(tree, dict):
        problem = f"expected a mapping with the keys name, data, model, loss; found {_short(tree)}"
        raise SpecError(name, [*faults, Fault("job spec", problem, 1)])
    texts = {}
    for path, value in overrides.items():
        texts[path] = f"{path}={value}"
        _override(tree, path, value)
    try:
        spec = JobSpec.model_validate(tree)
    except ValidationError as error:
        faults += _faults(error, tree, lines, texts)
        raise SpecError(name, sorted(faults, key=lambda fault: fault.line or 0)) from None
    if faults:
        raise SpecError(name, faults)
    return spec


def parse_override(text: str) -> tuple[str, Any]:
    """Key path and value of one `key.path=value`, the value read as YAML."""
    path, equals, value = text.partition("=")
    if not equals or not re.fullmatch(r"[A-Za-z_][\w-]*(\.[\w-]+)*", path.strip()):
        problem = f"expected key.path=value, found {_short(text)}"
        raise SpecError("--set", [Fault("override", problem)])
    tree, _, faults = _parse(value, f"--set {text}")
    if faults:
        raise SpecError(f"--set {text}", faults)
    return path.strip(), tree
