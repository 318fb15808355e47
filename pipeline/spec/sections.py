"""How a job is trained and carried out: steps, workers, checkpoints, cache and tracking."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from pipeline.spec.section import Name, Positive, Section

DEFAULT_EPOCHS = 10
Decision = Literal["f1", "balanced_accuracy", "accuracy"]
Duration = Annotated[str, Field(pattern=r"^[0-9]+(\.[0-9]+)?[smh]$")]
"""A time, as `30s`, `90m` or `2h`."""


def seconds_of(duration: str | None) -> float:
    """The time in seconds; infinite for none."""
    if duration is None:
        return math.inf
    return float(duration[:-1]) * {"s": 1, "m": 60, "h": 3600}[duration[-1]]


class Every(Section):
    """How often something is done: every so many steps, or epochs."""

    steps: Positive | None = None
    """Optimizer steps."""
    epochs: Positive | None = None
    """Passes over the training rows."""

    @model_validator(mode="after")
    def _one_unit(self) -> Every:
        if (self.steps is None) == (self.epochs is None):
            raise PydanticCustomError("every", "give either `steps` or `epochs`")
        return self

    def in_steps(self, steps_per_epoch: int) -> int:
        """The same in optimizer steps."""
        return self.steps or (self.epochs or 1) * steps_per_epoch


class Stop(Section):
    """Training ends early once the validation rows no longer gain from it."""

    metric: str = "loss"
    """`loss` or a validation metric."""
    patience: Positive = 5
    """Evaluations in a row that are no better than the best one, after which training ends."""
    min_delta: Annotated[float, Field(ge=0)] = 0.0
    """What an evaluation has to gain on the best one to be better."""


class Swa(Section):
    """Equal average of the weights at several points of training (stochastic weight averaging)."""

    start: Annotated[float, Field(ge=0, lt=1)] = 0.75
    """Share of the steps after which averaging begins."""
    every: Every = Every(epochs=1)
    """How often the weights enter the average: `{steps: 100}`, or `{epochs: 1}`."""


class Average(Section):
    """Averaged weights, which are evaluated and become the model in place of the last ones."""

    ema: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Decay of an exponential moving average, as 0.999: after each step it keeps this share of
    itself."""
    swa: Swa | None = None
    """Equal average from late in training on, as `{start: 0.75, every: {epochs: 1}}`."""

    @model_validator(mode="after")
    def _one_kind(self) -> Average:
        if (self.ema is None) == (self.swa is None):
            raise PydanticCustomError("average", "give either `ema` or `swa`")
        return self


class Training(Section):
    """How long, in which batches, from which seed."""

    epochs: Positive | None = None
    """Passes over the training rows: 10, unless this or `max_steps` is given."""
    max_steps: Positive | None = None
    """Optimizer steps, which may be less than an epoch; with `epochs` too, what is over first."""
    evaluate_every: Every = Every(epochs=1)
    """When the validation rows are looked at, besides the start and the end: `{steps: 500}`, or
    `{epochs: 2}`; unless given, after every epoch."""
    stop: Stop | None = None
    """Early stopping, as `{metric: rmse, patience: 5}`: training ends once so many evaluations in a
    row were no better. `best_by` keeps the best weights."""
    time_limit: Duration | None = None
    """Training ends at the first time to evaluate (`evaluate_every`) after this time, as `90m`,
    `2h` or `30s`, time before a restart included. The steps before are the same as without it."""
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
    """It determines initial weights, row order and dropout."""
    clip_norm: Annotated[float, Field(gt=0)] | None = None
    """Largest norm of the global gradient; a larger one is scaled down to it."""
    skip_nonfinite: Annotated[int, Field(ge=0)] = 0
    """How many steps with a NaN or infinite loss or gradient may be skipped in the whole run. Each
    is recorded; the next one after them stops the run."""
    best_by: str | None = None
    """`loss` or a validation metric: the weights of its best evaluation become the model. Unless
    given, those of the last step do."""
    threshold: Annotated[float, Field(gt=0, lt=1)] | Decision | None = None
    """Probability above which yes is predicted: a number, or the metric of the validation rows that
    it is chosen for at the end: `f1`, `balanced_accuracy` or `accuracy`. 0.5 unless given."""
    average: Average | None = None
    """Averaged weights in place of the last ones, as `{ema: 0.999}` or `{swa: {start: 0.75}}`, in
    evaluations and as the model; running statistics are averaged too."""
    precision: Literal["float32", "bfloat16", "float64"] = "float32"
    """`bfloat16` is autocast of the forward pass, with weights, loss and reduction in float32;
    `float64` computes everything in it, to tell rounding from faults."""

    @property
    def most_seconds(self) -> float:
        """Of training; infinite without a limit."""
        return seconds_of(self.time_limit)

    @model_validator(mode="before")
    @classmethod
    def _some_end(cls, value: Any) -> Any:
        if isinstance(value, Mapping) and not any(
            value.get(key) is not None for key in ("epochs", "max_steps")
        ):
            return {**value, "epochs": DEFAULT_EPOCHS}
        return value


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
    gib_per_worker: Annotated[float, Field(gt=0)] | None = None
    """GiB of memory that Ray keeps for each worker on its node. This and the next four are for
    clusters; on one machine they say nothing."""
    accelerator: str | None = None
    """Type of the workers' GPUs, as Ray calls it: `A100`, `H100`."""
    labels: dict[str, str] = Field(default={})
    """Labels of the nodes that workers may stand on, as `{ray.io/market-type: "!spot"}`: a value,
    `in(a, b)`, or either after `!`."""
    resources: dict[str, Annotated[float, Field(gt=0)]] = Field(default={})
    """Custom resources of the cluster that each worker takes, as `{licence: 1}`."""
    placement: Literal["pack", "spread", "strict_pack", "strict_spread"] = "pack"
    """Workers on as few nodes as possible, or on as many; `strict`: on one, or each on its own."""
    wait: Duration | None = None
    """How long to wait while others hold what workers need, as `10m`; unless given, for ever."""
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
    def _check_range(self) -> Workers:
        if self.min and self.max and self.min > self.max:
            text = "`min` {least} is more than `max` {most}"
            raise PydanticCustomError("workers", text, {"least": self.min, "most": self.max})
        if not self.num and not self.max:
            raise PydanticCustomError("workers", "give `num`, or `min` and `max`")
        if self.max and self.placement.startswith("strict"):
            raise PydanticCustomError(
                "workers",
                "`placement: {placement}` needs `num`: with `min` and `max`, Ray would wait for a "
                "node that is gone; `{weaker}` does not",
                {"placement": self.placement, "weaker": self.placement.removeprefix("strict_")},
            )
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
    def wait_seconds(self) -> float:
        """How long to wait for room in the cluster; infinite without a limit."""
        return seconds_of(self.wait)

    @property
    def threads(self) -> int:
        """Threads of one operation: part of what the bits depend on."""
        return math.ceil(self.cpus_per_worker)


class Checkpoint(Section):
    """How often the state is saved, from which a run resumes after a failure or a resize."""

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
    """Name in MLflow's model registry under which the trained model becomes a new version, with the
    alias `candidate`; and `champion` if it is the first, or better on the same validation rows than
    the present champion."""
    norms_every: Every | None = None
    """How often the norms of each parameter and of its gradient are recorded, as `{steps: 100}`;
    never unless given."""
