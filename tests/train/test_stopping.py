"""Early stopping: which evaluations count, and the same end on any workers and after a failure."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from pipeline import metrics
from pipeline.distributed import comm
from pipeline.errors import InputError, UsageError
from pipeline.losses.terms import Term
from pipeline.rundir import RunDir
from pipeline.rundir.journal import Reader, curve_sha256
from pipeline.rundir.records import Done, Numbers
from pipeline.spec import load
from pipeline.spec.sections import Stop
from pipeline.train.job import prepare
from pipeline.train.loop import train
from pipeline.train.stopping import EarlyStop, Plateau
from pipeline.train.term_metrics import TermMetric, choose_metrics
from tests.conftest import JOBS, merged
from tests.killed import assert_same_bits, job_of
from tests.processes import on_workers

NAN = float("nan")
next_values: list[float] = []
"""What the metric below gives, one after another."""


@metrics.register("t_told")
def t_told() -> metrics.Metric:
    """Another value on each worker, or one that the test chose."""

    def value(sums: torch.Tensor) -> float:
        return next_values.pop(0) if next_values else 0.1 * comm.rank() * random.random()

    def sums(prediction: torch.Tensor, truth: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return weight.sum()[None]

    return metrics.Metric(("values",), sums, value, lower_is_better=False, baseline=None)


NUM_ROWS = 40


def judged() -> tuple[list[Term], list[TermMetric]]:
    """Loss terms and metrics of a job of amounts."""
    terms = prepare(load(JOBS / "diabetes.yaml"), JOBS).terms
    return terms, choose_metrics(terms, ["r2"])


@pytest.mark.parametrize(
    ("values", "min_delta", "due_after"),
    [
        ([5.0, 4.0, 4.0, 4.5, 4.0], 0.0, 5),  # an equal one is no better
        ([5.0, 4.0, 4.5, 4.5, 3.0, 3.5, 3.5, 3.5], 0.0, 8),  # each gain begins anew
        ([5.0, 4.9, 4.8, 4.7], 0.5, 4),  # small gains are none
        ([5.0, 4.9, 4.8, 4.4, 4.3, 4.3, 4.3], 0.5, 7),  # on the best, not on the last
        ([NAN, None, NAN], 0.0, 3),
        ([5.0, NAN, None, 4.0, 4.0, 4.0, 4.0], 0.0, 7),
    ],
)
def test_it_counts_what_is_no_better(
    values: Sequence[float | None], min_delta: float, due_after: int
) -> None:
    stop = EarlyStop(Stop(patience=3, min_delta=min_delta), [], [])
    stop.update(0, {"loss": 0.0})  # nothing was trained
    for number, value in enumerate(values, 1):
        assert not stop.is_due
        assert stop.reason == ""
        stop.update(number, {"loss": value})
        if number == due_after:
            break
    assert stop.is_due
    assert "3 evaluations" in stop.reason


@pytest.mark.parametrize("cooldown", [0, 2])
@pytest.mark.parametrize("final", [0.0, 0.3])
@pytest.mark.parametrize("metric", ["loss", "r2"])
def test_a_plateau_is_torchs(metric: str, cooldown: int, final: float) -> None:
    """Whose patience is one less: it waits for one more evaluation."""
    terms, chosen = judged()
    for seed in range(30):
        rng = np.random.default_rng(seed)
        values = np.cumsum(rng.normal(0.01, 0.1, 40))
        options = {
            "metric": metric, "factor": 0.6, "patience": 3, "min_delta": 0.05,
            "cooldown": cooldown, "final": final,
        }  # fmt: skip
        own = Plateau(options, terms, chosen)
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        theirs = torch.optim.lr_scheduler.ReduceLROnPlateau(
            optimizer, "min" if metric == "loss" else "max", factor=0.6, patience=2, eps=0,
            threshold=0.05, threshold_mode="abs", cooldown=cooldown, min_lr=final,
        )  # fmt: skip
        for number, value in enumerate(values, 1):
            own.update(number, {metric: float(value)})
            theirs.step(float(value))
            assert own.state["factor"] == pytest.approx(optimizer.param_groups[0]["lr"])


PLATEAU = {"schedule": {"name": "reduce_on_plateau", "metric": "r2", "patience": 2, "factor": 0.5}}


@pytest.mark.processes
def test_the_rate_falls_at_the_same_steps_on_any_workers_and_after_kills(tmp_path: Path) -> None:
    spec = spec_of(tmp_path, stop=None, epochs=6) | PLATEAU
    assert_same_bits(partial(job_of, spec, tmp_path), tmp_path, [8, 19])
    rates = [step["learning_rate"] or 0.0 for step in losses(tmp_path / "on1")]
    assert len(set(rates)) > 2
    for before, after in pairwise(rates):
        assert after in (before, pytest.approx(before / 2))


def spec_of(folder: Path, **training: Any) -> dict[str, Any]:
    """A job whose validation rows say the opposite of its training rows: it soon gets worse."""
    rng = np.random.default_rng(3)
    for split, sign in (("train", 1), ("validation", -1), ("test", 1)):
        a, b = rng.normal(size=(2, NUM_ROWS))
        frame = pd.DataFrame({"a": a, "b": b, "y": sign * (a - b) + 0.5})
        frame.to_parquet(folder / f"{split}.parquet")
    files = {split: str(folder / f"{split}.parquet") for split in ("train", "validation", "test")}
    about = {
        "epochs": 40, "batch_size": 9, "microbatch_size": 2, "evaluate_every": {"steps": 3},
        "stop": {"metric": "r2", "patience": 4},
    }  # fmt: skip
    return {
        "name": "stopped", "loss": "mse", "data": files | {"target": "y"},
        "model": {"name": "mlp", "hidden": [8], "dropout": 0.2},
        "optimizer": {"name": "adamw", "lr": 0.01}, "schedule": "cosine",
        "training": about | training, "checkpoint": {"every_steps": 4},
    }  # fmt: skip


def trained(spec: dict[str, Any], folder: Path, name: str, fails_at: int | None = None) -> None:
    """Train in this process, or with its part among several."""

    def before(step: int) -> None:
        if step == fails_at:
            raise RuntimeError("as asked")

    run = RunDir(folder / name)
    run.path.mkdir(exist_ok=True)
    train(prepare(load(spec), folder), run, before)


def left(folder: Path, name: str) -> tuple[Done, list[int], str]:
    """The result, the steps that were evaluated, and the curve's hash."""
    run = RunDir(folder / name)
    points = list(Reader(run.journal).new())
    evaluated = [point["step"] for point in points if "validation" in point]
    done = Done.read(run.done)
    parts: dict[str, Any] = {"time": 0, "files": {}, "workers": []}
    return done.model_copy(update=parts), evaluated, curve_sha256(points)


