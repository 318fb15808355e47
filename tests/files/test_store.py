"""Files by a URI or a path; what a store says, without its secrets."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.errors import UsageError
from pipeline.files.store import Store


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_files_below_a_folder(scheme: str, tmp_path: Path) -> None:
    store = Store.at(f"{scheme}{tmp_path / 'store'}", "storage").below("run")
    assert store.names() == []
    assert store.files() == {}
    assert not store.get("a", tmp_path / "here")
    store.delete("a")
    store.write(b"one", "a")
    store.write(b"three", "b/c")
    assert store.names() == ["a", "b"]
    assert {name: seen.bytes for name, seen in store.files().items()} == {"a": 3, "b/c": 5}
    assert store.get("b/c", tmp_path / "new" / "here")
    assert (tmp_path / "new" / "here").read_bytes() == b"three"
    store.put(tmp_path / "new" / "here", "a")
    assert store.read("a") == b"three"
    store.delete("a")
    store.delete_folder("b")
    assert store.names() == []


def test_its_address_is_shown_without_secrets() -> None:
    store = Store.at("s3://key:hidden@rows/runs?endpoint_override=127.0.0.1:9", "storage")
    assert store.below("x-1").shown == "s3://***@rows/runs/x-1?endpoint_override=127.0.0.1:9"
    with pytest.raises(UsageError, match="storage: what://x cannot be used"):
        Store.at("what://x", "storage")
