"""A model behind `mlflow models serve`, fed with raw rows: what it says is what training saw."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import log_loss

import pipeline
from pipeline.launch.result import Result
from pipeline.rundir import RunDir
from pipeline.rundir.held_out import HeldOut
from tests.processes import free_port

START_SECONDS = 180
ENVIRONMENTS = [
    "this environment",
    pytest.param("its own", marks=(pytest.mark.chaos, pytest.mark.timeout(1800))),
]
"""The second is a new one, with what the model's `requirements.txt` names and nothing else."""
INPUTS = ["rooms", "size", "city", "new"]


@dataclass(frozen=True)
class Task:
    loss: Any
    target: Any
    predicted: list[str]
    """Columns of the served model that `held_out.npz` has too."""
    model: Any = "linear"
    data: Any = None


TASKS = {
    "amounts": Task("mse", "price", ["price"], data={"target_scale": "standard"}),
    "yes or no": Task("bce_with_logits", "sold", ["sold_probability_yes"]),
    "classes": Task(
        "cross_entropy", "kind", [f"kind_probability_{kind}" for kind in ("flat", "house", "loft")]
    ),
    "many labels": Task(
        "bce_with_logits",
        ["balcony", "garden", "lift"],
        [f"{name}_probability_True" for name in ("balcony", "garden", "lift")],
    ),
    "counts": Task("poisson_nll", "visits", ["visits"]),
}


def houses(num_rows: int, seed: int = 0) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    frame = pd.DataFrame(
        {
            "rooms": rng.integers(1, 9, num_rows).astype("float"),
            "size": rng.normal(50, 9, num_rows).round(2),
            "city": rng.choice(["Bonn", "Ulm", "Wien"], num_rows),
            "new": rng.random(num_rows) < 0.5,
        }
    )
    level = frame["size"] / 10 + frame["rooms"]
    frame["price"] = 10 * level + rng.normal(size=num_rows)
    frame["sold"] = np.where(level + rng.normal(size=num_rows) > 9, "yes", "no")
    frame["kind"] = rng.choice(["flat", "house", "loft"], num_rows)
    for name in ("balcony", "garden", "lift"):
        frame[name] = rng.random(num_rows) < 0.4
    frame["visits"] = rng.poisson(level / 4)
    frame["rooms"] = frame["rooms"].astype("Int64")
    frame.loc[::11, "rooms"] = pd.NA
    frame.loc[::13, "city"] = None
    return frame


def trained(folder: Path, name: str) -> tuple[Result, pd.DataFrame]:
    """A run, and its validation rows."""
    task = TASKS[name]
    rows = houses(120, seed=1)
    houses(400).to_csv(folder / "train.csv", index=False)
    rows.to_csv(folder / "held_out.csv", index=False)
    data = {"train": str(folder / "train.csv"), "validation": str(folder / "held_out.csv"),
            "inputs": INPUTS, "target": task.target,
            "missing": {"rooms": "mean", "city": "category"}}  # fmt: skip
    result = pipeline.run(
        {
            "name": "served", "model": task.model, "loss": task.loss,
            "storage": str(folder / "runs"),
            "data": data | (task.data or {}), "training": {"epochs": 20, "batch_size": 32},
            "optimizer": {"name": "adamw", "lr": 0.01},
        }
    )  # fmt: skip
    return result, rows


def downloaded(result: Result, folder: Path) -> Path:
    """The model's files, as they can be copied to any machine."""
    client = mlflow.MlflowClient(result.tracking_uri)
    (output,) = client.get_run(result.run_id).outputs.model_outputs
    location = client.get_logged_model(output.model_id).artifact_location
    folder.mkdir()
    return Path(mlflow.artifacts.download_artifacts(location, dst_path=str(folder)))


@pytest.fixture(scope="module")
def own_environment() -> dict[str, Path]:
    """One for all models: their requirements are the same."""
    return {}


def python_of(environment: str, model: Path, known: dict[str, Path]) -> Path:
    """Python in this environment, or in a new one that holds what the model asks for."""
    if environment == "this environment":
        return Path(sys.executable)
    requirements = (model / "requirements.txt").read_text()
    if requirements not in known:
        folder = model.parent.parent / "environment"
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        python = folder / "bin" / "python"
        subprocess.run(
            [python, "-m", "pip", "install", "-q", "-r", model / "requirements.txt"], check=True
        )
        known[requirements] = python
    return known[requirements]


class Served:
    """`mlflow models serve`, and what it answers."""

    def __init__(self, port: int) -> None:
        self._uri = f"http://127.0.0.1:{port}"

    def is_up(self) -> bool:
        try:
            urllib.request.urlopen(f"{self._uri}/ping", timeout=5)
        except OSError:
            return False
        return True

    def __call__(self, body: dict[str, Any]) -> pd.DataFrame:
        request = urllib.request.Request(
            f"{self._uri}/invocations",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=120) as answer:
            return pd.DataFrame(json.load(answer)["predictions"])


@contextmanager
def serving(python: Path, model: Path) -> Iterator[Served]:
    """The model behind its server, from a folder where this package is not."""
    port = free_port()
    log = (model.parent / "serve.log").open("wb")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "MLFLOW"))}
    process = subprocess.Popen(
        [python, "-I", "-m", "mlflow", "models", "serve", "-m", model, "--port", str(port),
         "--env-manager", "local"],
        cwd=model.parent, stdout=log, stderr=log, start_new_session=True,
        env=environment | {"PATH": f"{python.parent}:{os.environ['PATH']}"},
    )  # fmt: skip
    served = Served(port)
    deadline = time.monotonic() + START_SECONDS
    try:
        while not served.is_up():
            assert process.poll() is None, Path(log.name).read_text()
            assert time.monotonic() < deadline, Path(log.name).read_text()
            time.sleep(0.2)
        yield served
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def as_json(frame: pd.DataFrame) -> dict[str, Any]:
    return {"dataframe_split": json.loads(frame.to_json(orient="split", index=False))}


