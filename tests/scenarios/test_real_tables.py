"""Jobs on real tables beside scikit-learn and statsmodels, on the same training and test rows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from sklearn import metrics as sk
from sklearn.compose import make_column_transformer
from sklearn.linear_model import LogisticRegression, PoissonRegressor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler
from statsmodels.duration.hazard_regression import PHReg

import pipeline
from pipeline.data import locate, reader, split
from tests.conftest import JOBS
from tests.metrics.parts import value_of

pytestmark = pytest.mark.jobs


def rows_of(job: str) -> dict[str, pd.DataFrame]:
    """The rows of each split, as the job has them."""
    data = pipeline.load(JOBS / f"{job}.yaml").data
    source = reader.open_sources(locate.locate(data, JOBS))["train"]
    splitter = split.Splitter(data, source, {})
    parts = [part for block in source.blocks() for part in splitter.split(source, block)]
    names = {part.split for part in parts}
    return {
        name: pd.concat(part.table.to_pandas() for part in parts if part.split == name)
        for name in names
    }


def figures(job: str, storage: Path) -> dict[str, float | None]:
    return pipeline.run(JOBS / f"{job}.yaml", {"storage": str(storage)}).test


def inputs(frame: pd.DataFrame) -> object:
    """Numbers scaled, texts as 0 and 1, as a job does."""
    numbers = frame.select_dtypes("number").columns
    texts = [column for column in frame.columns if column not in numbers]
    return make_column_transformer(
        (StandardScaler(), numbers), (OneHotEncoder(drop="first"), texts)
    )


def test_a_rare_yes_is_found_as_well_as_by_a_logistic_regression(tmp_path: Path) -> None:
    rows = rows_of("caravan")
    train, test = pd.concat([rows["train"], rows["validation"]]), rows["test"]
    columns = train.columns.drop("Purchase")
    own = make_pipeline(
        StandardScaler(), LogisticRegression(C=0.01, class_weight="balanced", max_iter=2000)
    ).fit(train[columns], train["Purchase"] == "Yes")
    score = own.predict_proba(test[columns])[:, 1]
    wanted = sk.average_precision_score(test["Purchase"] == "Yes", score)
    found = figures("caravan", tmp_path)["average_precision"]
    print(f"caravan average_precision {found:.4f}, logistic regression {wanted:.4f}")
    assert found is not None
    assert found > wanted - 0.01


def test_visits_are_told_about_as_well_as_by_a_poisson_regression(tmp_path: Path) -> None:
    rows = rows_of("doctor_visits")
    train, test = pd.concat([rows["train"], rows["validation"]]), rows["test"]
    columns = train.columns.drop("visits")
    own = make_pipeline(inputs(train[columns]), PoissonRegressor(alpha=1e-3, max_iter=1000))
    own.fit(train[columns], train["visits"])
    wanted = sk.mean_poisson_deviance(test["visits"], own.predict(test[columns]))
    found = figures("doctor_visits", tmp_path)["poisson_deviance"]
    print(f"doctor_visits poisson_deviance {found:.4f}, Poisson regression {wanted:.4f}")
    assert found is not None
    assert found < wanted + 0.05


def test_lives_are_ordered_as_well_as_by_coxs_regression(tmp_path: Path) -> None:
    rows = rows_of("flchain")
    train, test = pd.concat([rows["train"], rows["validation"]]), rows["test"]
    columns = train.columns.drop(["futime", "death"])
    mean = train["creatinine"].mean()
    train, test = (frame.fillna({"creatinine": mean}) for frame in (train, test))
    encoded = inputs(train[columns]).fit(train[columns])  # type: ignore[attr-defined]
    own = PHReg(train["futime"], encoded.transform(train[columns]), status=train["death"])
    risk = np.array(encoded.transform(test[columns])) @ own.fit(method="bfgs", disp=0).params
    truth = test[["futime", "death"]].to_numpy(float)
    wanted = value_of("concordance", risk, truth, np.ones(len(test)), [])
    found = figures("flchain", tmp_path)["concordance"]
    print(f"flchain concordance {found:.4f}, Cox's regression {wanted:.4f}")
    assert found is not None
    assert found > wanted - 0.01
