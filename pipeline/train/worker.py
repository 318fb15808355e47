"""What each worker runs: the whole training of one job, the same function on one and on many."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import ray.train
import ray.train.torch
import torch
import torch.distributed as dist

from pipeline import plugins, registry
from pipeline.data.columns import gather
from pipeline.data.order import cut, owned, rows_of_step
from pipeline.errors import RunError, UsageError
from pipeline.optimizers import learning_rate_factor
from pipeline.spec import JobSpec
from pipeline.train import reduce
from pipeline.train.checkpoint import save_weights, weights_sha256
from pipeline.train.curve import Journal
from pipeline.train.evaluate import chosen, evaluate
from pipeline.train.job import Job, objective, prepared, trial_batch
from pipeline.train.step import Losses, train_step
from pipeline.train.tree import Ordered


def work(config: dict[str, Any]) -> None:
    """Train the job in `config` (spec, base, folder, imports); rank 0 writes curve and weights."""
    folder = Path(config["folder"])
    plugins.receive(config["imports"], folder / "imports")
    spec = JobSpec.model_validate(config["spec"])
    if not (folder / "spec.yaml").exists():
        raise RunError(
            f"worker {reduce.rank()} does not see the run's folder {folder}: "
            "set `storage` to a folder that every node mounts"
        )
    torch.set_num_threads(spec.workers.cpus_per_worker)
    job = config.get("job") or prepared(spec, Path(config["base"]))
    if job.fingerprint != config["fingerprint"]:
        raise RunError(
            f"worker {reduce.rank()} reads other rows from {spec.data.train} than the command "
            "that started it: every node must see the same files"
        )
    train(job, folder)


def train(job: Job, folder: Path) -> None:
    """Epochs of steps, each followed by an evaluation; ends with the weights in `folder`."""
    spec, settings = job.spec, job.spec.training
    device = _device(spec)
    bound = objective(spec, job.fields, trial_batch(job)).to(device)
    exact = settings.microbatch_size is not None
    gradients = Ordered(bound) if exact else reduce.Overlapped(bound, device)
    optimizer = registry.optimizers[spec.optimizer.name].build(
        [p for p in bound.parameters() if p.requires_grad], **spec.optimizer.options
    )
    base_rates = [group["lr"] for group in optimizer.param_groups]
    per_epoch, num_steps = job.steps_per_epoch, job.num_steps
    order_seed = settings.seed if settings.shuffle else None
    metrics = chosen(bound.terms, spec.metrics)
    journal = Journal(folder / "curve.jsonl") if reduce.rank() == 0 else None

    def validate(step: int) -> None:
        if job.validation is not None:
            size = settings.microbatch_size or settings.batch_size
            rows = np.arange(job.num_validation_rows)
            values = evaluate(bound, job.validation, rows, size, metrics, device)
            if journal:
                journal.write({"step": step, "epoch": step / per_epoch, "validation": values})

    validate(0)
    for step in range(num_steps):
        started = time.perf_counter()
        factor = learning_rate_factor(
            spec.schedule.name, spec.schedule.options, spec.schedule.warmup_steps, step, num_steps
        )
        for group, rate in zip(optimizer.param_groups, base_rates, strict=True):
            group["lr"] = rate * factor
        rows = rows_of_step(job.num_rows, settings.batch_size, order_seed, step)
        pieces = cut(rows, settings.microbatch_size, reduce.num_workers())
        numbers = owned(len(pieces), reduce.rank(), reduce.num_workers())
        losses = train_step(
            bound,
            gradients,
            optimizer,
            [(i, gather(job.train, pieces[i])) for i in numbers if len(pieces[i])],
            len(pieces),
            step=step,
            seed=settings.seed,
            clip_norm=settings.clip_norm,
            device=device,
        )
        if journal:
            seconds = time.perf_counter() - started
            labels = [term.label for term in bound.terms]
            journal.write(_point(step + 1, per_epoch, labels, losses, base_rates[0] * factor,
                                 len(rows) / seconds))  # fmt: skip
        if (step + 1) % per_epoch == 0:
            validate(step + 1)
    if journal:
        journal.close()
        _finish(bound, folder, num_steps)
    if dist.is_initialized():
        dist.barrier()


def _device(spec: JobSpec) -> torch.device:
    """This worker's GPU if the spec asks for one, never the CPU in its place."""
    if not spec.workers.gpu:
        return torch.device("cpu")
    device: torch.device = ray.train.torch.get_device()
    if device.type != "cuda":
        raise UsageError("workers.gpu: this worker has no GPU that torch can use")
    return device


def _point(
    step: int, per_epoch: int, labels: list[str], losses: Losses, rate: float, speed: float
) -> dict[str, Any]:
    """One step's line of the journal."""
    return {
        "step": step,
        "epoch": step / per_epoch,
        "terms": dict(zip(labels, losses.terms, strict=True)),
        "train": {
            "loss": losses.total,
            "learning_rate": rate,
            "gradient_norm": losses.gradient_norm,
            "rows_per_second": speed,
        },
    }


def _finish(bound: torch.nn.Module, folder: Path, num_steps: int) -> None:
    """Weights, then the marker that says the run is complete."""
    weights = bound.state_dict()
    save_weights(weights, folder / "weights.pt")
    done = {"steps": num_steps, "weights_sha256": weights_sha256(weights)}
    aside = folder / f".done.{os.getpid()}"
    aside.write_text(json.dumps(done))
    aside.replace(folder / "done.json")
