"""How a mistake is planted in documents."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pipeline.kubernetes.rules import Document

Documents = list[Document]
Plant = Callable[[Documents], Any]

SECRET = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "key"}, "data": {"a": "Yg=="}}


def rename(mapping: Any, old: str, new: str) -> None:
    mapping[new] = mapping.pop(old)


def put(mapping: Any, **values: Any) -> Any:
    mapping.update(values)
    return mapping


def without(entries: Any, key: str, value: str) -> None:
    """Take out the one entry of a list that has this under that key."""
    (gone,) = (each for each in entries if each.get(key) == value)
    entries.remove(gone)


def variable(container: Any, name: str, value: str | None) -> None:
    """Give a container's variable another value, or take it out."""
    without(container["env"], "name", name)
    if value is not None:
        container["env"].append({"name": name, "value": value})


def mount(container: Any, path: str) -> Any:
    return next(each for each in container["volumeMounts"] if each["mountPath"] == path)
