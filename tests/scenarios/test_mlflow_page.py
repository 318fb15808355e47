"""What people see on MLflow's page: a real server's, in a real browser, read as text.

Screenshots are kept in PIPELINE_SCREENSHOTS, if it names a folder. Charts are not waited for.
"""

from __future__ import annotations

import html
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import pipeline
from pipeline.rundir import RunDir
from pipeline.tracking import page
from tests import mlflow_server
from tests.conftest import JOBS

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt install chromium")
SETTLED_MILLISECONDS = 25_000
"""Of the page's own clock, which runs as fast as the page does."""
SECONDS = 120
Read = Callable[[str, str], str]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with mlflow_server.running(tmp_path_factory.mktemp("server")) as found:
        yield found.uri


@pytest.fixture(scope="module")
def runs(server: str, tmp_path_factory: pytest.TempPathFactory) -> list[pipeline.Result]:
    before = os.environ.get("MLFLOW_TRACKING_URI", "")
    os.environ["MLFLOW_TRACKING_URI"] = server
    storage = str(tmp_path_factory.mktemp("runs"))
    try:
        return [
            pipeline.run(
                JOBS / "breast_cancer.yaml",
                {"training.epochs": 8, "optimizer.lr": rate, "storage": storage},
                fresh=True,
            )
            for rate in (0.003, 0.01)
        ]
    finally:
        os.environ["MLFLOW_TRACKING_URI"] = before


@pytest.fixture
def read(tmp_path: Path) -> Read:
    """The visible text of a page once it has settled, of which a screenshot is kept by name."""
    folder = Path(os.environ.get("PIPELINE_SCREENSHOTS", tmp_path))
    folder.mkdir(parents=True, exist_ok=True)

    def browse(address: str, *options: str) -> str:
        assert CHROMIUM is not None
        return subprocess.run(
            [
                CHROMIUM,
                "--headless=new",
                "--no-sandbox",
                "--disable-gpu",
                "--window-size=1500,1400",
                f"--user-data-dir={tmp_path / 'profile'}",
                f"--virtual-time-budget={SETTLED_MILLISECONDS}",
                *options,
                address,
            ],
            check=True,
            capture_output=True,
            text=True,
            timeout=SECONDS,
        ).stdout

    def text(address: str, name: str) -> str:
        browse(address, f"--screenshot={folder / name}.png")
        assert (folder / f"{name}.png").stat().st_size > 10_000
        shown = re.sub(r"<(script|style)\b.*?</\1>", " ", browse(address, "--dump-dom"), flags=re.S)
        return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", shown)).split())

    return text


def test_the_table_of_runs_has_both(server: str, runs: list[pipeline.Result], read: Read) -> None:
    text = read(page.address(server, runs[0].experiment_id), "runs")
    for result in runs:
        assert RunDir(Path(result.storage)).name in text


def test_a_run_answers_on_its_first_page(
    server: str, runs: list[pipeline.Result], read: Read
) -> None:
    result = runs[0]
    text = read(page.address(server, result.experiment_id, result.run_id), "overview")
    assert "Finished" in text
    assert "mlp trained with bce_with_logits on sample:breast_cancer" in text
    score, constant = (f"{values['roc_auc']:.4g}" for values in (result.metrics, result.baselines))
    assert f"roc_auc {score} (a constant prediction: {constant})" in text
    assert "validation/roc_auc" in text
    assert "Created by unknown" not in text


def test_the_report_is_among_its_files(
    server: str, runs: list[pipeline.Result], read: Read
) -> None:
    result = runs[0]
    address = page.address(server, result.experiment_id, result.run_id)
    text = read(address.replace("?", "/artifacts/report.html?"), "report")
    assert "report.html" in text
    assert "environment.json" in text
    picture = read(address.replace("?", "/artifacts/report/05_roc.png?"), "picture")
    assert "05_roc.png" in picture


def test_the_model_has_its_card(server: str, runs: list[pipeline.Result], read: Read) -> None:
    result = runs[0]
    model_id = RunDir(Path(result.storage)).read_recorded().model_id
    address = f"{server}/#/experiments/{result.experiment_id}/models/{model_id}"
    text = read(f"{address}?workflowType=machine_learning", "model")
    assert "training rows held" in text
    assert "mean_radius" in text
    assert "validation/roc_auc" in text


def test_runs_stand_side_by_side(server: str, runs: list[pipeline.Result], read: Read) -> None:
    experiments, ids = ([one.experiment_id for one in runs], [one.run_id for one in runs])
    text = read(page.comparison(server, experiments, ids), "comparison")
    assert "Comparing 2 Runs from 1 Experiment" in text
    assert "optimizer.lr" in text
