"""A run's description: right while it trains, after it failed, and when it is done."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import mlflow
import pytest

import pipeline
from pipeline.rundir import RunDir
from pipeline.rundir.journal import Reader
from pipeline.rundir.records import Ended, Record
from pipeline.tracking.note import UNPROVED, Progress, ProofLink, describe, with_proof
from tests.conftest import Write


@pytest.fixture
def finished(job: Write) -> tuple[Any, RunDir, Record]:
    result = pipeline.run(job({"data.missing": "drop"}))
    run = RunDir(Path(result.storage))
    return result, run, Record.read(run.record)


def test_a_finished_run_says_what_was_trained_and_how_good_it_is(finished: Any) -> None:
    result, run, record = finished
    client = mlflow.MlflowClient(result.tracking_uri)
    note = client.get_run(result.run_id).data.tags["mlflow.note.content"]
    progress = Progress().after(Reader(run.journal).new())
    assert note == describe(record, progress, run.read_recorded(), Ended(state="finished"))
    assert "trained with **mse** on `" in note
    assert f"**Finished** after {result.steps} steps." in note
    for name, value in result.metrics.items():
        assert f"{name} {value:.4g}" in note
    assert f"(a constant prediction: {result.baselines['rmse']:.4g})" in note
    assert f"/experiments/{run.read_recorded().experiment_id}/runs/{result.run_id}/" in note
    assert f"/models/{run.read_recorded().model_id}" in note
    assert UNPROVED in note


def test_a_run_that_trains_or_failed_says_how_far_it_came(finished: Any) -> None:
    _, run, record = finished
    points = list(Reader(run.journal).new())
    halfway = Progress().after(point for point in points if point["step"] <= 3)
    recorded = run.read_recorded()
    training = describe(record, halfway, recorded)
    assert f"**Training**: step 3 of {record.num_steps} at 20" in training
    failed = describe(record, halfway, recorded, Ended(state="failed", reason="no\nroom"))
    assert f"**Failed** after step 3 of {record.num_steps}: no. The same" in failed
    again = replace(halfway, starts=halfway.starts * 2)
    assert "| workers | 1, 1 (an attempt each) |" in describe(record, again, recorded)
    before = describe(record, Progress(), recorded)
    assert "**Training**: step 0 of" in before


def test_a_proof_is_linked_whether_it_comes_before_or_after(finished: Any) -> None:
    _, run, record = finished
    proof = ProofLink(is_kept=True, run_id="abc", time=86_400_000)
    recorded = run.read_recorded()
    note = describe(record, Progress(), recorded)
    linked = describe(record, Progress(), recorded, proof=proof)
    assert (
        with_proof(note, proof, recorded.experiment_id).split(" at 2")[0]
        == linked.split(" at 2")[0]
    )
    assert "[proved](#/experiments/1/runs/abc) on 1970-01-02" in linked
    assert "**broken**" in describe(
        record, Progress(), recorded, proof=replace(proof, is_kept=False)
    )
