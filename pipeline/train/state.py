"""Everything that steps change: what a checkpoint holds is what this object holds."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypedDict

import torch
from torch import Tensor

from pipeline.data.loader import StepBatch
from pipeline.distributed import comm
from pipeline.distributed.ddp import OverlappedGradients
from pipeline.distributed.gradients import Gradients
from pipeline.distributed.ordered import OrderedGradients, is_small
from pipeline.distributed.seeds import Seeds
from pipeline.errors import UsageError
from pipeline.losses.objective import Objective
from pipeline.probes.buffers import changing_buffers
from pipeline.spec.sections import Training
from pipeline.telemetry.stopwatch import Phase
from pipeline.train.average import AverageState, WeightAverage
from pipeline.train.best import BestState, BestWeights
from pipeline.train.build import build_optimizer
from pipeline.train.job import Job
from pipeline.train.step import Requests, StepLosses, train_step
from pipeline.train.stopping import EarlyStop, Plateau, PlateauState, StopState
from pipeline.train.term_metrics import TermMetric, choose_metrics
from pipeline.train.weights import take_weights, to_cpu, weights_sha256


class Snapshot(TypedDict):
    """What a checkpoint holds."""

    weights: dict[str, Tensor]
    buffers: dict[str, Tensor]
    """Those that a state dict does not hold."""
    optimizer: dict[str, Any]
    """The optimizer's `state_dict`."""
    num_skipped: int
    seconds: float
    ended: str
    best: BestState | None
    early_stop: StopState | None
    plateau: PlateauState | None
    average: AverageState | None


