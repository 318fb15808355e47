"""The undisturbed run that all others are compared with."""

from __future__ import annotations

import pytest

from tests.chaos import harness


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> harness.Case:
    """Folder, job spec, and what three workers left that nobody disturbed (in `whole`)."""
    base = tmp_path_factory.mktemp("chaos")
    tree = harness.spec_of(base)
    harness.prepared(tree)
    assert harness.attempt(tree, harness.fresh(base / "whole"), 3) == [0, 0, 0]
    return base, tree, harness.left(base / "whole")
