"""The job spec: what is trained (first half) and how it is carried out (second half).

`loader` reads it from YAML. Nothing here imports torch.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from typing import Any

import yaml
from pydantic import (
    Field,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from pipeline import registry
from pipeline.redact import redact_tree
from pipeline.registry import nearest
from pipeline.spec.components import Model, Optimizer, Schedule, Term
from pipeline.spec.data import Data
from pipeline.spec.section import Name, Section
from pipeline.spec.sections import Cache, Checkpoint, Tracking, Training, Workers

OUTSIDE_DIGEST = ("training.skip_nonfinite", "training.time_limit")
"""Keys of the first half that change no step: only whether the run continues after it."""
RESERVED = ("loss", "baseline")
"""Names of other curves of validation rows."""
FIRST_HALF = ("data", "model", "loss", "optimizer", "schedule", "training")
"""Keys of what is trained; all others say how it is carried out."""


class JobSpec(Section):
    """A job: what is trained, and below `workers` how it is carried out."""

    name: Name
    """Name of the job; runs are called after it."""
    data: Data
    model: Model
    """A model by name, or one with options (`pipeline list models`)."""
    loss: list[Term] = Field(min_length=1)
    """A loss by name, one with options, or a list of weighted terms."""
    optimizer: Optimizer = Field(default="adamw", validate_default=True)
    """An optimizer by name, or one with options (`pipeline list optimizers`)."""
    schedule: Schedule = Field(default="constant", validate_default=True)
    """The learning rate over the steps, by name or with options (`pipeline list schedules`)."""
    training: Training = Training()
    metrics: list[str] | None = None
    """Validation metrics (`pipeline list metrics`); chosen by the loss unless given."""
    workers: Workers = Workers()
    checkpoint: Checkpoint = Checkpoint()
    cache: Cache = Cache()
    tracking: Tracking = Tracking()
    storage: str = "runs"
    """Folder of the runs, which every worker must see; or the URI of one in an object store, as
    `s3://bucket/runs`, where nodes share no disk: MLflow has to be at `MLFLOW_TRACKING_URI` then. A
    relative one starts where the command is run, in a Ray job at the home folder."""

    @field_validator("loss", mode="before")
    @classmethod
    def _as_list(cls, value: Any) -> Any:
        return value if isinstance(value, list) else [value]

    @field_validator("metrics")
    @classmethod
    def _known_metrics(cls, value: list[str] | None) -> list[str] | None:
        for name in value or []:
            if name not in registry.metrics.entries:
                raise PydanticCustomError(
                    "unknown_name",
                    "no metric {found}{nearest} (known: {known})",
                    {
                        "found": repr(name),
                        "nearest": nearest(name, registry.metrics.entries),
                        "known": ", ".join(sorted(registry.metrics.entries)),
                    },
                )
        return value

    @model_validator(mode="after")
    def _fits(self) -> JobSpec:
        for index, term in enumerate(self.loss):
            wanted = [term.target] if isinstance(term.target, str) else term.target or []
            for column in wanted:
                if column not in self.data.targets:
                    raise PydanticCustomError(
                        "unknown_target",
                        "loss.{number}.target: {found} is not in data.target{nearest}",
                        {
                            "number": index,
                            "found": repr(column),
                            "nearest": nearest(column, self.data.targets),
                        },
                    )
        labels = self.labels
        for label in labels:
            if label in RESERVED:
                text = "a loss term cannot be called {label}, as other curves are: give a `label`"
                raise PydanticCustomError("labels", text, {"label": label})
        twice = sorted({label for label in labels if labels.count(label) > 1})
        if twice:
            raise PydanticCustomError(
                "labels",
                "two loss terms are called {twice}: give each a `label`",
                {"twice": " and ".join(twice)},
            )
        if self.training.best_by and self.data.validation is None:
            text = "training.best_by: needs rows to be judged by; give data.validation"
            raise PydanticCustomError("fits", "{text}", {"text": text})
        if self.training.stop and self.data.validation is None:
            text = "training.stop: needs rows to be judged by; give data.validation"
            raise PydanticCustomError("fits", "{text}", {"text": text})
        if self.schedule.is_plateau and self.data.validation is None:
            text = "schedule: reduce_on_plateau needs rows to be judged by; give data.validation"
            raise PydanticCustomError("fits", "{text}", {"text": text})
        if isinstance(self.training.threshold, str) and self.data.validation is None:
            text = "training.threshold: needs rows to be chosen on; give data.validation"
            raise PydanticCustomError("fits", "{text}", {"text": text})
        if self.training.bucket_by and self.data.stream:
            text = "training.bucket_by: does not go with data.stream; leave one of them out"
            raise PydanticCustomError("fits", text)
        if self.training.bucket_by and not self.training.shuffle:
            text = "training.bucket_by: exchanges rows among batches, which needs shuffle"
            raise PydanticCustomError("fits", "{text}", {"text": text})
        if self.data.sampling:
            others = {
                "data.stream": self.data.stream,
                "training.bucket_by": self.training.bucket_by,
                "training.shuffle: false": not self.training.shuffle,
            }
            if found := [key for key, value in others.items() if value]:
                text = f"data.sampling: does not go with {found[0]}; leave one of them out"
                raise PydanticCustomError("fits", "{text}", {"text": text})
        size, micro = self.training.batch_size, self.training.microbatch_size
        if micro and micro > size:
            raise PydanticCustomError(
                "fits",
                "training.microbatch_size: {micro} is more than training.batch_size {size}",
                {"micro": micro, "size": size},
            )
        return self

    @property
    def labels(self) -> list[str]:
        """Name of each term's curve: its label, its loss's name, or loss and target."""
        names = [term.name for term in self.loss]
        labels = []
        for term in self.loss:
            column = term.target or term.prediction if names.count(term.name) > 1 else None
            label = term.label or (f"{term.name}_{column}" if column else term.name)
            labels.append(re.sub(r"[^\w .:/-]", "_", label))  # as MLflow's keys must be
        return labels

    def dump(self) -> str:
        """YAML that loads back to an equal spec, but for secrets in URIs, which are hidden."""
        tree = redact_tree(self.model_dump(mode="json"))
        dumped: str = yaml.dump(tree, Dumper=Dumper, sort_keys=False, allow_unicode=True)
        return dumped

    @property
    def digest(self) -> str:
        """SHA-256 of the first half: what is trained, not on what, nor what it is called."""
        first_half = redact_tree(self.model_dump(mode="json", include=set(FIRST_HALF)))
        for section, _, key in (path.partition(".") for path in OUTSIDE_DIGEST):
            first_half[section].pop(key)
        return hashlib.sha256(json.dumps(first_half, sort_keys=True).encode()).hexdigest()


FLOAT = re.compile(
    r"^(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?"
    r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
)
"""What a job spec takes for a fraction: YAML 1.2's, so that `1e-3` is one."""


class Dumper(yaml.SafeDumper):
    """Puts what YAML 1.2 takes for a number in quotes where it is a text."""


Dumper.add_implicit_resolver("tag:yaml.org,2002:float", FLOAT, list("-+.0123456789"))


def schema() -> dict[str, Any]:
    """JSON schema of a job spec, for editors; every field carries its doc line."""
    described = JobSpec.model_json_schema()
    term = described["properties"]["loss"]
    described["properties"]["loss"] = {
        "description": term.get("description", ""),
        "anyOf": [term["items"], {"type": "array", "items": term["items"], "minItems": 1}],
    }
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **described}


def flat(spec: JobSpec) -> dict[str, Any]:
    """The whole spec as dotted key paths, for tables and MLflow params; secrets are hidden."""

    def walk(value: Any, path: str) -> Iterator[tuple[str, Any]]:
        if isinstance(value, dict) and value:
            for key, child in value.items():
                yield from walk(child, f"{path}.{key}" if path else str(key))
        elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
            for i, child in enumerate(value):
                yield from walk(child, f"{path}.{i}")
        else:
            yield path, value

    return dict(walk(redact_tree(spec.model_dump(mode="json")), ""))
