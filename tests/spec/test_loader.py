"""The job spec: what it takes, what it remembers, what it prints."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.spec.loader import load, parse_override
from tests.conftest import JOBS, MINIMAL

ALL_JOBS = sorted(JOBS.glob("*.yaml"))


def built_in_jobs() -> list[Path]:
    return [path for path in ALL_JOBS if "quantile" not in path.read_text()]


@pytest.mark.parametrize("path", built_in_jobs(), ids=lambda p: p.stem)
def test_what_is_dumped_loads_back_equal(path: Path, tmp_path: Path) -> None:
    spec = load(path)
    (tmp_path / "again.yaml").write_text(spec.dump())
    assert load(tmp_path / "again.yaml") == spec


@settings(max_examples=100, deadline=None)
@given(
    lr=st.floats(1e-9, 10),
    epochs=st.integers(1, 10**6),
    name=st.from_regex(r"\A[A-Za-z0-9][A-Za-z0-9._ -]{0,30}\Z"),
    loss=st.sampled_from(["mse", "huber", "kl_div", "cross_entropy"]),
    clip=st.none() | st.floats(1e-6, 1e6),
    gpu=st.booleans(),
)
def test_dump_then_load_is_the_identity(
    tmp_path_factory: pytest.TempPathFactory, lr: float, epochs: int, name: str, loss: str,
    clip: float | None, gpu: bool,
) -> None:  # fmt: skip
    per = {"per": "batch"} if loss == "kl_div" else {}
    spec = load(
        MINIMAL
        | {
            "name": name,
            "loss": [{"name": loss, **per}],
            "optimizer": {"name": "adam", "lr": lr, "betas": [0.8, 0.99]},
            "training": {"epochs": epochs, "clip_norm": clip},
            "workers": {"gpu": gpu},
        }
    )
    path = tmp_path_factory.getbasetemp() / "identity.yaml"
    path.write_text(spec.dump())
    assert load(path) == spec
    assert load(yaml.safe_load(spec.dump())) == spec


def test_one_e_minus_three_is_a_number_and_no_is_text(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(
        "name: no\ndata: {train: 'sample:diabetes', target: progression}\n"
        "model: linear\nloss: mse\noptimizer: {name: sgd, lr: 1e-3}\n"
    )
    spec = load(path)
    assert spec.optimizer.options["lr"] == 1e-3
    assert spec.name == "no"


@pytest.mark.parametrize(
    ("text", "path", "value"),
    [
        ("training.epochs=3", "training.epochs", 3),
        ("optimizer.lr=1e-3", "optimizer.lr", 1e-3),
        ("data.inputs=[a, b]", "data.inputs", ["a", "b"]),
        ("name=no", "name", "no"),
        ("training.clip_norm=null", "training.clip_norm", None),
        ("storage=s3://bucket/a=b", "storage", "s3://bucket/a=b"),
    ],
)
def test_overrides_are_read_as_yaml(text: str, path: str, value: object) -> None:
    assert parse_override(text) == (path, value)


def test_an_override_gives_options_to_a_bare_name() -> None:
    spec = load(MINIMAL | {"loss": "huber"}, {"loss.delta": 2.0, "optimizer.lr": 0.5})
    assert spec.loss[0].options["delta"] == 2.0
    assert spec.optimizer.options["lr"] == 0.5


def test_an_override_reaches_into_a_list_of_terms() -> None:
    terms = [{"name": "mse", "label": "a"}, {"name": "mse", "label": "b"}]
    assert load(MINIMAL | {"loss": terms}, {"loss.1.weight": 3}).loss[1].weight == 3


def test_a_mapping_from_python_is_left_as_it_was() -> None:
    before = json.dumps(MINIMAL)
    load(MINIMAL, {"training.epochs": 7})
    assert json.dumps(MINIMAL) == before