def losses(run: Path) -> list[Numbers]:
    """Loss, rate and gradient norm of each step."""
    return [point["train"] for point in Reader(RunDir(run).journal).new() if "train" in point]


def one_of(spec: dict[str, Any], folder: Path, rank: int, num: int) -> None:
    """What one of `num` workers does."""
    trained(spec, folder, f"on-{num}")


@pytest.mark.processes
@pytest.mark.parametrize("best_by", [None, "rmse"])
def test_it_ends_at_the_same_step_on_any_number_of_workers(
    best_by: str | None, tmp_path: Path
) -> None:
    spec = spec_of(tmp_path, best_by=best_by)
    trained(spec, tmp_path, "on-1")
    done, evaluated, _ = alone = left(tmp_path, "on-1")
    assert evaluated == list(range(0, done.steps + 1, 3))
    assert 4 * 3 < done.steps < 100
    assert f"since the {done.ended_early.split()[-4]} of step {done.steps - 12}" in done.ended_early
    assert done.test is not None
    for num in (2, 5):
        on_workers(num, partial(one_of, spec, tmp_path))
        assert left(tmp_path, f"on-{num}") == alone


@pytest.mark.processes
def test_workers_end_together_whatever_their_metrics_say(tmp_path: Path) -> None:
    spec = spec_of(tmp_path, stop={"metric": "t_told", "patience": 3}) | {"metrics": ["t_told"]}
    on_workers(2, partial(one_of, spec, tmp_path))
    assert left(tmp_path, "on-2")[0].steps == 3 * (3 + 1)


def test_what_the_curve_has_decides_when_it_is_recomputed(tmp_path: Path) -> None:
    """Without micro-batches another attempt may get other bits, and so another best."""
    stop = {"metric": "t_told", "patience": 2}
    spec = spec_of(tmp_path, stop=stop, microbatch_size=None) | {"metrics": ["t_told"]}
    next_values[:] = [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]  # after steps 0 to 15
    with pytest.raises(RuntimeError, match="as asked"):
        trained(spec, tmp_path, "run", fails_at=15)
    next_values[:] = [9.0, 0.0, 0.0, 0.0, 0.0, 0.0]  # after step 15 once more, and on
    trained(spec, tmp_path, "run")
    next_values.clear()
    done, evaluated, _ = left(tmp_path, "run")
    assert done.steps == evaluated[-1] == 15 + 2 * 3
    assert "since the 5 of step 15" in done.ended_early


def test_a_failure_changes_nothing(tmp_path: Path) -> None:
    spec = spec_of(tmp_path)
    trained(spec, tmp_path, "undisturbed")
    undisturbed = left(tmp_path, "undisturbed")
    steps = undisturbed[0].steps
    for fails_at in (steps - 1, steps - 6):
        with pytest.raises(RuntimeError, match="as asked"):
            trained(spec, tmp_path, f"failed-{fails_at}", fails_at)
        trained(spec, tmp_path, f"failed-{fails_at}")
        assert left(tmp_path, f"failed-{fails_at}") == undisturbed


def test_a_checkpoint_of_the_last_step_is_not_trained_further(tmp_path: Path) -> None:
    spec = spec_of(tmp_path) | {"checkpoint": {"every_steps": 1}}
    trained(spec, tmp_path, "run")
    run = RunDir(tmp_path / "run")
    before = left(tmp_path, "run")
    run.done.unlink()
    trained(spec, tmp_path, "run")
    assert left(tmp_path, "run") == before


