"""`jobs/flights.yaml` beside scikit-learn on the same rows, columns and split.

python -m tests.benchmarks.flights
"""

from __future__ import annotations

import tempfile

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
from tests.conftest import JOBS

JOB = JOBS / "flights.yaml"


def baselines() -> dict[str, tuple[float, float]]:
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
    for name, model in {"Ridge": ridge, "HistGradientBoosting": trees}.items():
        model.fit(inputs[~late], frame["arr_delay"][~late])
        said = pd.Series(model.predict(inputs[late]))
        truth = frame["arr_delay"][late]
        found[name] = (r2_score(truth, said), mean_absolute_error(truth, said))
    return found


def main() -> None:
    """Print one line for each model."""
    with tempfile.TemporaryDirectory() as folder:
        changes = {"storage": folder, "metrics": ["r2", "mae"]}
        metrics = pipeline.run(JOB, changes).metrics
    print(f"{'jobs/flights.yaml':22} R2 {metrics['r2']:.3f}, off by {metrics['mae']:.2f} minutes")
    for name, (r2, error) in baselines().items():
        print(f"{name:22} R2 {r2:.3f}, off by {error:.2f} minutes")


if __name__ == "__main__":
    main()