class TrainState:
    """Model and losses, optimizer, how many steps are done, and the best weights so far."""

    def __init__(
        self,
        objective: Objective,
        optimizer: torch.optim.Optimizer,
        gradients: Gradients,
        schedule: Callable[[int], float] = lambda step: 1.0,
        metrics: Sequence[TermMetric] = (),
        best: BestWeights | None = None,
        early_stop: EarlyStop | None = None,
        plateau: Plateau | None = None,
        average: WeightAverage | None = None,
    ) -> None:
        self.objective = objective
        self.optimizer = optimizer
        self.gradients = gradients
        self.schedule = schedule
        """Factor of the learning rate in a step, from 0."""
        self.metrics = metrics
        """Metrics of the validation rows."""
        self.best = best
        """Kept by the first worker of a job with `training.best_by`."""
        self.early_stop = early_stop
        """Of a job with `training.stop`."""
        self.plateau = plateau
        """Of a job with the schedule `reduce_on_plateau`."""
        self.average = average
        """Of a job with `training.average`."""
        self.step = 0
        """Steps that are done."""
        self.num_skipped = 0
        """Those of them that were not finite."""
        self.seconds = 0.0
        """Time that training has taken, earlier attempts included; known to the first worker."""
        self.ended = ""
        """Why training ends before its last step, by the clock."""
        self.decided: dict[str, Tensor] = {}
        """Buffers that are chosen when training is over: thresholds."""
        self.learning_rate = 0.0
        """The rate of the first group of parameters."""

    @classmethod
    def create(cls, job: Job, device: torch.device) -> TrainState:
        """The state before the first step, the same on every worker. Raises UsageError if not."""
        spec = job.spec
        bound = job.objective()
        changing = changing_buffers(bound, job.trial)
        bound.to(device)
        _refuse_different(bound, changing, spec.model.name)
        in_order = spec.training.microbatch_size is not None or is_small(bound)
        way = OrderedGradients if in_order else OverlappedGradients
        gradients = way(bound, Seeds(spec.training.seed, device), changing)
        optimizer = build_optimizer(spec, bound.named_parameters())
        metrics = choose_metrics(bound.terms, spec.metrics, spec.data.weighs_metrics)
        best = None
        if spec.training.best_by and comm.rank() == 0:
            best = BestWeights(spec.training.best_by, bound.terms, metrics)
        stop = spec.training.stop
        early_stop = EarlyStop(stop, bound.terms, metrics) if stop else None
        average = None
        if settings := spec.training.average:
            average = WeightAverage(settings, job.num_steps, job.steps_per_epoch)
        plateau = None
        if spec.schedule.is_plateau:
            plateau = Plateau(spec.schedule.options, bound.terms, metrics)
        schedule = job.learning_rate_factor
        return cls(
            bound, optimizer, gradients, schedule, metrics, best, early_stop, plateau, average
        )

    def is_done(self, last_step: int) -> bool:
        """Whether training is over: after the last step, or before by the rules of the spec."""
        return self.step == last_step or bool(self.reason_to_end)

    @property
    def reason_to_end(self) -> str:
        """Why training ends before its last step; empty while it does not."""
        return (self.early_stop.reason if self.early_stop else "") or self.ended

    def end_by_clock(self, settings: Training) -> None:
        """End training on every worker, if the first one's time is over."""
        if settings.time_limit and comm.from_first(self.seconds) >= settings.most_seconds:
            self.ended = f"the {settings.time_limit} of training.time_limit are over"

    def set_learning_rate(self, step: int) -> None:
        """Each group's rate in the step, a factor of the one it was built with."""
        factor = self.schedule(step) * (self.plateau.state["factor"] if self.plateau else 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = group.setdefault("initial_lr", group["lr"]) * factor
        self.learning_rate = float(self.optimizer.param_groups[0]["lr"])

    def train(
        self,
        batch: StepBatch,
        settings: Training,
        requests: Requests,
        lap: Callable[[Phase], None],
    ) -> StepLosses:
        """One step over a global batch, at the learning rate of that step."""
        self.set_learning_rate(batch.step)
        losses = train_step(
            self.objective,
            self.optimizer,
            self.gradients,
            batch,
            clip_norm=settings.clip_norm,
            requests=requests,
            skip_nonfinite=self.num_skipped < settings.skip_nonfinite,
            lap=lap,
        )
        self.step += 1
        self.num_skipped += losses.nonfinite is not None
        if self.average and losses.nonfinite is None:
            self.average.update(self.step, self.objective)
        return losses

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The weights that are evaluated: averages, where the job has them."""
        if self.average is None:
            yield
            return
        with self.average.applied(self.objective):
            yield

    def snapshot(self) -> Snapshot:
        """The state as a checkpoint saves it, on the CPU: later steps do not change it."""
        weights = self.objective.state_dict()
        others = {n: b for n, b in self.objective.named_buffers() if n not in weights}
        return {
            "weights": to_cpu(weights),
            "buffers": to_cpu(others),
            "optimizer": to_cpu(self.optimizer.state_dict()),
            "num_skipped": self.num_skipped,
            "seconds": self.seconds,
            "ended": self.ended,
            "best": self.best.state if self.best else None,  # a copy already
            "early_stop": self.early_stop.state if self.early_stop else None,
            "plateau": self.plateau.state if self.plateau else None,
            "average": self.average.snapshot() if self.average else None,
        }

    def restore(self, snapshot: Snapshot, step: int) -> None:
        """Take the state that was saved after `step` steps."""
        take_weights(self.objective, snapshot["weights"], snapshot["buffers"])
        self.optimizer.load_state_dict(snapshot["optimizer"])
        _keep_dtypes(self.optimizer, snapshot["optimizer"]["state"])
        self.step = step
        self.num_skipped = snapshot["num_skipped"]
        self.seconds, self.ended = snapshot["seconds"], snapshot["ended"]
        if self.best is not None:
            self.best.state = snapshot["best"]
        if self.early_stop is not None and snapshot["early_stop"]:
            self.early_stop.state = snapshot["early_stop"]
        if self.plateau is not None and snapshot["plateau"]:
            self.plateau.state = snapshot["plateau"]
        if self.average is not None and snapshot["average"]:
            self.average.restore(snapshot["average"], self.gradients.seeds.device)

    def become_model(self) -> None:
        """Take the weights of the trained model, on every worker; no step can follow."""
        if self.average:
            self.average.apply(self.objective)
        best = self.best.state["weights"] if self.best and self.best.state else {}
        weights = {name: comm.from_first(best.get(name)) for name in comm.from_first(list(best))}
        if weights:
            take_weights(self.objective, weights)

    @property
    def model_weights(self) -> dict[str, Tensor]:
        """What the trained model has: the weights of the best evaluation, or else the average, or
        else those of the last step."""
        if self.best and self.best.state:
            return self.best.state["weights"] | self.decided
        with self.averaged():
            weights: dict[str, Tensor] = to_cpu(self.objective.state_dict())
        return weights | self.decided


def _refuse_different(objective: Objective, changing: Mapping[str, bool], model: str) -> None:
    """Raise UsageError on every worker when they start with different weights."""
    if comm.num_workers() == 1:
        return
    start = f"{weights_sha256(objective.state_dict())} {sorted(changing.items())}"
    if not comm.all_agree(torch.tensor([zlib.crc32(start.encode())])).all():
        raise UsageError(
            f"model {model}: its weights start differently on each worker; take random numbers "
            "from torch only, which the pipeline seeds"
        )


def _keep_dtypes(optimizer: torch.optim.Optimizer, saved: Mapping[int, Mapping[str, Any]]) -> None:
    """Torch loads an optimizer's tensors in the type of their parameter: take them as saved."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for index, values in saved.items():
        state = optimizer.state[parameters[index]]
        for key, value in values.items():
            if isinstance(value, Tensor) and state[key].dtype != value.dtype:
                state[key] = value.to(state[key].device)
