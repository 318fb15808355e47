"""Which metrics MLflow gets of a point, and where its page shows them."""

from __future__ import annotations

from pipeline.rundir.records import EvaluationPoint, StepPoint, SystemReading
from pipeline.tracking.values import is_of_system, values_of, values_of_reading


def test_a_step_has_its_losses_and_what_its_time_went_to() -> None:
    point: StepPoint = {
        "step": 3, "time": 1000, "epoch": 0.1, "terms": {"mse": 1.0, "own": None},
        "train": {"loss": 1.0, "gradient_norm": 2.0},
        "throughput": {"rows_per_second": 9.0, "share/exchange": 0.5}, "skipped": [7],
    }  # fmt: skip
    values = {one.key: one.value for one in values_of(point)}
    assert values == {
        "train/loss": 1.0, "train/gradient_norm": 2.0, "train/skipped": 1.0, "train/loss/mse": 1.0,
        "system/throughput/rows_per_second": 9.0, "system/throughput/share/exchange": 0.5,
    }  # fmt: skip
    assert {(one.step, one.time) for one in values_of(point)} == {(3, 1000)}
    of_system = {one.key for one in values_of(point) if is_of_system(one)}
    assert of_system == {key for key in values if "throughput" in key}


def test_the_constants_stand_behind_the_metrics() -> None:
    point: EvaluationPoint = {"step": 0, "time": 1, "epoch": 0, "validation": {"r2": 0.5},
                              "baselines": {"r2": 0.0}}  # fmt: skip
    keys = [one.key for one in values_of(point)]
    assert keys == ["validation/r2", "validation/baseline/r2"]
    assert keys == sorted(keys, key=lambda key: key.rpartition("/")[0])


def test_a_nodes_load_is_under_its_number() -> None:
    reading: SystemReading = {"time": 5, "step": 2, "node": 1, "values": {"gpu_0_power": 3.0}}
    (value,) = values_of_reading(reading)
    assert (value.key, value.value, value.time, value.step) == (
        "system/node_1/gpu_0_power", 3.0, 5, 2,
    )  # fmt: skip
