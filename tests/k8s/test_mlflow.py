"""The MLflow server of the manifests on a real PostgreSQL: whom it answers to."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.kubernetes.rules import Document

from . import mlflow_pod
from .mlflow_pod import PASSWORD, asked, running


@pytest.fixture
def database(tmp_path: Path) -> Iterator[str]:
    with mlflow_pod.database(tmp_path) as uri:
        yield uri


SEARCH = "/api/2.0/mlflow/experiments/search"


def test_it_answers_to_its_names_and_refuses_others(
    built: dict[str, list[Document]], database: str, tmp_path: Path
) -> None:
    folder = tmp_path / "pod"
    folder.mkdir()
    with running(built["local"], database, folder) as port:
        own = (f"mlflow:{port}", f"mlflow.pipeline.svc:{port}", "localhost:8080", "127.0.0.1:9")
        for host in own:
            assert asked(port, SEARCH, host) == 200, host
        for host in (f"evil.com:{port}", "mlflow", f"mlflow.evil.com:{port}"):
            assert asked(port, SEARCH, host) == 403, host


def test_with_passwords_it_answers_to_those_who_know_one(
    built: dict[str, list[Document]], database: str, tmp_path: Path
) -> None:
    """Without the object store's keys, which it needs for artifacts alone."""
    folder = tmp_path / "pod"
    folder.mkdir()
    with running(built["production"], database, folder) as port:
        assert asked(port, SEARCH, f"mlflow:{port}") == 401
        assert asked(port, SEARCH, f"mlflow:{port}", "wrong") == 401
        assert asked(port, SEARCH, "mlflow.example.com", PASSWORD) == 200
        for origin, status in (("https://mlflow.example.com", 200), ("https://evil.com", 403)):
            assert asked(port, SEARCH, "mlflow.example.com", PASSWORD, origin) == status, origin
