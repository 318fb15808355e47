"""What a metric must be like, and what it is asked for."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from sklearn import metrics as sk
from torch import nn

import pipeline
from pipeline import registry
from pipeline.checks.job import check
from pipeline.data.sampler import Rows
from pipeline.errors import UsageError
from pipeline.losses.bind import bind
from pipeline.metrics import Metric
from pipeline.spec import load
from pipeline.train.best import BestWeights
from pipeline.train.evaluate import evaluate
from pipeline.train.job import prepare
from pipeline.train.term_metrics import choose_metrics
from tests.conftest import JOBS, built_in
from tests.processes import on_workers

WRONG: dict[str, tuple[Any, Any, str]] = {
    "a mean": (lambda p, t: (p - t).abs().mean()[None], float, "sums that do not add up: "),
    "one number": (lambda p, t: (p - t).abs().sum(), float, "gives sums of shape []: return a v"),
    "no tensor": (lambda p, t: float((p - t).sum()), float, "gives sums of float"),
    "as many as rows": (lambda p, t: (p - t)[:, 0], float, "items and 0 for none"),
    "fails": (lambda p, t: (p - t).sum(0).nothing, float, "AttributeError"),
    "its value": (lambda p, t: (p - t).sum(0)[:1].repeat(2), lambda s: s, "value of shape [2]"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_metric_that_cannot_be_is_refused_before_training(case: str) -> None:
    sums, value, expected = WRONG[case]
    name = f"t wrong: {case}"
    pipeline.metrics.register(name)(lambda: Metric(("values",), sums, value))
    spec = load(JOBS / "diabetes.yaml", {"metrics": [name]})
    with pytest.raises(UsageError) as raised:
        check(prepare(spec, JOBS))
    assert expected in str(raised.value)
    assert f"{name} ({__file__}:" in str(raised.value)


def test_best_by_asks_a_custom_metric_which_way_is_better() -> None:
    def own(lower: bool | None) -> Metric:
        return Metric(("values",), registry.metrics["mae"].build().sums, float, lower)

    for lower in (None, True, False):
        pipeline.metrics.register(f"t_way_{lower}")(lambda lower=lower: own(lower))
    terms = bind(load(JOBS / "diabetes.yaml"), prepare(load(JOBS / "diabetes.yaml"), JOBS).fields)
    for lower in (True, False):
        named = choose_metrics(terms, [f"t_way_{lower}"])
        assert BestWeights(f"t_way_{lower}", terms, named).lower_is_better is lower
    with pytest.raises(UsageError, match="which way is better: Metric"):
        BestWeights("t_way_None", terms, choose_metrics(terms, ["t_way_None"]))
    for name in built_in("metrics"):
        gains = ("accuracy", "f1", "precision", "recall", "r2", "auc", "concordance")
        is_error = None if name == "coverage" else not name.endswith(gains)
        assert registry.metrics[name].build().lower_is_better == is_error, name


def test_a_metric_that_divides_by_nothing_has_no_value() -> None:
    def sums(prediction: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
        return torch.zeros(2)

    pipeline.metrics.register("t_nothing")(
        lambda: Metric(("values",), sums, lambda s: float(s[0]) / float(s[1]))
    )
    job = prepare(load(JOBS / "diabetes.yaml", {"metrics": ["t_nothing", "rmse"]}), JOBS)
    check(job)
    bound = job.objective()
    assert job.validation is not None
    named = choose_metrics(bound.terms, job.spec.metrics)
    found = evaluate(bound, job.validation, np.arange(9), 4, named, torch.device("cpu")).values
    assert found["t_nothing"] is not None
    assert np.isnan(found["t_nothing"])


def test_a_model_that_draws_in_evaluation_draws_the_same_whoever_evaluates() -> None:
    spec = load(JOBS / "digits.yaml")
    job = prepare(spec, JOBS)
    bound = job.objective()
    assert job.validation is not None

    def dropped(module: nn.Module, given: Any, made: torch.Tensor) -> torch.Tensor:
        return nn.functional.dropout(made, 0.5)

    next(m for m in bound.modules() if isinstance(m, nn.Linear)).register_forward_hook(dropped)
    found = []
    for seed in (1, 2):  # as generators of workers stand anywhere
        torch.manual_seed(seed)
        metrics = choose_metrics(bound.terms, None)
        cpu = torch.device("cpu")
        found.append(evaluate(bound, job.validation, np.arange(11), 4, metrics, cpu).values)
    assert found[0] == found[1]


def evaluated(name: str, rank: int, num: int) -> dict[str, float | None]:
    spec = load(JOBS / f"{name}.yaml", {"metrics": METRICS[name], "training.precision": "float64"})
    job = prepare(spec, JOBS)
    bound = job.objective()
    assert job.validation is not None
    rows: Rows = np.arange(11)  # in batches of 4: three batches, so five workers leave two idle
    metrics = choose_metrics(bound.terms, spec.metrics)
    return evaluate(bound, job.validation, rows, 4, metrics, torch.device("cpu")).values


METRICS = {
    "digits": ["accuracy", "f1", "roc_auc"],
    "multi_term": ["accuracy", "r2", "precision", "median_absolute_error"],
}


@pytest.mark.parametrize("num", [2, 3, 5])
@pytest.mark.parametrize("name", METRICS)
def test_metrics_on_several_workers_are_those_of_one(name: str, num: int) -> None:
    alone = evaluated(name, 0, 1)
    assert {"loss", *METRICS[name]} <= set(alone)
    for found in on_workers(num, partial(evaluated, name)):
        assert found == pytest.approx(alone, rel=1e-12)


@pipeline.metrics.register("t_auc")
def auc() -> Metric:
    """Area under the ROC curve, from counts in a thousand bins of probability."""

    def sums(prediction: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
        bins = (prediction.double() * 10_000).long().clamp(0, 9_999)
        both = [torch.bincount(bins[truth == side], minlength=10_000) for side in (False, True)]
        return torch.cat(both).double()

    def value(counts: torch.Tensor) -> float:
        no, yes = counts.reshape(2, -1)
        below = no.cumsum(0) - no / 2
        return float((yes * below).sum() / (yes.sum() * no.sum()))

    return Metric(("binary",), sums, value, reads="probabilities")


@pipeline.metrics.register("t_silent")
def silent() -> Metric:
    return Metric(("binary",), lambda p, t: (p == t).sum()[None].double(), float)


def test_a_custom_metric_reads_probabilities_if_it_says_so() -> None:
    made = prepare(load(JOBS / "breast_cancer.yaml", {"metrics": ["t_auc"]}), JOBS)
    bound = made.objective()
    rows = np.arange(made.num_rows)
    metrics = choose_metrics(bound.terms, ["t_auc"])
    found = evaluate(bound, made.train, rows, 50, metrics, torch.device("cpu")).values
    batch = made.train.gather(rows)
    with torch.no_grad():
        said = bound.terms[0].served(None, bound.predict(batch))
    truth = bound.terms[0].truth(batch)[0]
    assert found["t_auc"] == pytest.approx(sk.roc_auc_score(truth, said), abs=2e-3)
    assert abs(float(found["t_auc"] or 0) - 0.5) > 0.01


def test_a_custom_metric_that_does_not_say_what_it_reads_is_refused() -> None:
    made = prepare(load(JOBS / "breast_cancer.yaml"), JOBS)
    bound = made.objective()
    with pytest.raises(UsageError, match=r'does not say what it reads .* reads="labels"'):
        choose_metrics(bound.terms, ["t_silent"])


@pytest.mark.parametrize("name", ["digits", "breast_cancer", "diabetes"])
def test_a_prediction_that_is_no_number_leaves_no_metric_a_value(name: str) -> None:
    """Labels, ranks and medians would not show it, and `best_by` would keep its weights."""
    job = prepare(load(JOBS / f"{name}.yaml"), JOBS)
    bound = job.objective()
    assert job.validation is not None
    last = [m for m in bound.modules() if isinstance(m, nn.Linear)][-1]
    seen = []

    def spoil(module: nn.Module, given: Any, made: torch.Tensor) -> torch.Tensor:
        seen.append(len(made))
        return made if len(seen) > 1 else made.clone().fill_(torch.nan)

    last.register_forward_hook(spoil)
    names = registry.metrics.entries
    task = bound.terms[0].target.task(bound.terms[0])
    fitting = [
        one for one in built_in("metrics")
        if task in names[one].build().tasks
        and names[one].build().reading(task) in bound.terms[0].target.readable(bound.terms[0])
    ]  # fmt: skip
    metrics = choose_metrics(bound.terms, fitting)
    rows = np.arange(9)
    found = evaluate(bound, job.validation, rows, 4, metrics, torch.device("cpu")).values
    assert len(found) > 4
    assert all(np.isnan(value) for key, value in found.items() if value is not None)
