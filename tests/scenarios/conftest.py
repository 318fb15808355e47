"""A Ray head that the tests of a module share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.ray_head import Head, running_head


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    with running_head(tmp_path_factory.mktemp("home")) as head:
        yield head
