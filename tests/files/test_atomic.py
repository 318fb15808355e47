"""Files that are replaced as a whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.files.atomic import delete_temporaries, replacing, temporary_path


def test_an_error_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(ZeroDivisionError), replacing(path) as file:
        file.write(b"%d" % (1 // 0))
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_whoever_was_superseded_replaces_nothing(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def refuse() -> None:
        raise RuntimeError("superseded")

    with pytest.raises(RuntimeError, match="superseded"), replacing(path, refuse) as file:
        file.write(b"new")
    assert path.read_bytes() == b"old"


def test_temporaries_of_others_are_deleted_files_and_folders(tmp_path: Path) -> None:
    path = tmp_path / "step-1"
    temporary_path(path).write_bytes(b"half")
    folder = temporary_path(path)
    folder.mkdir()
    (folder / "state.pt").write_bytes(b"half")
    delete_temporaries(tmp_path / "step-*")
    assert list(tmp_path.iterdir()) == []
