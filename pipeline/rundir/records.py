"""What crosses a file in a run's folder, typed: each record stands in a file of its own.

Points of the journal are plain dictionaries with typed keys, as they stand in its lines and in
`Result.curve`.
"""

from __future__ import annotations

from typing import Any, Literal, NotRequired, TypedDict, final

from pydantic import BaseModel, ConfigDict, Field

from pipeline.files.sealed import Sealed

State = Literal["finished", "failed", "killed"]
Numbers = dict[str, float | None]
"""Values by name; None where there is no finite number."""


class Part(BaseModel):
    """A piece of a record."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class FileFacts(Part):
    """What a file must be like to be intact."""

    bytes: int
    sha256: str


class Identity(Part):
    """What a checkpoint belongs to: the spec's digest, the rows' fingerprint, and its bits."""

    spec: str
    data: str
    bits: dict[str, Any]


class Segment(Part):
    """A piece of the journal in an object store."""

    name: str
    bytes: int
    sha256: str


class Curve(Sealed):
    """`curve.json`: of what the journal is put together in an object store."""

    spec: str
    """Digest of the spec that it belongs to."""
    data: str
    """Fingerprint of the rows."""
    pieces: tuple[Segment, ...]


class Manifest(Sealed):
    """A checkpoint's `manifest.json`."""

    format: int
    step: int
    identity: Identity
    files: dict[str, FileFacts]
    journal: tuple[Segment, ...] = ()
    """The journal that belongs to it, in a backup."""


class Holder(Sealed):
    """`lease.json`: the process that may write."""

    attempt: int
    """From 1."""
    host: str
    pid: int
    started: float
    """Seconds since 1970; tells the process from a later one with its id."""
    is_own_process: bool
    """Whether the process does nothing else, so that its successor may kill it."""


class Best(Part):
    """The best evaluation of a job with `training.best_by`."""

    metric: str
    step: int
    value: float
    metrics: Numbers
    """All values of that evaluation."""


class Scores(Part):
    """How good a model is on some rows."""

    metrics: Numbers
    """Losses and metrics."""
    baselines: Numbers
    """The metrics that a constant prediction has."""


class Importance(Sealed):
    """`importance.json`: how much the trained model relies on each input."""

    loss: float
    """Of the rows as they are, with the weights that became the model."""
    num_rows: int
    """Validation rows whose inputs were shuffled."""
    rises: dict[str, float]
    """What the loss rises by when one input is shuffled among the rows."""
    left_out: list[str]
    """Inputs for which there was no time."""


class Done(Sealed):
    """`done.json`: the result of a finished run."""

    steps: int
    time: int
    """When it ended, in milliseconds since 1970."""
    weights_sha256: str
    files: dict[str, FileFacts]
    """Journal and weights as they were written."""
    best: Best | None
    test: Scores | None = None
    """Of the test rows, with the weights that became the model."""
    decision: Numbers = Field(default={})
    """Thresholds that were chosen on the validation rows, and the metric there."""
    ended_early: str = ""
    """Why there are fewer steps than the job has."""
    workers: list[int]
    """How many there were in each attempt."""
    first_difference: int | None
    """The first step that gave other numbers when it was recomputed."""
    journal: tuple[Segment, ...] = ()
    """The journal that belongs to it, in a backup."""


class Launcher(Part):
    """The command that started a run last."""

    id: str
    pid: int
    host: str


class ColumnFacts(Part):
    """One column as it is described to MLflow."""

    kind: str
    type: str
    role: str


class DataFacts(Part):
    """The rows as they are described to MLflow."""

    name: str
    fingerprint: str
    files: list[str]
    num_files: int
    rows: dict[str, int]
    """How many rows each split has."""
    digests: dict[str, str]
    """SHA-256 of each split that has rows."""
    dropped: int
    columns: dict[str, ColumnFacts]
    profile: dict[str, dict[str, Any]]
    """Plain numbers about each column."""


class Record(Sealed):
    """`record.json`: what MLflow is told besides the curve."""

    name: str
    """The name of the run's folder."""
    job: str
    experiment: str
    register_as: str | None
    tracking_uri: str
    """Without its password."""
    params: dict[str, str]
    data: DataFacts
    spec: str
    fields: list[dict[str, Any]]
    """The columns, as `Field.to_json` gives them."""
    example: str
    """A few raw rows as an Arrow file in base64."""
    tags: dict[str, str]
    versions: dict[str, str]
    """Of Python and the packages that matter most."""
    token: str
    """Tells this run from all others, also after it is resumed."""
    digest: str
    """The spec's digest."""
    imports_sha256: str
    """SHA-256 of the custom modules' sources; empty without any."""
    modules: list[str]
    num_workers: int
    num_steps: int
    primary_metric: str
    """The metric by which runs of the job are compared, as MLflow has it."""
    is_lower_better: bool
    command: str
    """The command that started it, as it can be typed."""
    launcher: Launcher
    is_copied: bool
    """Whether another machine can resume the run from its backup."""


