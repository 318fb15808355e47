"""Documents of manifests: how they are rendered, read and named."""

from __future__ import annotations

import base64
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from pipeline.kubernetes.rules import Document, pod_templates


class RenderError(Exception):
    """kustomize refused a folder."""


class DuplicateKeyError(Exception):
    """A mapping names a key twice, and YAML readers keep one of the two silently."""


class _UniqueKeyLoader(yaml.SafeLoader):
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise DuplicateKeyError(f"{key!r} twice in one mapping{key_node.start_mark}")
            seen.add(key)
        return super().construct_mapping(node, deep)


def documents(text: str) -> list[Document]:
    """The YAML documents of `text`; a key that a mapping names twice raises."""
    return [each for each in yaml.load_all(text, Loader=_UniqueKeyLoader) if each is not None]


def render(kubectl: str, folder: Path) -> list[Document]:
    """What `kubectl apply -k folder` would send to the cluster."""
    done = subprocess.run([kubectl, "kustomize", str(folder)], capture_output=True, text=True)
    if done.returncode:
        raise RenderError(done.stderr.strip())
    return documents(done.stdout)


def name_of(document: Document) -> str:
    return f"{document.get('kind')}/{document.get('metadata', {}).get('name')}"


def one(found: list[Document], kind: str, name: str) -> Document:
    (document,) = (each for each in found if name_of(each) == f"{kind}/{name}")
    return document


def of_kind(found: list[Document], kind: str) -> list[Document]:
    return [each for each in found if each.get("kind") == kind]


def pods(found: list[Document]) -> list[tuple[str, Document]]:
    return [pod for document in found for pod in pod_templates(document)]


def write_files(config_map: Document, items: list[Document], folder: Path) -> None:
    """The files that a volume has of a ConfigMap, which holds text and bytes."""
    for item in items:
        path = folder / item["path"]
        path.parent.mkdir(parents=True, exist_ok=True)
        if item["key"] in config_map.get("binaryData", {}):
            path.write_bytes(base64.b64decode(config_map["binaryData"][item["key"]]))
        elif item["key"] in config_map.get("data", {}):
            path.write_text(config_map["data"][item["key"]])


def expanded(word: str, values: Mapping[str, str]) -> str:
    """An argument as the kubelet hands it on: with variables put in, and `$$` for `$`."""

    def replacement(found: re.Match[str]) -> str:
        return "$" if found[0] == "$$" else values.get(found[1], found[0])

    return re.sub(r"\$\$|\$\((\w+)\)", replacement, word)


def environment(container: Document) -> dict[str, str]:
    return {each["name"]: each.get("value", "") for each in container.get("env", [])}
