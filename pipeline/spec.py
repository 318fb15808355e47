"""The job spec: what is trained (first half) and how it is carried out (second half).

`pipeline.specfile` reads it from YAML. Nothing here imports torch.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal

import yaml
from pydantic import (
    Field,
    GetJsonSchemaHandler,
    SerializerFunctionWrapHandler,
    ValidationInfo,
    field_validator,
    model_serializer,
    model_validator,
)
from pydantic_core import PydanticCustomError

from pipeline import registry
from pipeline.dataspec import Data, Positive, Section
from pipeline.redact import redacted, redacted_tree
from pipeline.registry import Registry, nearest

OUTSIDE_DIGEST = ("training.skip_nonfinite",)
"""Keys of the first half that change no step: only whether the run goes on after it."""
FIRST_HALF = ("data", "model", "loss", "optimizer", "schedule", "training")
"""Keys of what is trained; all others say how it is carried out."""
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._ -]{0,99}$")]


class Choice(Section):
    """A registered component by name, with its options beside the name."""

    registry: ClassVar[Registry[Any]]

    name: str
    """Registered name; `pipeline list` prints them."""
    options: dict[str, Any] = Field(default_factory=dict, validate_default=True)
    """The component's own options, written beside `name`."""

    @model_validator(mode="before")
    @classmethod
    def _gather_options(cls, value: Any) -> Any:
        if isinstance(value, str):
            return {"name": value}
        if not isinstance(value, Mapping):
            raise PydanticCustomError("choice", "expected a name or a mapping with `name`")
        own = {key: value[key] for key in cls.model_fields if key in value and key != "options"}
        return own | {"options": {key: value[key] for key in value if key not in own}}

    @field_validator("name")
    @classmethod
    def _known(cls, name: str) -> str:
        known = cls.registry.entries
        if name not in known:
            raise PydanticCustomError(
                "unknown_name",
                "no {kind} {found}{nearest} (known: {known}; own ones need --import)",
                {
                    "kind": cls.registry.kind,
                    "found": repr(name),
                    "nearest": nearest(name, known),
                    "known": ", ".join(sorted(known)),
                },
            )
        return name

    @field_validator("options")
    @classmethod
    def _allowed(cls, options: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        name = info.data.get("name")
        if name is None:  # an unknown name has been reported already
            return options
        model = cls.registry[name].options
        reserved = sorted((set(cls.model_fields) - {"options"}) & set(model.model_fields))
        if reserved:
            text = "{kind} {name}: its option {reserved} is a key of the spec itself; rename it"
            facts = {"kind": cls.registry.kind, "name": name, "reserved": ", ".join(reserved)}
            raise PydanticCustomError("reserved", text, facts)
        dumped: dict[str, Any] = model.model_validate(options).model_dump(mode="json")
        return dumped

    @model_serializer(mode="wrap")
    def _flat(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        dumped: dict[str, Any] = handler(self)
        options: dict[str, Any] = dumped.pop("options")
        return dumped | options

    @classmethod
    def __get_pydantic_json_schema__(
        cls, core_schema: Any, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        base = handler.resolve_ref_schema(handler(core_schema))
        own = {k: v for k, v in base["properties"].items() if k not in ("name", "options")}
        forms: list[dict[str, Any]] = [{"enum": sorted(cls.registry.entries)}]
        for name, entry in sorted(cls.registry.entries.items()):
            options = entry.options.model_json_schema()
            forms.append(
                {
                    "type": "object",
                    "description": entry.doc,
                    "properties": {"name": {"const": name}, **own, **options["properties"]},
                    "required": ["name", *options.get("required", [])],
                    "additionalProperties": False,
                    **({"$defs": options["$defs"]} if "$defs" in options else {}),
                }
            )
        return {"description": base.get("description", ""), "anyOf": forms}


class Term(Choice):
    """A loss, alone or as one term of a weighted sum."""

    registry = registry.losses

    weight: Annotated[float, Field(gt=0)] = 1.0
    """Factor of this term in the sum."""
    label: Name | None = None
    """Name of this term's curve; the name of the loss unless two terms share it."""
    prediction: str | list[str] | None = None
    """Model output (or outputs, in the loss's order) that the loss reads."""
    target: str | list[str] | None = None
    """Target column (or columns) that the loss reads; the only target unless given."""


class Output(Section):
    """One named output of the model."""

    size: Positive | None = None
    """Numbers per row (or position); from the loss and its target unless given."""
    activation: (
        Literal[
            "identity", "sigmoid", "softmax", "log_softmax", "softplus", "exp", "normalize", "tanh"
        ]
        | None
    ) = None
    """Last operation; what the loss reads unless given (none for losses that take logits)."""


class Model(Choice):
    """The model to train."""

    registry = registry.models

    outputs: dict[str, Output] = Field(default={})
    """Named outputs, where size or activation should not follow from the loss."""


class Optimizer(Choice):
    """The rule that moves the weights."""

    registry = registry.optimizers


class Schedule(Choice):
    """The learning rate over the steps, as a factor of the optimizer's `lr`."""

    registry = registry.schedules

    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Steps over which the learning rate rises linearly to its full value."""


class Training(Section):
    """How long, in which batches, from which seed."""

    epochs: Positive = 10
    """Passes over the training rows."""
    batch_size: Positive = 32
    """Rows per optimizer step over all workers: the global batch."""
    microbatch_size: Positive | None = None
    """Rows per forward pass, into which every batch is cut: with it the bits do not depend on the
    workers. Unless given, each worker has one micro-batch."""
    shuffle: bool = True
    """A new row order each epoch, drawn from the seed."""
    bucket_by: str | None = None
    """Column of lists: batches hold rows of similar length, which need less padding."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Initial weights, row order and dropout follow from it."""
    clip_norm: Annotated[float, Field(gt=0)] | None = None
    """Largest norm of the global gradient; a larger one is scaled down to it."""
    skip_nonfinite: Annotated[int, Field(ge=0)] = 0
    """How many steps with a NaN or infinite loss or gradient may be skipped in the whole run. Each
    is recorded; the next one after them stops the run."""
    best_by: str | None = None
    """`loss` or a validation metric: the weights of its best evaluation become the model. Unless
    given, those of the last step do."""
    precision: Literal["float32", "bfloat16", "float64"] = "float32"
    """`bfloat16` is autocast of the forward pass, with weights, loss and reduction in float32;
    `float64` computes everything in it, to tell rounding from faults."""


class Workers(Section):
    """On what it is trained: `num` workers, or as many from `min` to `max` as the cluster has."""

    num: Positive | None = 1
    """Worker processes. One worker runs inside the command's own process."""
    min: Positive | None = None
    """Fewest workers to continue with when the cluster shrinks."""
    max: Positive | None = None
    """Most workers to use when the cluster grows. A resize resumes from the last checkpoint."""
    gpu: bool = False
    """One GPU per worker."""
    cpus_per_worker: Annotated[float, Field(gt=0)] = 1
    """CPUs per worker, fractions allowed. Rounded up, the threads of one operation."""

    timeout_seconds: Annotated[float, Field(gt=0)] = 300.0
    """How long workers wait for one that does not answer before all are restarted. Must exceed the
    longest difference between workers within one step."""

    @model_validator(mode="before")
    @classmethod
    def _num_or_range(cls, value: Any) -> Any:
        is_range = isinstance(value, Mapping) and (
            value.get("min") is not None or value.get("max") is not None
        )
        if not is_range:
            return value
        if value.get("num") is not None:
            raise PydanticCustomError(
                "workers", "give `num`, or `min` and `max`, not both (null takes one out)"
            )
        if value.get("min") is None or value.get("max") is None:
            raise PydanticCustomError("workers", "`min` and `max` go together")
        return {**value, "num": None}

    @model_validator(mode="after")
    def _in_order(self) -> Workers:
        if self.min and self.max and self.min > self.max:
            text = "`min` {least} is more than `max` {most}"
            raise PydanticCustomError("workers", text, {"least": self.min, "most": self.max})
        if not self.num and not self.max:
            raise PydanticCustomError("workers", "give `num`, or `min` and `max`")
        return self

    @property
    def least(self) -> int:
        """The fewest workers the job runs on."""
        return self.min or self.num or 1

    @property
    def most(self) -> int:
        """The most workers the job runs on."""
        return self.max or self.num or 1

    @property
    def threads(self) -> int:
        """Threads of one operation: part of what the bits depend on."""
        return math.ceil(self.cpus_per_worker)


class Checkpoint(Section):
    """How often the state is saved, from which a run goes on after a failure or a resize."""

    every_steps: Positive | None = None
    """Steps between checkpoints; by time unless given."""
    every_seconds: Annotated[float, Field(gt=0)] = 60.0
    """Seconds between checkpoints, without `every_steps`."""
    keep: Annotated[int, Field(ge=2)] = 3
    """How many of the newest checkpoints to keep: at least two, in case one is damaged."""
    copy_to: str | None = None
    """Folder or object store URI for a backup of the run: its checkpoints and its curve. On a new
    machine, the same command resumes from there."""


class Cache(Section):
    """Where rows are kept as the steps read them, once they have been converted."""

    folder: str | None = None
    """Folder on each node's own disk; `PIPELINE_CACHE` or `~/.cache/pipeline` unless given."""
    most_gib: Annotated[float, Field(gt=0)] = 100.0
    """GiB for all jobs together: beyond it, the least recently used data sets are deleted."""


class Tracking(Section):
    """Where the run is recorded in MLflow."""

    experiment: Name | None = None
    """MLflow experiment; the job's name unless given."""
    register_as: Name | None = None
    """Name in MLflow's model registry under which the trained model becomes a new version."""


class JobSpec(Section):
    """A job: what is trained, and below `workers` how it is carried out."""

    name: Name
    """Name of the job; runs are called after it."""
    data: Data
    model: Model
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
    """Folder of the runs, which every worker must see. A relative one starts where the command is
    run, in a Ray job at the home folder."""

    @field_validator("storage")
    @classmethod
    def _is_a_folder(cls, value: str) -> str:
        if "://" in value:
            raise PydanticCustomError(
                "folder",
                "{found} is no folder; give one that the workers share, and the object store as "
                "`checkpoint.copy_to`",
                {"found": redacted(value)},
            )
        return value

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
        for number, term in enumerate(self.loss):
            wanted = [term.target] if isinstance(term.target, str) else term.target or []
            for column in wanted:
                if column not in self.data.targets:
                    raise PydanticCustomError(
                        "unknown_target",
                        "loss.{number}.target: {found} is not in data.target{nearest}",
                        {
                            "number": number,
                            "found": repr(column),
                            "nearest": nearest(column, self.data.targets),
                        },
                    )
        labels = self.labels
        twice = sorted({label for label in labels if labels.count(label) > 1})
        if twice:
            raise PydanticCustomError(
                "labels", "two loss terms are called {twice}: give each a `label`", {"twice": twice}
            )
        if self.training.best_by and self.data.validation is None:
            text = "training.best_by: needs rows to be judged by; give data.validation"
            raise PydanticCustomError("fits", "{text}", {"text": text})
        if self.training.bucket_by and self.data.stream:
            text = "training.bucket_by: does not go with data.stream; leave one of them out"
            raise PydanticCustomError("fits", text)
        if self.training.bucket_by and not self.training.shuffle:
            text = "training.bucket_by: exchanges rows among batches, which needs shuffle"
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
        made = [
            term.label
            or (
                term.name
                if names.count(term.name) == 1
                else f"{term.name}_{term.target or term.prediction}"
            )
            for term in self.loss
        ]
        return [re.sub(r"[^\w .:/-]", "_", label) for label in made]  # as MLflow's keys must be

    def dump(self) -> str:
        """YAML that loads back to an equal spec, but for secrets in URIs, which are hidden."""
        tree = redacted_tree(self.model_dump(mode="json"))
        dumped: str = yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
        return dumped

    @property
    def digest(self) -> str:
        """SHA-256 of the first half: what is trained, not on what, nor what it is called."""
        first_half = redacted_tree(self.model_dump(mode="json", include=set(FIRST_HALF)))
        for section, _, key in (path.partition(".") for path in OUTSIDE_DIGEST):
            first_half[section].pop(key)
        return hashlib.sha256(json.dumps(first_half, sort_keys=True).encode()).hexdigest()


FLOAT = re.compile(
    r"^(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?"
    r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
)
"""What a job spec takes for a fraction: YAML 1.2's, so that `1e-3` is one."""


class _Dumper(yaml.SafeDumper):
    """Puts what job specs would take for a number in quotes where it is a text."""


_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", FLOAT, list("-+.0123456789"))


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

    return dict(walk(redacted_tree(spec.model_dump(mode="json")), ""))
