"""Records with a checksum: read as they were written, or not at all."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest

from pipeline.files.sealed import Sealed


class Mark(Sealed):
    step: int
    loss: float | None = None


class Other(Sealed):
    name: str


def test_a_record_is_read_as_it_was_written(tmp_path: Path) -> None:
    for mark in (Mark(step=3), Mark(step=4, loss=0.1 + 0.2)):
        mark.write(tmp_path / "mark.json")
        assert Mark.read(tmp_path / "mark.json") == mark


def test_every_flipped_bit_is_noticed(tmp_path: Path) -> None:
    path, mark = tmp_path / "mark.json", Mark(step=3, loss=0.5)
    mark.write(path)
    content = path.read_bytes()
    for index in range(len(content)):
        for bit in range(8):
            changed = bytearray(content)
            changed[index] ^= 1 << bit
            path.write_bytes(changed)
            with contextlib.suppress(ValueError):
                assert Mark.read(path) == mark, "white space, or a number written otherwise"


def test_a_record_of_another_version_is_named_so(tmp_path: Path) -> None:
    Other(name="x").write(tmp_path / "mark.json")
    with pytest.raises(ValueError, match="written by another version"):
        Mark.read(tmp_path / "mark.json")
