"""The job spec as a value: what it holds, its digest, its JSON schema."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest

from pipeline.errors import SpecError
from pipeline.spec import JobSpec, schema
from pipeline.spec.loader import load
from tests.conftest import JOBS, MINIMAL

ALL_JOBS = sorted(JOBS.glob("*.yaml"))


def built_in_jobs() -> list[Path]:
    return [path for path in ALL_JOBS if "quantile" not in path.read_text()]


def test_the_digest_is_that_of_what_is_trained() -> None:
    spec = load(MINIMAL)
    second_half = {"workers.num": 4, "storage": "elsewhere", "tracking.experiment": "e"}
    assert load(MINIMAL, second_half).digest == spec.digest
    assert load(MINIMAL, {"training.seed": 1}).digest != spec.digest
    assert load(MINIMAL, {"loss.name": "l1"}).digest != spec.digest


def test_a_spec_cannot_be_changed_after_loading() -> None:
    spec = load(MINIMAL)
    with pytest.raises(Exception, match="frozen"):
        spec.training.epochs = 3


def test_the_schema_takes_every_job_and_refuses_a_typo() -> None:
    validator = jsonschema.Draft202012Validator(schema())
    for path in built_in_jobs():
        validator.validate(json.loads(json.dumps(load(path).model_dump(mode="json"))))
    typo = MINIMAL | {"loss": {"name": "huber", "dleta": 1}}
    assert not validator.is_valid(typo)


def test_every_field_of_the_schema_has_a_doc_line() -> None:
    described = schema()
    for name, field in described["properties"].items():
        assert field.get("description") or "$ref" in field, name
    for section, definition in described["$defs"].items():
        assert definition.get("description"), section
        for name, field in definition.get("properties", {}).items():
            assert field.get("description") or "$ref" in field, f"{section}.{name}"


def test_the_spec_is_a_frozen_model_of_the_public_name() -> None:
    assert isinstance(load(MINIMAL), JobSpec)


@pytest.mark.parametrize(
    ("loss", "labels"),
    [
        ([{"name": "mse"}, {"name": "l1"}], ["mse", "l1"]),
        ([{"name": "mse", "target": "a"}, {"name": "mse", "target": "b"}], ["mse_a", "mse_b"]),
        ([{"name": "mse"}, {"name": "mse", "target": "b"}], ["mse", "mse_b"]),
        ([{"name": "mse"}, {"name": "mse", "label": "again"}], ["mse", "again"]),
    ],
    ids=str,
)
def test_a_terms_curve_is_named_by_its_loss_and_where_that_does_not_do_its_target(
    loss: list[dict[str, str]], labels: list[str]
) -> None:
    data = {"train": "rows.csv", "target": ["a", "b"]}
    spec = load({"name": "job", "model": "linear", "loss": loss, "data": data})
    assert spec.labels == labels


def test_two_curves_of_one_name_are_refused() -> None:
    data = {"train": "rows.csv", "target": "a"}
    with pytest.raises(SpecError, match="two loss terms are called huber: give each a `label`"):
        load({"name": "job", "model": "linear", "loss": 2 * [{"name": "huber"}], "data": data})


@pytest.mark.parametrize("label", ["loss", "baseline"])
def test_a_curve_with_the_name_of_another_kind_is_refused(label: str) -> None:
    data = {"train": "rows.csv", "target": "a"}
    loss = [{"name": "huber", "label": label}, {"name": "mse"}]
    with pytest.raises(SpecError, match=f"a loss term cannot be called {label}, as other curves"):
        load({"name": "job", "model": "linear", "loss": loss, "data": data})
