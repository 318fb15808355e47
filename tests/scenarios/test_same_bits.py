"""Every job, whole: the same bits on one, two, three and four workers."""

from __future__ import annotations

import json
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import plugins
from pipeline.rundir import RunDir
from pipeline.rundir.journal import Reader, curve_sha256
from pipeline.spec import load
from pipeline.train.job import prepare
from pipeline.train.loop import train
from tests.conftest import JOBS
from tests.processes import on_workers

TRANSFORMER = "transformer, ragged lists"
JOB_NAMES = [*sorted(path.stem for path in JOBS.glob("*.yaml")), TRANSFORMER]
LOW = "transformer in bfloat16"
LEAST_STEPS = 200


def transformer(folder: Path) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    tokens = [list(map(int, rng.integers(0, 9, n))) for n in rng.integers(1, 12, 60)]
    pq.write_table(pa.table({"tokens": tokens}), folder / "rows.parquet")
    return {
        "name": "t", "loss": "cross_entropy",
        "data": {"train": str(folder / "rows.parquet"), "inputs": ["tokens"], "target": "next",
                 "shift": {"next": "tokens"}, "validation": 0.2},
        "model": {"name": "transformer", "width": 16, "num_layers": 1, "dropout": 0.2},
        "training": {"batch_size": 13, "bucket_by": "tokens"},
    }  # fmt: skip


def trained(name: str) -> tuple[int, str, str]:
    """Steps, and the SHA-256 of curve and weights, of this process's part in the run."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        is_made = name in (TRANSFORMER, LOW)
        source: Any = transformer(folder) if is_made else JOBS / f"{name}.yaml"
        spec = load(source)
        rows = prepare(spec, JOBS).num_rows
        size = min(spec.training.batch_size, rows)
        changes: dict[str, Any] = {
            "training.microbatch_size": max(size // 5, 1),  # at least five, the last one short
            "training.epochs": -(-LEAST_STEPS // -(-rows // size)),
        }
        if name == LOW:
            changes["training.precision"] = "bfloat16"
        if spec.model.name == "mlp":
            changes["model.dropout"] = 0.1
        train(prepare(load(source, changes), JOBS), RunDir(folder))
        done = folder / "done.json"
        if not done.exists():  # the first worker writes
            return 0, "", ""
        points = list(Reader(folder / "curve.jsonl").new())
        validation = json.dumps([p["validation"] for p in points if "validation" in p])
        found = json.loads(done.read_text())
        return found["steps"], curve_sha256(points) + validation, found["weights_sha256"]


def all_jobs(rank: int, num: int) -> dict[str, tuple[int, str, str]]:
    plugins.load([str(JOBS / "custom_loss.py")])
    return {name: trained(name) for name in (*JOB_NAMES, LOW)}


@cache
def on(num: int) -> dict[str, tuple[int, str, str]]:
    first: dict[str, tuple[int, str, str]] = on_workers(num, all_jobs)[0]
    return first


@pytest.mark.jobs
@pytest.mark.parametrize(
    "num", [3, *(pytest.param(num, marks=pytest.mark.chaos) for num in (2, 4))]
)
@pytest.mark.parametrize("name", [*JOB_NAMES, LOW])
def test_a_whole_job_has_the_same_bits_on_any_number_of_workers(name: str, num: int) -> None:
    steps, *_ = alone = on(1)[name]
    assert steps >= LEAST_STEPS
    assert on(num)[name] == alone
