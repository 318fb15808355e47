"""The job spec: what it takes, what it remembers, what it prints."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import registry
from pipeline.errors import SpecError
from pipeline.spec import JobSpec, flat, schema
from pipeline.spec.loader import load, parse_override
from tests.conftest import JOBS, Write, built_in

MINIMAL = {
    "name": "x",
    "data": {"train": "sample:diabetes", "target": "progression"},
    "model": "linear",
    "loss": "mse",
}
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


def test_a_loss_can_be_a_name_or_a_mapping_or_a_list() -> None:
    by_name = load(MINIMAL | {"loss": "mse"})
    assert by_name == load(MINIMAL | {"loss": {"name": "mse"}})
    assert by_name == load(MINIMAL | {"loss": [{"name": "mse", "weight": 1.0}]})


def test_options_get_their_defaults_so_that_the_record_is_complete() -> None:
    recorded = flat(load(MINIMAL | {"loss": "huber"}))
    assert recorded["loss.0.delta"] == 1.0
    assert recorded["optimizer.name"] == "adamw"
    assert recorded["training.seed"] == 0


def test_the_digest_is_that_of_what_is_trained() -> None:
    spec = load(MINIMAL)
    second_half = {"workers.num": 4, "storage": "elsewhere", "tracking.experiment": "e"}
    assert load(MINIMAL, second_half).digest == spec.digest
    assert load(MINIMAL, {"training.seed": 1}).digest != spec.digest
    assert load(MINIMAL, {"loss.name": "l1"}).digest != spec.digest


def test_a_range_of_workers_stands_in_for_their_number(tmp_path: Path) -> None:
    spec = load(MINIMAL | {"workers": {"min": 2, "max": 5}})
    assert (spec.workers.num, spec.workers.least, spec.workers.most) == (None, 2, 5)
    (tmp_path / "again.yaml").write_text(spec.dump())
    assert load(tmp_path / "again.yaml") == spec
    fixed = load(MINIMAL | {"workers": {"num": 3, "cpus_per_worker": 0.5}})
    assert (fixed.workers.least, fixed.workers.most, fixed.workers.threads) == (3, 3, 1)


def test_a_column_of_row_weights_can_be_a_bare_name() -> None:
    data = MINIMAL["data"] | {"sample_weight": "bmi"}  # type: ignore[operator]
    spec = load(MINIMAL | {"data": data})
    assert spec.data.sample_weight is not None
    assert spec.data.sample_weight.mean_over == "weights"
    assert spec.digest != load(MINIMAL).digest


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


@pytest.mark.parametrize("kind", registry.REGISTRIES)
def test_every_entry_has_a_doc_line_and_typed_options(kind: str) -> None:
    for name in built_in(kind):
        entry = registry.REGISTRIES[kind][name]
        assert entry.doc.endswith("."), name
        assert entry.options.model_json_schema()["additionalProperties"] is False


def test_a_mapping_from_python_is_left_as_it_was() -> None:
    before = json.dumps(MINIMAL)
    load(MINIMAL, {"training.epochs": 7})
    assert json.dumps(MINIMAL) == before


def test_faults_come_in_the_order_of_the_lines(job: Write) -> None:
    path = job({"training.epochs": 0, "data.inptus": ["a"], "modle": "linear"})
    with pytest.raises(SpecError) as raised:
        load(path)
    lines = [fault.line or 0 for fault in raised.value.faults]
    assert lines == sorted(lines)
    assert len(lines) == 3


def test_the_spec_is_a_frozen_model_of_the_public_name() -> None:
    assert isinstance(load(MINIMAL), JobSpec)
