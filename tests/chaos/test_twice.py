"""The same job started twice at once: one trains, and nothing of the other is written."""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Any

import mlflow
import pytest

from pipeline.errors import UsageError
from pipeline.rundir import RunDir
from tests.chaos import harness
from tests.chaos.harness import Case
from tests.conftest import happened
from tests.processes import FORKED

ALL = (pytest.mark.chaos, pytest.mark.timeout(3600))


def command(tree: dict[str, Any], delay: float, answers: Any) -> None:
    """What `pipeline run` does, in this process; how it ended goes to `answers`."""
    import pipeline

    time.sleep(delay)
    try:
        result = pipeline.run(tree)
        answers.put(("trained", result.curve_sha256))
    except UsageError as error:
        answers.put(("refused", str(error)))


@pytest.mark.parametrize(
    "cases", [pytest.param(50, marks=ALL, id="all"), pytest.param(3, id="some")]
)
def test_one_trains_and_the_other_is_refused(whole: Case, cases: int) -> None:
    base, tree, _ = whole
    undisturbed = harness.fresh(base / "undisturbed")
    assert harness.attempt({**tree, "num_steps": None}, undisturbed, 3) == [0, 0, 0]
    reference = harness.left(undisturbed)
    drawn = random.Random(0)
    for case in range(cases):
        storage = harness.fresh(base / f"storage-{case}")
        started = {**tree, "name": f"twice-{case}", "storage": str(storage)}
        answers = FORKED.Queue()
        together = [
            FORKED.Process(target=command, args=(started, delay, answers))
            for delay in (0.0, drawn.random() * drawn.choice([0, 0.01, 0.3]))
        ]
        for process in together:
            process.start()
        said = dict(answers.get(timeout=120) for _ in together)
        for process in together:
            process.join()
        assert set(said) == {"trained", "refused"}, f"case {case}: {said}"
        assert "is being trained or recorded right now" in said["refused"]
        folder = storage / f"twice-{case}-1"
        assert [place.name for place in storage.glob("twice-*")] == [folder.name]
        assert [event["workers"] for event in happened(folder, "start")] == [1]
        assert harness.left(folder) == reference
        assert RunDir(folder).is_intact
        once_in_mlflow(folder, reference["steps"])


def test_jobs_that_start_at_once_share_a_new_database(whole: Case) -> None:
    """MLflow makes its tables at the first start, which is none of a job's business."""
    base, tree, _ = whole
    storage = harness.fresh(base / "together")
    jobs = [{**tree, "name": f"together-{n}", "storage": str(storage)} for n in range(4)]
    answers = FORKED.Queue()
    together = [FORKED.Process(target=command, args=(job, 0.0, answers)) for job in jobs]
    for process in together:
        process.start()
    said = [answers.get(timeout=240) for _ in together]
    for process in together:
        process.join()
    assert {kind for kind, _ in said} == {"trained"}
    assert len({curve for _, curve in said}) == 1
    for job in jobs:
        once_in_mlflow(storage / f"{job['name']}-1", list(range(1, harness.STEPS + 1)))


def once_in_mlflow(folder: Path, steps: list[int]) -> None:
    recorded = RunDir(folder).read_recorded()
    client = mlflow.MlflowClient(recorded.tracking_uri)
    (run,) = client.search_runs([recorded.experiment_id])
    assert run.info.run_id == recorded.run_id
    assert run.info.status == "FINISHED"
    assert [m.step for m in client.get_metric_history(run.info.run_id, "train/loss")] == steps
