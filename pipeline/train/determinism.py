"""What the last bits of a curve depend on besides spec and data, and how torch is held to them."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

import torch

from pipeline.rundir.records import Identity
from pipeline.spec import JobSpec
from pipeline.train.job import Job

PACKAGES = ("pipeline", "torch", "ray", "mlflow", "pyarrow", "numpy")


def versions() -> dict[str, str]:
    """Of Python, and of the packages that a run uses."""
    packages = {package: version(package) for package in PACKAGES}
    return {"python": platform.python_version(), **packages}


def fingerprint(spec: JobSpec) -> dict[str, Any]:
    """Software, device and threads, and the order of sums; equal ones give equal bits.

    Without `training.microbatch_size` the number of workers is part of it, and a run that resumes
    from a checkpoint agrees with an undisturbed one to rounding only.
    """
    size = spec.training.microbatch_size
    device = platform.machine()
    if spec.workers.gpu and torch.cuda.is_available():
        device = f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}"
    else:
        device = f"{device} {torch.backends.cpu.get_cpu_capability()}"
    return {
        "torch": version("torch"),
        "numpy": version("numpy"),
        "device": device,
        "threads": spec.workers.threads,
        "precision": spec.training.precision,
        "order": f"micro-batches of {size}" if size else f"{_workers(spec)} workers",
    }


def _workers(spec: JobSpec) -> str:
    least, most = spec.workers.least, spec.workers.most
    return str(most) if least == most else f"{least} to {most}"


def fingerprint_sha256(spec: JobSpec) -> str:
    """SHA-256 of the fingerprint: two runs of one job may be compared bit by bit if it is equal."""
    text = json.dumps(fingerprint(spec), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def identity(job: Job) -> Identity:
    """What a checkpoint belongs to: the spec's first half and the data; and its bits."""
    return Identity(spec=job.spec.digest, data=job.fingerprint, bits=fingerprint(job.spec))


@contextlib.contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """Torch refuses operations whose bits differ from run to run, and is then as before."""
    if not wanted:
        yield
        return
    before = torch.are_deterministic_algorithms_enabled()
    benchmark = torch.backends.cudnn.benchmark
    filled = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read at cuBLAS's first use
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        torch.backends.cudnn.benchmark = benchmark
        torch.utils.deterministic.fill_uninitialized_memory = filled  # type: ignore[attr-defined]
