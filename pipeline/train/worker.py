"""What Ray runs on each worker: take what the launcher sent, train, and say whose error it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ray.train.torch
import torch

from pipeline import plugins, tracebacks
from pipeline.data import cache
from pipeline.distributed import comm
from pipeline.errors import PipelineError, RunError, UsageError
from pipeline.spec import JobSpec
from pipeline.train import faults, files
from pipeline.train.job import prepared
from pipeline.train.loop import train


def work(config: dict[str, Any]) -> None:
    """Train the job in `config` (spec, base, folder, imports); rank 0 writes curve and weights.

    Started again on the same folder, by any number of workers, it resumes from the newest
    checkpoint.
    """
    folder = Path(config["folder"])
    plugins.receive(config["imports"], folder / "imports")
    tracebacks.copied_from.update(config["origins"])
    spec = JobSpec.model_validate(config["spec"])
    if not (folder / "spec.yaml").exists():
        raise RunError(
            f"worker {comm.rank()} does not see the run's folder {folder}: "
            "set `storage` to a folder that every node mounts"
        )
    torch.set_num_threads(spec.workers.threads)
    job = config.get("job") or prepared(
        spec, Path(config["base"]), trusted_seconds=cache.TRUSTED_SECONDS
    )
    if job.fingerprint != config["fingerprint"]:
        raise RunError(
            f"worker {comm.rank()} reads other rows from {spec.data.train} than the command "
            "that started it: every node must see the same files"
        )
    before_step = faults.planned(config.get("faults", []), folder, comm.rank())
    try:
        train(
            job, folder, before_step, config.get("num_steps"),
            is_own_process="job" not in config, device=_device(spec),
        )  # fmt: skip
    except Exception as error:
        if comm.is_echo(error) or not tracebacks.own_frames(error):
            raise
        path = folder / files.TRACEBACKS.replace("*", str(comm.rank()))
        tracebacks.write(error, path)
        error.add_note(
            f"on worker {comm.rank()} of {comm.num_workers()}; the whole traceback: {path}"
        )
        if isinstance(error, PipelineError):
            raise
        raise RunError(tracebacks.in_full(error)) from error


def _device(spec: JobSpec) -> torch.device:
    """This worker's GPU if the spec asks for one, never the CPU in its place."""
    if not spec.workers.gpu:
        return torch.device("cpu")
    device: torch.device = ray.train.torch.get_device()
    if device.type != "cuda":
        raise UsageError("workers.gpu: this worker has no GPU that torch can use")
    return device
