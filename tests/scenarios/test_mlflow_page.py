"""What people see on MLflow's page: a real server's, in a real browser.

Screenshots are kept in PIPELINE_SCREENSHOTS, if it names a folder.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, sync_playwright

import pipeline
from pipeline.rundir import RunDir
from pipeline.tracking import page
from tests import mlflow_server
from tests.conftest import JOBS

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt install chromium")
WAIT_MILLISECONDS = 60_000
CHART = ".js-plotly-plot .main-svg .trace"
"""What is drawn in a chart."""
PICTURE = "=img[src^=blob]"
Read = Callable[..., str]


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


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"]
        )
        yield launched
        launched.close()


@pytest.fixture
def read(browser: Browser, tmp_path: Path) -> Read:
    """The text of a page, of which a screenshot is kept by name.

    It has to show each of some texts, or elements: `=SELECTOR`.
    """
    folder = Path(os.environ.get("PIPELINE_SCREENSHOTS", tmp_path))
    folder.mkdir(parents=True, exist_ok=True)

    def text(address: str, name: str, *shown: str) -> str:
        tab = browser.new_page(viewport={"width": 1500, "height": 1400})
        tab.goto(address)
        for one in shown:
            wanted = tab.locator(one[1:]) if one.startswith("=") else tab.get_by_text(one)
            wanted.first.wait_for(timeout=WAIT_MILLISECONDS)
        tab.screenshot(path=folder / f"{name}.png")
        content = " ".join(tab.inner_text("body").split())
        tab.close()
        return content

    return text


def test_the_table_of_runs_has_both(server: str, runs: list[pipeline.Result], read: Read) -> None:
    names = [RunDir(Path(result.storage)).name for result in runs]
    read(page.address(server, runs[0].experiment_id), "runs", *names)


def test_a_run_answers_on_its_first_page(
    server: str, runs: list[pipeline.Result], read: Read
) -> None:
    result = runs[0]
    score, constant = (f"{values['roc_auc']:.4g}" for values in (result.metrics, result.baselines))
    text = read(
        page.address(server, result.experiment_id, result.run_id),
        "overview",
        "mlp trained with bce_with_logits on sample:breast_cancer",
        f"roc_auc {score} (a constant prediction: {constant})",
        "validation/roc_auc",
    )
    assert "Finished" in text
    assert "Created by unknown" not in text


@pytest.mark.parametrize(
    ("tab", "sections", "chart"),
    [
        ("model-metrics", ["train", "validation", "validation/baseline"], "gradient_norm"),
        ("system-metrics", ["system/node_0", "system/throughput", "system/throughput/share"],
         "cpu_utilization_percentage"),
    ],
)  # fmt: skip
def test_its_charts_are_drawn_what_was_trained_first(
    server: str,
    runs: list[pipeline.Result],
    read: Read,
    tab: str,
    sections: list[str],
    chart: str,
) -> None:
    result = runs[0]
    address = page.address(server, result.experiment_id, result.run_id)
    text = read(address.replace("?", f"/{tab}?"), tab, chart, f"={CHART}")
    shown = [text.find(f"{section} (") for section in sections]
    assert -1 < shown[0] < shown[1] < shown[2]


def test_the_report_is_among_its_files(
    server: str, runs: list[pipeline.Result], read: Read
) -> None:
    result = runs[0]
    address = page.address(server, result.experiment_id, result.run_id)
    files = "report.html", "environment.json"
    read(address.replace("?", "/artifacts/report.html?"), "report", *files)
    read(address.replace("?", "/artifacts/report/05_roc.png?"), "picture", "05_roc.png", PICTURE)


def test_the_model_has_its_card(server: str, runs: list[pipeline.Result], read: Read) -> None:
    result = runs[0]
    model_id = RunDir(Path(result.storage)).read_recorded().model_id
    address = f"{server}/#/experiments/{result.experiment_id}/models/{model_id}"
    shown = "training rows held", "mean_radius", "validation/roc_auc"
    read(f"{address}?workflowType=machine_learning", "model", *shown)


def test_runs_stand_side_by_side(server: str, runs: list[pipeline.Result], read: Read) -> None:
    experiments, ids = ([one.experiment_id for one in runs], [one.run_id for one in runs])
    address = page.comparison(server, experiments, ids)
    read(address, "comparison", "Comparing 2 Runs from 1 Experiment", "optimizer.lr")