@pytest.mark.parametrize("environment", ENVIRONMENTS)
@pytest.mark.parametrize("name", TASKS)
def test_raw_rows_get_what_training_predicted_for_them(
    name: str, environment: str, tmp_path: Path, own_environment: dict[str, Path]
) -> None:
    result, rows = trained(tmp_path, name)
    (term,) = HeldOut.read(RunDir(Path(result.storage)).held_out).terms
    wanted = term.prediction.reshape(len(rows), -1)
    model = downloaded(result, tmp_path / "model")
    columns = TASKS[name].predicted
    raw = rows[INPUTS]
    with serving(python_of(environment, model, own_environment), model) as served:
        answer = served(as_json(raw))
        np.testing.assert_allclose(answer[columns], wanted, rtol=1e-6, atol=1e-6)
        # in any order of the columns, beside others, and as records
        shuffled = rows[[*reversed(rows.columns)]].assign(note="by hand")
        again = served({"dataframe_records": json.loads(shuffled.to_json(orient="records"))})
        np.testing.assert_allclose(again[columns], wanted, rtol=1e-6, atol=1e-6)
        # whole numbers where there were fractions, fractions where there were whole numbers
        whole = served(as_json(raw.assign(size=50, rooms=3.0)))
        same = served(as_json(raw.assign(size=50.0, rooms=3)))
        pd.testing.assert_frame_equal(whole, same)
        # what is missing where that has a meaning, even all of it, and a city that nobody knows
        missing = served(as_json(raw.assign(rooms=None, city=None)))
        absent = served(as_json(raw.drop(columns=["rooms", "city"])))
        pd.testing.assert_frame_equal(missing, absent)
        assert np.isfinite(served(as_json(raw.assign(city="Graz")))[columns]).all(axis=None)
        with pytest.raises(urllib.error.HTTPError) as refused:
            served(as_json(raw.drop(columns="size")))
        assert "size" in json.load(refused.value)["message"]
        with pytest.raises(urllib.error.HTTPError) as refused:
            served(as_json(raw.assign(size="large")))
        assert "column 'size' holds string, expected numbers" in json.load(refused.value)["message"]


@pytest.mark.parametrize("environment", ENVIRONMENTS)
def test_lists_of_tokens_get_probabilities_of_their_own_positions(
    environment: str, tmp_path: Path, own_environment: dict[str, Path]
) -> None:
    rng = np.random.default_rng(0)
    frame = pd.DataFrame(
        {"tokens": [rng.integers(0, 9, n).tolist() for n in rng.integers(2, 12, 80)]}
    )
    frame[:60].to_parquet(tmp_path / "train.parquet")
    rows = frame[60:].reset_index(drop=True)
    rows.to_parquet(tmp_path / "held_out.parquet")
    result = pipeline.run(
        {
            "name": "served", "loss": "cross_entropy", "storage": str(tmp_path / "runs"),
            "data": {"train": str(tmp_path / "train.parquet"), "inputs": ["tokens"],
                     "validation": str(tmp_path / "held_out.parquet"), "target": "next",
                     "shift": {"next": "tokens"}},
            "model": {"name": "transformer", "width": 16, "num_layers": 1},
            "training": {"batch_size": 16, "epochs": 3},
        }
    )  # fmt: skip
    model = downloaded(result, tmp_path / "model")
    with serving(python_of(environment, model, own_environment), model) as served:
        answers = [np.array(row) for row in served(as_json(rows))["next"]]
        alone = [np.array(served(as_json(rows[i : i + 1]))["next"][0]) for i in range(3)]
    assert [answer.shape[1] for answer in answers] == [len(row) for row in rows["tokens"]]
    for one, among in zip(alone, answers, strict=False):
        np.testing.assert_allclose(one, among, atol=1e-6)
    probabilities = np.concatenate([answer[:, :-1].T for answer in answers])
    truth = np.concatenate([row[1:] for row in rows["tokens"]])
    loss = log_loss(truth, probabilities, labels=range(9))
    assert loss == pytest.approx(result.metrics["loss"], rel=1e-5)


def test_a_hundred_thousand_rows_take_seconds_in_batches_as_spark_gives_them(
    tmp_path: Path,
) -> None:
    """Slices of a frame that keep their index, a Python process for each."""
    result, _ = trained(tmp_path, "classes")
    model = mlflow.pyfunc.load_model(str(downloaded(result, tmp_path / "model")))
    frame = houses(100_000, seed=2)[INPUTS]
    started = time.perf_counter()
    whole = model.predict(frame)
    seconds = time.perf_counter() - started
    assert len(whole) == 100_000
    assert seconds < 30
    parts = [model.predict(frame[start : start + 10_000]) for start in range(0, 100_000, 10_000)]
    assert pd.concat(parts).index.equals(frame.index)
    columns = TASKS["classes"].predicted
    np.testing.assert_allclose(pd.concat(parts)[columns], whole[columns], atol=1e-6)
    print(f"{seconds:.1f} s for 100 000 rows")
