"""`jobs/flights.yaml` beside scikit-learn on the same rows, columns and split."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from typing import Any

import pandas as pd
from sklearn.compose import make_column_transformer
from sklearn.ensemble import HistGradientBoostingRegressor
from sklearn.impute import SimpleImputer
from sklearn.linear_model import Ridge
from sklearn.metrics import mean_absolute_error, r2_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler

import pipeline
from pipeline.data.samples import sample
from tests.benchmarks.harness import Result
from tests.conftest import JOBS

ROUNDS = 1
JOB = JOBS / "flights.yaml"
ALL = ("Ridge", "HistGradientBoosting")


def baselines(names_of_models: tuple[str, ...]) -> dict[str, tuple[float, float]]:
    """R2 and mean absolute error in minutes of each of scikit-learn's models."""
    data = pipeline.load(JOB).data
    frame = sample("sample:flights").to_pandas().dropna(subset=["arr_delay", "dep_delay"])
    late = (frame["time_hour"] >= "2013-11-01").to_numpy()
    inputs = frame[[name for name in data.inputs or [] if name not in data.dates]].copy()
    names = ["carrier", "origin", "dest", "hour"]
    numbers = [name for name in inputs if name not in names]
    inputs[names] = inputs[names].astype("category")
    ridge = make_pipeline(
        make_column_transformer(
            (OneHotEncoder(handle_unknown="ignore"), names),
            (make_pipeline(SimpleImputer(), StandardScaler()), numbers),
        ),
        Ridge(),
    )
    trees = HistGradientBoostingRegressor(categorical_features="from_dtype", random_state=0)
    found = {}
    for name, model in zip(ALL, (ridge, trees), strict=True):
        if name not in names_of_models:
            continue
        model.fit(inputs[~late], frame["arr_delay"][~late])
        said = pd.Series(model.predict(inputs[late]))
        truth = frame["arr_delay"][late]
        found[name] = (r2_score(truth, said), mean_absolute_error(truth, said))
    return found


def results(rounds: int, quick: bool) -> Iterator[Result]:
    """R2 and mean absolute error in minutes of each."""
    changes: dict[str, Any] = {"metrics": ["r2", "mae"]}
    if quick:
        changes["training.epochs"] = 1
    with tempfile.TemporaryDirectory() as folder:
        metrics = pipeline.run(JOB, changes | {"storage": folder}).metrics
    yield {"case": "jobs/flights.yaml", "r2": metrics["r2"], "minutes": metrics["mae"]}
    for name, (r2, minutes) in baselines(("Ridge",) if quick else ALL).items():
        yield {"case": name, "r2": float(r2), "minutes": float(minutes)}
