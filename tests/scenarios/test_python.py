"""`pipeline.run` from Python: a script without a main guard, a thread as notebooks have, Ctrl-C."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
import pytest

import pipeline
from pipeline.errors import NonFiniteError, RecordError, SpecError, UsageError
from pipeline.rundir import RunDir
from pipeline.tracking import process
from tests.conftest import JOBS, Command, Write


@pytest.mark.ray
def test_a_script_without_a_main_guard_trains_on_two_workers(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(
        textwrap.dedent(f"""
            import pipeline
            result = pipeline.run({str(JOBS / "linear.yaml")!r},
                                  overrides={{"workers.num": 2, "training.epochs": 3}})
            print(result.run_id, len(result.losses), result.model.predict)
        """)
    )
    done = subprocess.run(
        [sys.executable, str(script)], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[1] == "3"


def test_it_runs_in_a_thread_that_is_not_the_main_one(tmp_path: Path) -> None:
    found: list[pipeline.Result] = []
    overrides = {"training.epochs": 3, "storage": str(tmp_path)}
    thread = threading.Thread(
        target=lambda: found.append(pipeline.run(JOBS / "linear.yaml", overrides))
    )
    thread.start()
    thread.join(120)
    assert found[0].steps == 3


def test_a_mapping_is_a_spec_too(tmp_path: Path) -> None:
    spec = {
        "name": "mapping", "data": {"train": "sample:diabetes", "target": "progression"},
        "model": "linear", "loss": "mse", "training": {"epochs": 1, "batch_size": 200},
        "storage": str(tmp_path),
    }  # fmt: skip
    result = pipeline.run(spec)
    assert result.steps == 3
    assert result.metrics == {}


@pytest.mark.chaos
def test_two_runs_of_one_spec_give_the_same_bits(tmp_path: Path) -> None:
    overrides = {"training.epochs": 3, "model.dropout": 0.5, "storage": str(tmp_path)}
    one, two = (pipeline.run(JOBS / "diabetes.yaml", overrides, fresh=True) for _ in range(2))
    assert one.curve_sha256 == two.curve_sha256
    assert one.weights_sha256 == two.weights_sha256
    other = pipeline.run(JOBS / "diabetes.yaml", overrides | {"training.seed": 1})
    assert other.curve_sha256 != one.curve_sha256


def test_a_spec_error_names_the_line(job: Write) -> None:
    with pytest.raises(SpecError, match=r"line \d+, training\.epochs"):
        pipeline.run(job({"training.epochs": 0}))


def test_json_ends_with_one_object(job: Write, command: Command) -> None:
    code, out, _ = command("run", job(), "--json")
    assert code == 0
    found = json.loads(out.splitlines()[-1])
    assert len(out.splitlines()) == 1
    wanted = {"run_id", "tracking_uri", "state", "steps", "loss", "metrics", "curve_sha256",
              "weights_sha256", "storage"}  # fmt: skip
    assert wanted <= set(found)
    assert found["state"] == "finished"
    assert found["steps"] == 2 * 3


def test_check_in_json_tells_what_it_saw(job: Write, command: Command) -> None:
    code, out, _ = command("check", job({"training.batch_size": 1000}), "--json")
    found = json.loads(out)
    assert code == 0
    assert (found["rows"], found["validation_rows"]) == (17, 7)
    assert "training.batch_size" in found["notices"][0]


def test_a_run_that_explodes_fails_with_the_step_and_is_marked_failed(
    job: Write, command: Command
) -> None:
    path = job({"optimizer.lr": 1e12, "training.epochs": 50})
    code, out, err = command("run", path, "--json")
    assert code == 1
    assert "step" in err
    assert "mse = " in err
    runs = path.parent / "runs"
    (folder,) = [p for p in runs.iterdir() if p.name.startswith("small-")]
    record = json.loads((folder / "recorded.json").read_text())
    run = mlflow.MlflowClient(record["tracking_uri"]).get_run(record["run_id"])
    assert run.info.status == "FAILED"
    said = json.loads(out.splitlines()[-1])
    assert (said["state"], said["storage"], said["run_id"]) == (
        "failed", str(folder), record["run_id"],
    )  # fmt: skip


def test_an_error_of_python_keeps_its_type(job: Write) -> None:
    with pytest.raises(NonFiniteError) as raised:
        pipeline.run(job({"optimizer.lr": 1e12, "training.epochs": 50}))
    assert raised.value.step > 1


def test_a_dead_tracking_server_leaves_a_trained_run_that_sync_can_finish(
    job: Write, monkeypatch: pytest.MonkeyPatch, command: Command
) -> None:
    from pipeline.tracking import uploader

    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("PIPELINE_UPLOAD_PATIENCE_SECONDS", "1")
    path = job()
    code, out, err = command("run", path, "--json")
    assert code == 3, err
    found = json.loads(out.splitlines()[-1])
    assert found["state"] == "unrecorded"
    assert len(found["weights_sha256"]) == 64
    assert f"pipeline sync {found['storage']}" in err
    server_is_back = f"sqlite:///{path.parent / 'mlflow.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server_is_back)
    code, out, err = command("sync", found["storage"])
    assert code == 0, err
    recorded = json.loads((Path(found["storage"]) / "recorded.json").read_text())
    client = mlflow.MlflowClient(server_is_back)
    assert len(client.get_metric_history(recorded["run_id"], "train/loss")) == found["steps"]
    assert uploader.PATIENCE_SECONDS > 1


def test_record_errors_carry_the_result(job: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("PIPELINE_UPLOAD_PATIENCE_SECONDS", "1")
    with pytest.raises(RecordError) as raised:
        pipeline.run(job())
    assert raised.value.result.steps == 6  # type: ignore[attr-defined]


def test_a_loss_that_is_not_finite_names_its_rows_and_keeps_them(job: Write) -> None:
    lines = ["a,b,y", *(f"{i}.5,{i % 3},{i}.25" for i in range(20))]
    lines[1 + 13] = "1e30,1,13.25"
    path = job(
        {"data": {"train": "data.csv", "target": "y", "scale": "none"},
         "training": {"epochs": 2, "batch_size": 8, "microbatch_size": 1, "shuffle": False},
         "optimizer": {"name": "sgd", "lr": 1e-6}},
        data="\n".join(lines),
    )  # fmt: skip
    with pytest.raises(NonFiniteError, match=r"1 training rows .counted from 0: 13;") as raised:
        pipeline.run(path)
    assert raised.value.step == 2
    assert raised.value.rows == (13,)
    kept = json.loads((path.parent / "runs" / "small-1" / "nonfinite.json").read_text())
    assert kept["rows"] == [13]
    assert kept["losses"] == {"mse": "inf"}
    recorded = json.loads((path.parent / "runs" / "small-1" / "recorded.json").read_text())
    client = mlflow.MlflowClient(recorded["tracking_uri"])
    losses = client.get_metric_history(recorded["run_id"], "train/loss")
    assert [metric.step for metric in losses] == [1], "what led up to it is on record"
    run = client.get_run(recorded["run_id"])
    assert run.info.status == "FAILED"
    assert run.data.tags["pipeline.error"].startswith("step 2: gradient norm")
    result = pipeline.run(path, {"training.skip_nonfinite": 9})
    assert result.run_id == recorded["run_id"], "it goes on"
    run = client.get_run(recorded["run_id"])
    assert run.info.status == "FINISHED"
    assert "pipeline.error" not in run.data.tags


def test_steps_that_are_not_finite_can_be_left_out(job: Write, command: Command) -> None:
    lines = ["a,b,y", *(f"{i}.5,{i % 3},{i}.25" for i in range(20))]
    lines[1 + 13] = "1e30,1,13.25"
    about = {
        "data": {"train": "data.csv", "target": "y", "scale": "none"}, "optimizer.lr": 1e-6,
        "training": {"epochs": 2, "batch_size": 8, "microbatch_size": 1, "shuffle": False,
                     "skip_nonfinite": 2},
    }  # fmt: skip
    path = job(about, data="\n".join(lines))
    code, out, err = command("run", path, "--json")
    assert code == 0, err
    assert "step 2 is skipped: not finite, from rows 13" in err
    found = json.loads(out.splitlines()[-1])
    client = mlflow.MlflowClient(found["tracking_uri"])
    skipped = client.get_metric_history(found["run_id"], "train/skipped")
    assert [metric.step for metric in skipped] == [2, 5]
    losses = client.get_metric_history(found["run_id"], "train/loss")
    assert [metric.step for metric in losses] == [1, 3, 4, 6]
    about["training"] = {**about["training"], "skip_nonfinite": 1}  # type: ignore[dict-item]
    path = job(about, data="\n".join(lines))
    code, _, err = command("run", path, "--fresh")
    assert code == 1
    assert "step 2 is skipped" in err
    assert "step 5: gradient norm" in err


def test_a_validation_without_a_value_is_reported_and_not_a_crash(
    job: Write, command: Command
) -> None:
    path = job({"data.validation": 0.05})  # one row: no R2
    code, out, err = command("run", path)
    assert code == 0, err
    assert "validation r2 no value" in out


def test_a_second_run_after_loading_a_model_is_recorded_where_the_first_is(job: Write) -> None:
    path = job()
    first = pipeline.run(path)
    assert first.model is not None
    assert pipeline.run(path, fresh=True).tracking_uri == first.tracking_uri


def test_a_target_with_an_odd_name_is_recorded(job: Write) -> None:
    data = "a,b,price ($)\n" + "".join(f"{i},{i % 3},{i}.5\n" for i in range(20))
    terms = [{"name": "mse", "weight": w, "prediction": f"p{w}"} for w in (1, 2)]
    terms[1]["label"] = "second"
    result = pipeline.run(job({"data.target": "price ($)", "loss": terms}, data=data))
    assert result.state == "finished"


def test_a_loss_in_the_script_itself_is_refused_before_training(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(
        textwrap.dedent(f"""
            import pipeline
            @pipeline.losses.register("own")
            def own(prediction, target):
                return (prediction - target) ** 2
            pipeline.run({str(JOBS / "linear.yaml")!r}, {{"loss": "own"}})
        """)
    )
    done = subprocess.run(
        [sys.executable, str(script)], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert "put it in a file and pass imports=" in done.stderr


def test_what_a_custom_module_imports_beside_it_is_copied_too(job: Write, tmp_path: Path) -> None:
    (tmp_path / "beside_it.py").write_text("FACTOR = 2.0\n")
    own = tmp_path / "with_sibling.py"
    own.write_text(
        "import pipeline\nfrom beside_it import FACTOR\n"
        '@pipeline.losses.register("with_sibling")\n'
        "def with_sibling(prediction, target):\n"
        "    return FACTOR * (prediction - target) ** 2\n"
    )
    result = pipeline.run(job({"loss": "with_sibling"}), imports=[str(own)])
    assert (Path(result.storage) / "imports" / "beside_it.py").exists()
    assert result.state == "finished"


@pytest.mark.parametrize("num_workers", [1, pytest.param(2, marks=pytest.mark.ray)])
def test_ctrl_c_ends_cleanly_and_the_run_is_marked_killed(job: Write, num_workers: int) -> None:
    path = job({"training.epochs": 100_000, "workers.num": num_workers})
    process = subprocess.Popen(
        [sys.executable, "-m", "pipeline", "run", str(path)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    runs = path.parent / "runs"
    deadline = time.monotonic() + 60
    while not list(runs.glob("small-*/curve.jsonl")) and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(1)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    (folder,) = runs.glob("small-*")
    record = json.loads((folder / "recorded.json").read_text())
    run = mlflow.MlflowClient(record["tracking_uri"]).get_run(record["run_id"])
    assert run.info.status == "KILLED"


def test_an_uploader_that_is_killed_is_started_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = process.start, []

    def start(run: RunDir) -> subprocess.Popen[bytes]:
        calls.append(run)
        return real(run)

    def kill(given: subprocess.Popen[bytes], run: RunDir) -> subprocess.Popen[bytes]:
        given.kill()
        return given

    monkeypatch.setattr(process, "start", start)
    monkeypatch.setattr(process, "hand_over", kill)
    result = pipeline.run(JOBS / "linear.yaml", {"training.epochs": 3, "storage": str(tmp_path)})
    assert len(calls) == 1
    assert result.state == "finished"
    assert mlflow.MlflowClient(result.tracking_uri).get_run(result.run_id).info.status == "FINISHED"


def test_a_copy_in_the_storage_itself_is_refused(tmp_path: Path) -> None:
    places = {"storage": str(tmp_path), "checkpoint.copy_to": str(tmp_path)}
    with pytest.raises(UsageError, match="is `storage` itself"):
        pipeline.run(JOBS / "linear.yaml", places)


def test_predicting_one_class_is_reported_at_the_end_and_in_mlflow(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rows = {"a": rng.normal(size=400), "y": np.where(np.arange(400) % 20 == 0, "yes", "no")}
    pd.DataFrame(rows).to_csv(tmp_path / "rows.csv", index=False)
    for loss in ("bce_with_logits", "cross_entropy"):
        told: list[str] = []
        result = pipeline.run(
            {
                "name": loss.replace("_", "-"), "loss": loss, "model": "linear",
                "storage": str(tmp_path / "runs"), "training": {"epochs": 20},
                "optimizer": {"name": "adam", "lr": 0.05},
                "data": {"train": str(tmp_path / "rows.csv"), "target": "y", "validation": 0.5},
            },
            say=told.append,
        )  # fmt: skip
        share = next(point for point in reversed(result.curve) if "validation" in point)
        assert share["validation"]["accuracy"] > 0.9
        expected = f"predicts only 'no'; {share['validation']['accuracy']:.1%} of the rows"
        assert any(expected in line for line in told), told
        run = mlflow.MlflowClient(result.tracking_uri).get_run(result.run_id)
        assert expected in run.data.tags["pipeline.warning"]