@pytest.mark.parametrize("max_steps", [1, 3, 5, 12])
def test_a_run_of_steps_has_the_curve_of_one_of_epochs(max_steps: int, tmp_path: Path) -> None:
    """A constant learning rate knows no end; an epoch has five steps."""
    more = {"schedule": "constant"}
    trained(spec_of(tmp_path, stop=None, epochs=3) | more, tmp_path, "epochs")
    trained(spec_of(tmp_path, stop=None, max_steps=max_steps) | more, tmp_path, "steps")
    by_epochs, by_steps = (losses(tmp_path / name) for name in ("epochs", "steps"))
    assert len(by_epochs) == 15
    assert by_steps == by_epochs[:max_steps]
    done, evaluated, _ = left(tmp_path, "steps")
    assert evaluated == sorted({*range(0, max_steps + 1, 3), max_steps})
    assert (done.steps, done.ended_early) == (max_steps, "")


def test_ten_epochs_unless_there_is_another_end(tmp_path: Path) -> None:
    def num_steps(**training: Any) -> int:
        return prepare(
            load(spec_of(tmp_path) | {"training": training | {"batch_size": 9}}), tmp_path
        ).num_steps

    assert num_steps() == 50
    assert num_steps(max_steps=70) == 70
    assert num_steps(max_steps=70, epochs=3) == 15
    assert num_steps(max_steps=2, epochs=3) == 2
    assert num_steps(max_steps=None, epochs=None) == 50


@pytest.mark.parametrize(
    ("training", "message"),
    [
        ({"stop": {"metric": "rmsee"}}, "training.stop.metric: no metric 'rmsee'.*did you mean"),
        ({"stop": {"patence": 3}}, "training.stop.patence: unknown key; did you mean 'patience'"),
        ({"stop": {"patience": 0}}, "training.stop.patience: "),
        ({"stop": {"min_delta": -1}}, "training.stop.min_delta: "),
        ({"evaluate_every": {}}, "training.evaluate_every: give either `steps` or `epochs`"),
        ({"evaluate_every": {"steps": 1, "epochs": 1}}, "give either `steps` or `epochs`"),
        ({"evaluate_every": {"step": 1}}, "training.evaluate_every.step: unknown key"),
        ({"evaluate_every": 3}, "training.evaluate_every: "),
        ({"max_steps": 0}, "training.max_steps: "),
    ],
)
def test_faults_name_the_key(training: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises((InputError, UsageError), match=message):
        trained(spec_of(tmp_path, **training), tmp_path, "run")


def test_it_needs_validation_rows_and_a_direction(tmp_path: Path) -> None:
    spec = spec_of(tmp_path)
    with pytest.raises(InputError, match="needs rows to be judged by"):
        load(spec | {"data": spec["data"] | {"validation": None}})
    job = prepare(load(spec), tmp_path)
    chosen = choose_metrics(job.terms, None)
    assert EarlyStop(Stop(metric="r2"), job.terms, chosen)._sign == 1.0
    assert EarlyStop(Stop(metric="rmse"), job.terms, chosen)._sign == -1.0


@pytest.mark.processes
@pytest.mark.parametrize("validation", ["evaluated", None])
def test_the_clock_ends_training_at_a_time_to_evaluate(
    validation: str | None, tmp_path: Path
) -> None:
    spec = spec_of(tmp_path, stop=None, epochs=4)
    if validation is None:
        spec["data"] |= {"validation": None}
    trained(spec, tmp_path, "whole")
    limited = merged(spec, {"training.time_limit": "0.001s"})
    assert load(limited).digest == load(spec).digest
    for num in (1, 3):
        on_workers(num, partial(one_of, limited, tmp_path))
        done, evaluated, _ = left(tmp_path, f"on-{num}")
        assert done.steps == 3
        assert done.ended_early == "the 0.001s of training.time_limit are over"
        assert evaluated == ([0, 3] if validation else [])
        assert losses(tmp_path / f"on-{num}") == losses(tmp_path / "whole")[:3]
        assert done.test is not None


@pytest.mark.processes
def test_time_of_earlier_attempts_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each step takes two seconds, by the clock: five steps, then the rest."""
    spec = spec_of(tmp_path, stop=None, epochs=40, time_limit="17s")
    now = [0.0]

    def later(step: int) -> None:
        now[0] += 2.0

    monkeypatch.setattr("pipeline.train.recorder.time.monotonic", lambda: now[0])
    run = RunDir(tmp_path / "clock")
    run.path.mkdir()
    job = prepare(load(spec), tmp_path)

    def fails(step: int) -> None:
        later(step)
        if step == 5:
            raise RuntimeError("as asked")

    with pytest.raises(RuntimeError, match="as asked"):
        train(job, run, fails)
    now[0] = 1000.0  # of which nothing was training
    train(job, run, later)
    done = Done.read(run.done)
    assert done.steps == 9, "8 s up to the checkpoint of step 4, and 10 s after it"
    assert "17s" in done.ended_early
