"""Alerts fire on what they are for, by Prometheus's own evaluation (`apt install prometheus`)."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from .conftest import K8S

pytestmark = [
    pytest.mark.processes,
    pytest.mark.skipif(not shutil.which("promtool"), reason="promtool is not installed"),
]
ALERTS = yaml.safe_load((K8S / "components/monitoring/alerts.yaml").read_text())["spec"]
RUN = {"run": "digits-1", "job": "digits"}


@pytest.mark.parametrize(
    ("alert", "minute", "series", "fires"),
    [  # a series' pod follows its name
        ("RunWithoutStep", 20, {"last_step_time": "0x60"}, True),
        ("RunWithoutStep", 5, {"last_step_time": "0x60"}, False),
        ("RunWithoutStep", 20, {"last_step_time": "0+60x60"}, False),
        ("RunLossNotFinite", 5, {"loss": "1 1 NaN NaN NaN NaN"}, True),
        ("RunLossNotFinite", 5, {"loss": "1x9"}, False),
        (
            "RunRestartsWithoutProgress",
            25,
            {"attempts": "1 1 2 2 3 3 4x60", "reached_step": "7x70"},
            True,
        ),
        (
            "RunRestartsWithoutProgress",
            25,
            {"attempts": "1 1 2 2 3 3 4x60", "reached_step": "7+1x70"},
            False,
        ),
        (
            "RunRestartsWithoutProgress",
            25,
            {
                "attempts head-a": "1 1 1 _x60",
                "attempts head-b": "_ _ _ _ 2 2 2 _x60",
                "attempts head-c": "_x9 3x60",
                "reached_step head-c": "7x60",
            },
            True,
        ),
        ("RunCheckpointOld", 80, {"last_checkpoint_time": "0x90"}, True),
        ("RunCheckpointOld", 30, {"last_checkpoint_time": "0x90"}, False),
    ],
)
def test_an_alert_is_there_when_it_should_be(
    alert: str, minute: int, series: dict[str, str], fires: bool, tmp_path: Path
) -> None:
    """After so many minutes of these values, a minute each."""
    (tmp_path / "rules.yml").write_text(yaml.safe_dump(ALERTS))
    (rule,) = [one for one in ALERTS["groups"][0]["rules"] if one["alert"] == alert]
    annotations = {}
    for key, text in rule["annotations"].items():
        for name, value in RUN.items():
            text = text.replace("{{ $labels." + name + " }}", value)
        annotations[key] = text
    expected = {"exp_labels": rule["labels"] | RUN, "exp_annotations": annotations}

    def named(series: str) -> str:
        name, _, pod = series.partition(" ")
        tags = RUN | {"pod": pod or "head"}  # as scraped, with `honorLabels`
        pairs = ", ".join(f'{key}="{value}"' for key, value in tags.items())
        return f"ray_pipeline_{name}{{{pairs}}}"

    case: dict[str, Any] = {
        "interval": "1m",
        "input_series": [
            {"series": named(name), "values": values} for name, values in series.items()
        ],
        "alert_rule_test": [
            {"eval_time": f"{minute}m", "alertname": alert, "exp_alerts": [expected] * fires}
        ],
    }
    tests = {"rule_files": ["rules.yml"], "evaluation_interval": "1m", "tests": [case]}
    (tmp_path / "tests.yml").write_text(yaml.safe_dump(tests))
    done = subprocess.run(
        ["promtool", "test", "rules", "tests.yml"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
