"""Job specs from YAML: every fault at once, with its line, key path and the nearest known name."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from pipeline.errors import Fault, SpecError
from pipeline.spec.faults import Lines, dotted, faults_of, shorten
from pipeline.spec.job import FLOAT, JobSpec

LARGEST_SPEC_BYTES = 1_000_000
MAX_DEPTH = 50
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


def _parse(text: str, source: str) -> tuple[Any, Lines, list[Fault]]:
    """Values, the line of each key path, and the faults of the YAML itself."""
    lines: Lines = {}
    faults: list[Fault] = []

    def build(node: yaml.Node, path: tuple[Any, ...]) -> Any:
        lines.setdefault(path, node.start_mark.line + 1)
        if node.tag not in PLAIN_TAGS:
            tag = node.tag.removeprefix(YAML_TAG)
            problem = f"a tag ({tag}): write a plain value"
            faults.append(Fault(dotted(path), problem, node.start_mark.line + 1))
            return None
        if isinstance(node, yaml.SequenceNode):
            return [build(child, (*path, i)) for i, child in enumerate(node.value)]
        if not isinstance(node, yaml.MappingNode):
            try:
                return loader.construct_object(node)
            except (ValueError, KeyError) as error:
                problem = f"cannot be read as {node.tag.removeprefix(YAML_TAG)}: {error}"
                faults.append(Fault(dotted(path), problem, node.start_mark.line + 1))
                return None
        mapping: dict[str, Any] = {}
        for key_node, child in node.value:
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode):
                faults.append(Fault(dotted(path), "a key that is a list or a mapping", line))
                continue
            key = str(key_node.value)
            if key in mapping:
                first = lines[(*path, key)]
                faults.append(
                    Fault(dotted((*path, key)), f"given twice, first on line {first}", line)
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
            if problem or depth > MAX_DEPTH:
                line = event.start_mark.line + 1 if event.start_mark else None
                problem = problem or f"nested deeper than {MAX_DEPTH} levels"
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
        problem = f"{key!r} is not an index of a list of {len(tree)}: they are numbered from 0"
        raise SpecError(f"--set {path}", [Fault(path, problem)])
    return int(key)


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
        name = "job spec"
        tree = json.loads(json.dumps(source, default=str))
    else:
        name = str(source)
        try:
            if Path(source).stat().st_size > LARGEST_SPEC_BYTES:
                raise SpecError(name, [Fault("file", "larger than 1 MB: not a job spec")])
            text = Path(source).read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
            is_gone = isinstance(error, FileNotFoundError)
            problem = "there is no such file" if is_gone else f"cannot be read: {reason}"
            raise SpecError(name, [Fault("file", problem)]) from None
        tree, lines, faults = _parse(text, name)
    if not isinstance(tree, dict):
        problem = f"expected a mapping with the keys name, data, model, loss; found {shorten(tree)}"
        raise SpecError(name, [*faults, Fault("job spec", problem, 1)])
    texts = {}
    for path, value in overrides.items():
        texts[path] = f"{path}={value}"
        _override(tree, path, value)
    try:
        spec = JobSpec.model_validate(tree)
    except ValidationError as error:
        faults += faults_of(error, tree, lines, texts)
        raise SpecError(name, sorted(faults, key=lambda fault: fault.line or 0)) from None
    if faults:
        raise SpecError(name, faults)
    return spec


def parse_override(text: str) -> tuple[str, Any]:
    """Key path and value of one `key.path=value`, the value read as YAML."""
    path, equals, value = text.partition("=")
    if not equals or not re.fullmatch(r"[A-Za-z_][\w-]*(\.[\w-]+)*", path.strip()):
        problem = f"expected key.path=value, found {shorten(text)}"
        raise SpecError("--set", [Fault("override", problem)])
    tree, _, faults = _parse(value, f"--set {text}")
    if faults:
        raise SpecError(f"--set {text}", faults)
    return path.strip(), tree
