"""Broken specs and data: each is refused with the key or column named, and exit code 2."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.conftest import Command, Write, rows

Changes = dict[str, Any]

# what is changed in a valid spec, and what the message must say
SPECS: dict[str, tuple[Changes, list[str]]] = {
    "an unknown key": ({"datta": {}}, ["datta", "did you mean 'data'"]),
    "an unknown key in data": ({"data.trian": "x"}, ["data.trian", "'train'"]),
    "an unknown key in training": ({"training.epoch": 1}, ["training.epoch", "'epochs'"]),
    "an unknown key in workers": ({"workers.nums": 1}, ["workers.nums", "'num'"]),
    "an unknown key in tracking": ({"tracking.exp": "e"}, ["tracking.exp", "experiment"]),
    "no name": ({"name": None}, ["name", "missing"]),
    "no data": ({"data": None}, ["data", "missing"]),
    "no training rows": ({"data.train": None}, ["data.train", "missing"]),
    "an object store as storage": ({"storage": "s3://k:s@b/x"}, ["storage", "MLFLOW_TRACKING_URI"]),
    "no model": ({"model": None}, ["model", "missing"]),
    "no loss": ({"loss": None}, ["loss", "missing"]),
    "an empty list of losses": ({"loss": []}, ["loss", "at least 1"]),
    "an unkncustom loss": ({"loss.name": "mze"}, ["loss.name", "'mze'", "'mse'"]),
    "an unknown model": ({"model.name": "mpl"}, ["model.name", "'mpl'", "'mlp'"]),
    "an unknown optimizer": ({"optimizer.name": "adamv"}, ["optimizer.name", "'adam"]),
    "an unknown schedule": ({"schedule": "cosin"}, ["schedule", "'cosin'", "'cosine'"]),
    "an unknown metric": ({"metrics": ["acuracy"]}, ["metrics", "'acuracy'", "'accuracy'"]),
    "an unknown option of a loss": ({"loss.delta": 1}, ["loss.delta", "unknown key"]),
    "an unknown option of a model": ({"model.hiden": [2]}, ["model.hiden"]),
    "an unknown option of an optimizer": ({"optimizer.rate": 1}, ["optimizer.rate", "lr"]),
    "a missing option": ({"loss": {"name": "kl_div"}}, ["loss.per", "missing"]),
    "a mean that kl_div refuses": (
        {"loss": {"name": "kl_div", "per": "mean"}}, ["loss.per", "'element' or 'batch'", "'mean'"],
    ),
    "a negative learning rate": ({"optimizer.lr": -1}, ["optimizer.lr", "-1"]),
    "a learning rate of text": ({"optimizer.lr": "fast"}, ["optimizer.lr", "'fast'"]),
    "a learning rate that is not a number": ({"optimizer.lr": float("nan")}, ["optimizer.lr"]),
    "no epochs": ({"training.epochs": 0}, ["training.epochs", "0"]),
    "half an epoch": ({"training.epochs": 0.5}, ["training.epochs", "0.5"]),
    "epochs in words": ({"training.epochs": "six"}, ["must be a whole number, found 'six'"]),
    "two columns that are not there": (
        {"data.target": "price", "data.scale": {"areas": "log"}},
        ["data.target: no column 'price'", "data.scale: 'areas' is not an input column"],
    ),
    "a folder that SQLite's address cannot have": (
        {"storage": "/tmp/100%25"}, ["storage: /tmp/100%25", "MLFLOW_TRACKING_URI"],
    ),
    "weights of a class that is none": (
        {"data.target": "color", "loss": {"name": "cross_entropy", "class_weight":
         {"rad": 1, "green": 1, "blue": 1}}}, ["class_weight names rad", "did you mean 'red'"],
    ),
    "an empty batch": ({"training.batch_size": 0}, ["training.batch_size"]),
    "a micro-batch larger than the batch": (
        {"training.microbatch_size": 9}, ["training.microbatch_size", "9", "8"],
    ),
    "a negative seed": ({"training.seed": -1}, ["training.seed", "-1"]),
    "a negative clip norm": ({"training.clip_norm": -2}, ["training.clip_norm"]),
    "an unknown precision": ({"training.precision": "fp16"}, ["training.precision", "bfloat16"]),
    "no workers": ({"workers.num": 0}, ["workers.num", "0"]),
    "a number of workers and a range": (
        {"workers": {"num": 2, "min": 1, "max": 3}}, ["workers", "not both"],
    ),
    "half a range of workers": ({"workers": {"min": 2}}, ["workers", "go together"]),
    "a range of workers upside down": ({"workers": {"min": 3, "max": 2}}, ["workers", "more than"]),
    "a single checkpoint": ({"checkpoint.keep": 1}, ["checkpoint.keep", "2"]),
    "checkpoints without a pause": ({"checkpoint.every_seconds": 0}, ["checkpoint.every_seconds"]),
    "an unknown key in checkpoint": ({"checkpoint.every": 5}, ["checkpoint.every", "every_steps"]),
    "a row weight that is an input": (
        {"data.sample_weight": "a"}, ["data", "a: data.sample_weight", "input"],
    ),
    "a row weight that is not a column": (
        {"data.sample_weight": "bb"}, ["data.sample_weight", "'bb'", "'b'"],
    ),
    "a row weight of text": ({"data.sample_weight": "color"}, ["data.sample_weight", "'color'"]),
    "a row weight of half a spec": (
        {"data.sample_weight": {"column": "kind", "mean_over": "rows"}},
        ["data.sample_weight.mean_over", "'rows'"],
    ),
    "row weights of a loss of the whole batch": (
        {"data.sample_weight": "kind", "loss": "rmse"}, ["rmse", "data.sample_weight"],
    ),
    "workers that are text": ({"workers.num": "two"}, ["workers.num", "'two'"]),
    "a whole fraction for validation": ({"data.validation": 1.0}, ["data.validation", "1.0"]),
    "a negative fraction": ({"data.validation": -0.1}, ["data.validation", "-0.1"]),
    "an input that is also the target": ({"data.inputs": ["a", "y"]}, ["data", "y", "both"]),
    "an input named twice": ({"data.inputs": ["a", "a"]}, ["data.inputs", "a", "twice"]),
    "an empty list of inputs": ({"data.inputs": []}, ["data.inputs", "empty"]),
    "an unknown way of scaling": ({"data.scale": "max"}, ["data.scale", "'max'"]),
    "a path as the job's name": ({"name": "../../etc"}, ["name", "../../etc"]),
    "a term's target that is not a target": (
        {"loss": [{"name": "mse", "target": "z"}]}, ["loss.0.target", "'z'"],
    ),
    "a weight of zero": ({"loss": [{"name": "mse", "weight": 0}]}, ["loss.0.weight", "0"]),
    "two terms of one name": ({"loss": ["mse", "mse"]}, ["loss", "label"]),
    "a model that is a number": ({"model": 3}, ["model", "name"]),
    "an unknown activation": (
        {"model.outputs": {"prediction": {"activation": "sigmod"}}},
        ["model.outputs.prediction.activation", "'sigmod'"],
    ),
    "true as a number": ({"training.epochs": True}, ["training.epochs", "true and false"]),
    "half of the weights by label": (
        {"loss": {"name": "cross_entropy", "class_weight": {"red": 2}}, "data.target": "color"},
        ["cross_entropy", "class_weight", "red", "blue, green, red"],
    ),
    "an ignored number among texts": (
        {"loss": {"name": "cross_entropy", "ignore_index": 1}, "data.target": "color"},
        ["cross_entropy", "ignore_index 1", "'color'"],
    ),
    "more workers than a machine can hold": ({"workers.num": 64}, ["workers", "64", "cores"]),
    # ---- known once the data is seen
    "a file that is not there": ({"data.train": "nowhere.csv"}, ["data.train", "nowhere.csv"]),
    "a glob that matches nothing": ({"data.train": "*.parquet"}, ["data.train", "*.parquet"]),
    "a format that is not known": ({"data.train": "job.yaml"}, ["data.train", "job.yaml"]),
    "a bucket that cannot be": ({"data.train": "nope://x/y.csv"}, ["data.train", "nope://x/y.csv"]),
    "an unknown sample": ({"data.train": "sample:diabets"}, ["data.train", "'diabetes'"]),
    "an input that is not a column": ({"data.inputs": ["aa"]}, ["data.inputs", "'aa'", "'a'"]),
    "a target that is not a column": ({"data.target": "yy"}, ["data.target", "'yy'", "'y'"]),
    "a categorical that is not an input": (
        {"data.categorical": ["kind"]}, ["data.categorical", "'kind'"],
    ),
    "a categorical column of fractions": ({"data.categorical": ["a"]}, ["data.inputs", "'a'"]),
    "validation of no rows": ({"data.validation": 0.001}, ["data.validation", "0.001"]),
    "a text target for mse": ({"data.target": "color"}, ["mse", "'color'", "cross_entropy"]),
    "a fraction target for classes": ({"loss": "cross_entropy"}, ["data.target", "'y'", "classes"]),
    "three classes for yes or no": (
        {"loss": "bce_with_logits", "data.target": "color"}, ["'color'", "3", "cross_entropy"],
    ),
    "amounts for yes or no": ({"loss": "bce_with_logits"}, ["'y'", "0 to 1"]),
    "zero and one for a loss of signs": (
        {"loss": "soft_margin", "data.target": "kind"}, ["soft_margin", "'kind'", "-1"],
    ),
    "no target for mse": ({"data.target": None}, ["mse", "target"]),
    "a softmax before cross-entropy": (
        {"loss": "cross_entropy", "data.target": "color",
         "model.outputs": {"prediction": {"activation": "softmax"}}},
        ["cross_entropy", "logits", "softmax", "model.outputs.prediction.activation"],
    ),
    "raw logits into bce": (
        {"loss": "bce", "data.target": "flag",
         "model.outputs": {"prediction": {"activation": "identity"}}},
        ["bce", "probabilities", "sigmoid"],
    ),
    "fewer outputs than classes": (
        {"loss": "cross_entropy", "data.target": "color",
         "model.outputs": {"prediction": {"size": 2}}},
        ["cross_entropy", "'color'", "2"],
    ),
    "one class only": (
        {"loss": "cross_entropy", "data.target": "color",
         "model.outputs": {"prediction": {"size": 1}}},
        ["cross_entropy", "bce_with_logits"],
    ),
    "class weights for other classes": (
        {"loss": {"name": "cross_entropy", "class_weight": [1, 2]}, "data.target": "color"},
        ["cross_entropy", "2 class weights", "3 classes"],
    ),
    "an output that nothing reads": (
        {"model.outputs": {"other": {"size": 2}}}, ["model.outputs.other", "prediction"],
    ),
    "a metric of another task": ({"metrics": ["accuracy"]}, ["metrics", "accuracy", "mse"]),
    "a cnn on columns": ({"model": "cnn"}, ["a (number)", "images"]),
    "a transformer on columns": ({"model": "transformer"}, ["a (number)", "token"]),
}  # fmt: skip


@pytest.mark.parametrize("what", SPECS)
def test_a_broken_spec_is_refused(what: str, job: Write, command: Command) -> None:
    changes, expected = SPECS[what]
    code, out, err = command("check", job(changes))
    assert code == 2, f"{out}{err}"
    for phrase in expected:
        assert phrase in err, err
    assert "Traceback" not in err


TEXTS: dict[str, tuple[str, list[str]]] = {
    "a key given twice": ("name: a\nname: b\n", ["line 2", "name", "first on line 1"]),
    "a tab": ("name: a\n\tdata: b\n", ["line 2", "YAML"]),
    "an open bracket": ("name: [a\n", ["YAML", "line 2"]),
    "a python tag": (
        "name: !!python/object/apply:os.system ['true']\n",
        ["line 1", "name", "tag", "python"],
    ),
    "an alias": ("name: &a x\nmodel: *a\n", ["line 2", "alias"]),
    "a list": ("- name: a\n", ["expected a mapping"]),
    "nothing": ("", ["expected a mapping"]),
    "a binary file": ("\x00\x01", ["YAML"]),
}


@pytest.mark.parametrize("what", TEXTS)
def test_text_that_is_no_spec_is_refused(what: str, tmp_path: Path, command: Command) -> None:
    text, expected = TEXTS[what]
    (tmp_path / "job.yaml").write_text(text)
    code, _, err = command("check", tmp_path / "job.yaml")
    assert code == 2
    for phrase in expected:
        assert phrase in err, err
    assert "Traceback" not in err


DATA: dict[str, tuple[Changes, str, list[str]]] = {
    "an empty file": ({}, "", ["data.train", "data.csv"]),
    "a header without rows": ({}, "a,b,y\n", ["data.train", "no rows"]),
    "a missing number": (
        {}, rows().replace("2.5,3,", ",3,"), ["data.inputs", "'a'", "missing", "row 2"]),
    "a missing target": (
        {}, rows().replace(",5.25", ","), ["data.target", "'y'", "missing", "row 2"]),
    "a number that is infinite": (
        {}, rows().replace("2.5,3,", "inf,3,"), ["data.inputs", "'a'", "row 2"]),
    "a target that is not a number": (
        {}, rows().replace(",5.25", ",nan"), ["data.target", "'y'", "row 2"]),
    "a missing text": (
        {"data.inputs": ["a", "color"]}, rows().replace("blue,2", ",2", 1),
        ["data.inputs", "'color'", "missing", "row 2"]),
    "several bad columns at once": (
        {"data.validation": None}, "a,b,y\n2024-01-01,,2\n2024-01-02,2,\n",
        ["'a'", "date", "'b'", "missing values in 1 row", "'y'"]),
    "a file with semicolons": ({}, "a;b;y\n1;2;3\n", ["'a'", "commas", "';'"]),
    "numbers that floats cannot tell apart": (
        {"data.validation": None}, "a,b,y\n9007199254740993,1,2\n9007199254740995,2,3\n",
        ["'a'", "2^53", "data.categorical"]),
    "a column of dates": (
        {"data.validation": None}, "a,b,y\n2024-01-01,1,2\n2024-01-02,2,3\n",
        ["data.inputs", "'a'", "date"]),
    "rows of different lengths": ({}, "a,b,y\n1,2,3\n1,2\n", ["data.train", "data.csv"]),
    "a column of text as a number": (
        {"data.validation": None}, "a,b,y\n1,2,x\n2,3,z\n", ["mse", "'y'", "'x'"]),
    "a class that only validation has": (
        {"data.target": "k", "loss": "cross_entropy", "data.validation": "other.csv"},
        "a,b,k\n1,2,x\n2,3,y\n", ["data.target", "'k'", "'z'"]),
    "one class in all rows": (
        {"data.target": "k", "loss": "cross_entropy", "data.validation": None},
        "a,b,k\n1,2,x\n2,3,x\n", ["cross_entropy", "'k'", "one class"]),
    "negative counts": (
        {"loss": "poisson_nll", "data.validation": None}, "a,b,y\n1,2,-3\n2,3,1\n",
        ["poisson_nll", "'y'", "-3"]),
    "validation columns of another type": (
        {"data.validation": "other.csv", "data.target": "b", "data.inputs": ["a", "k"]},
        "a,b,k\n1,2,3\n2,3,4\n", ["data.validation", "'k'"]),
}  # fmt: skip


@pytest.mark.parametrize("what", DATA)
def test_broken_rows_are_refused(what: str, job: Write, command: Command, tmp_path: Path) -> None:
    changes, text, expected = DATA[what]
    (tmp_path / "other.csv").write_text("a,b,k\n1,2,x\n2,3,z\n")
    code, out, err = command("check", job(changes, data=text))
    assert code == 2, f"{out}{err}"
    for phrase in expected:
        assert phrase in err, err
    assert "Traceback" not in err


def parquet(path: Path, **columns: Any) -> None:
    pq.write_table(pa.table(columns), path)


def test_a_truncated_parquet_file_is_refused_by_name(
    job: Write, command: Command, tmp_path: Path
) -> None:
    whole = tmp_path / "rows.parquet"
    parquet(whole, a=np.arange(100.0), y=np.arange(100.0))
    whole.write_bytes(whole.read_bytes()[:-100])
    code, _, err = command("check", job({"data.train": "rows.parquet", "data.inputs": ["a"]}))
    assert code == 2
    assert "data.train" in err
    assert "rows.parquet" in err


def test_a_parquet_file_with_a_flipped_page_is_refused_by_name(
    job: Write, command: Command, tmp_path: Path
) -> None:
    whole = tmp_path / "rows.parquet"
    parquet(whole, a=np.arange(1000.0), y=np.arange(1000.0))
    damaged = bytearray(whole.read_bytes())
    damaged[4:60] = b"\xff" * 56  # the first page's header
    whole.write_bytes(damaged)
    code, _, err = command("check", job({"data.train": "rows.parquet", "data.inputs": ["a"]}))
    assert code == 2
    assert "data.train" in err


def test_files_whose_columns_differ_are_refused_with_the_difference(
    job: Write, command: Command, tmp_path: Path
) -> None:
    parquet(tmp_path / "one.parquet", a=np.arange(3.0), y=np.arange(3.0))
    parquet(tmp_path / "two.parquet", a=np.array(["0", "1", "2"]), y=np.arange(3.0))
    code, _, err = command("check", job({"data.train": "*.parquet", "data.inputs": ["a"]}))
    assert code == 2
    assert "two.parquet" in err
    assert "a: string" in err


def test_struct_columns_are_refused_with_what_is_read(
    job: Write, command: Command, tmp_path: Path
) -> None:
    parquet(tmp_path / "rows.parquet", a=[{"b": 1}, {"b": 2}], y=[1.0, 2.0])
    changes = {"data.train": "rows.parquet", "data.inputs": ["a"], "data.validation": None}
    code, _, err = command("check", job(changes))
    assert code == 2
    assert "'a'" in err
    assert "struct" in err


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["run"], "JOB.yaml"),
        (["run", "nowhere.yaml"], "nowhere.yaml"),
        (["rum", "x"], "rum"),
        (["check", "{job}", "--set", "training.epochs"], "key.path=value"),
        (["check", "{job}", "--set", "training.epochs=[1"], "--set"),
        (["check", "{job}", "--set", "training.epochs=many"], "--set training.epochs=many"),
        (["check", "{job}", "--import", "nowhere.py"], "nowhere.py"),
        (["check", "{job}", "--import", "no_such_module"], "no_such_module"),
        (["check", "{job}", "--set", "loss.3.weight=2"], "loss"),
        (["check", "{job}", "--set", "name=!!bool maybe"], "bool"),
        (["list", "loses"], "losses"),
        (["sync", "."], "not the folder of a run"),
    ],
)
def test_a_wrong_command_is_refused(
    arguments: list[str], expected: str, job: Write, command: Command
) -> None:
    path = str(job())
    code, _, err = command(*(a.replace("{job}", path) for a in arguments))
    assert code == 2
    assert expected in err


def test_the_corpus_is_as_large_as_promised() -> None:
    assert len(SPECS) + len(TEXTS) + len(DATA) >= 99