class Parent(Sealed):
    """`parent.json`: the finished run whose steps are the first ones of this one."""

    name: str
    run_id: str
    """In MLflow; empty if that does not have it."""
    step: int
    """Of the checkpoint that was taken over."""


class Recorded(Sealed):
    """`recorded.json`: how much of the run MLflow has."""

    complete: bool = False
    error: str = ""
    """What keeps MLflow from being told at the moment."""
    run_id: str = ""
    experiment_id: str = ""
    tracking_uri: str = ""
    uploaded: dict[str, int] = Field(default={})
    """The last step of each kind of point."""
    system_bytes: dict[str, int] = Field(default={})
    """How much of each file of the machines' load."""
    launcher: str = ""
    """Id of the command that records the run."""
    begun: bool = False
    """Whether params and data sets are there."""
    model_id: str = ""
    model_uri: str = ""
    registered: str = ""
    """What became of the model in the registry, in words."""
    reported: bool = False
    """Whether pictures and tables are there."""


class Ended(Sealed):
    """`ended.json`: how training ended."""

    state: State
    reason: str = ""


class NonFinite(Sealed):
    """`nonfinite.json`: the last step that was not finite."""

    step: int
    gradient_norm: str
    losses: dict[str, str]
    microbatches: list[int]
    rows: list[int]


@final
class StepPoint(TypedDict):
    """A step's line of the journal."""

    step: int
    time: NotRequired[int]
    epoch: float
    train: Numbers
    """`loss`, `learning_rate` and `gradient_norm`."""
    terms: Numbers
    norms: NotRequired[Numbers]
    """Of each parameter, `weight/NAME`, and of its gradient, where the spec asks for them."""
    throughput: NotRequired[Numbers]
    """Every second or so: speed, and on what the time since the last such point was spent."""
    skipped: NotRequired[list[int]]
    """Rows of a step that was skipped, as it was not finite."""


@final
class EvaluationPoint(TypedDict):
    """An evaluation's line of the journal."""

    step: int
    time: NotRequired[int]
    epoch: float
    validation: Numbers
    baselines: NotRequired[Numbers]
    """The metrics that a constant prediction has; in a run's first evaluation."""
    throughput: NotRequired[Numbers]
    """As of a step, after the last evaluation."""
    notes: NotRequired[list[str]]
    """What the numbers do not show."""


@final
class Start(TypedDict):
    """A line for an attempt that begins after `step` steps."""

    event: Literal["start"]
    step: int
    time: NotRequired[int]
    attempt: int
    """From 1."""
    workers: int
    reached: int
    """The last step that was done before."""
    bits: dict[str, Any]
    """What the curve's bits depend on."""
    after: NotRequired[str]
    """Why the attempt before failed."""


@final
class Recomputing(TypedDict):
    """A line now and then, while steps are recomputed that the journal has already."""

    event: Literal["recomputing"]
    step: int
    time: NotRequired[int]
    reached: int
    """The last of these steps."""


@final
class Recomputed(TypedDict):
    """A line after the last step (or evaluation) that was recomputed."""

    event: Literal["recomputed"]
    step: int
    time: NotRequired[int]
    num_steps: int
    differs: NotRequired[int | None]
    """The first of them that gave other numbers, where the same bits are promised."""


@final
class Message(TypedDict):
    """A line to tell the user: the curve's bits change, a file is damaged, a backup failed, nodes
    are odd."""

    event: Literal["bits", "damage", "copy", "nodes"]
    step: int
    time: NotRequired[int]
    text: str


@final
class Stop(TypedDict):
    """A line for an attempt that was asked to stop, and has saved its state."""

    event: Literal["stop"]
    step: int
    time: NotRequired[int]


@final
class SystemReading(TypedDict):
    """What a machine's load was at a moment of training."""

    time: int
    """Milliseconds since 1970."""
    step: int
    """Steps that were done."""
    node: int
    """From 0."""
    values: Numbers


Event = Start | Recomputing | Recomputed | Message | Stop
Point = StepPoint | EvaluationPoint | Start | Recomputing | Recomputed | Message | Stop
