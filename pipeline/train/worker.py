"""What Ray runs on each worker: take the assignment, train, and say whose error it was."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import ray.train.torch
import torch
from ray.util import get_node_ip_address

from pipeline import tracebacks
from pipeline.distributed import comm
from pipeline.errors import PipelineError, RunError, UsageError
from pipeline.files.store import FAULTS
from pipeline.rundir.remote_worker import WorkerSide, putting_outputs
from pipeline.spec import JobSpec
from pipeline.telemetry.system import SystemMonitor
from pipeline.train import fault_injection
from pipeline.train.assignment import Assignment
from pipeline.train.drains import Notices, watching
from pipeline.train.loop import train
from pipeline.train.nodes import prepare_together, receive

NICENESS = "RAY_worker_niceness"


def work(config: dict[str, Assignment]) -> None:
    """Train the job of the `assignment`; the first worker writes curve and weights.

    Started again on the same run, by any number of workers, it resumes from the newest checkpoint.
    """
    told = config["assignment"]
    with contextlib.ExitStack() as held:
        told, remote = receive(told)
        if remote and ray.train.get_context().get_local_rank() == 0:
            held.enter_context(putting_outputs(remote))
        if told.job is None and told.run.spec.exists():
            held.enter_context(_output_to(told.run.output(comm.rank())))
        if told.job is None:
            _take_priority()
        _work(told, remote)


def _work(told: Assignment, remote: WorkerSide | None) -> None:
    torch.set_num_threads(told.spec.workers.threads)
    tracebacks.copied_from.update(told.origins)
    notices = Notices()
    nodes: dict[str, str] = {}
    job = told.job
    if job is None:
        job, nodes = prepare_together(told, notices)
    strike = fault_injection.plan_faults(told.faults, told.run, comm.rank())
    device, context = _device(told.spec), ray.train.get_context()
    monitor = SystemMonitor(told.run, context.get_node_rank(), context.get_local_rank(), device)

    def before_step(step: int) -> None:
        monitor.step = step
        strike(step)

    try:
        with monitor, watching(nodes, notices) if comm.rank() == 0 and nodes else nullcontext():
            train(
                job,
                told.run,
                before_step,
                told.num_steps,
                is_own_process=told.job is None,
                device=device,
                notices=notices,
                remote=remote,
            )
            monitor.step += 1
    except Exception as error:  # a user's components can fail in any way
        if comm.is_echo(error) or not tracebacks.own_frames(error):
            raise
        path = told.run.traceback(comm.rank())
        tracebacks.write(error, path)
        if remote:  # Ray kills the first worker of the node, which would, when another has failed
            with contextlib.suppress(*FAULTS):
                remote.put_outputs()
        node = f" on node {get_node_ip_address()}" if told.job is None else ""
        where = f"on worker {comm.rank()} of {comm.num_workers()}{node}"
        error.add_note(f"{where}; the whole traceback: {path}")
        if isinstance(error, PipelineError):
            raise
        raise RunError(tracebacks.in_full(error)) from error


@contextlib.contextmanager
def _output_to(path: Path) -> Iterator[None]:
    """What this process prints goes to the end of a file; without a word there is none."""
    path.parent.mkdir(exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    before = [os.dup(number) for number in (1, 2)]
    try:
        with path.open("ab", buffering=0) as file:
            for number in (1, 2):
                os.dup2(file.fileno(), number)
        yield
    finally:
        with contextlib.suppress(OSError):  # a full disk, which hides no error of the worker
            sys.stdout.flush()
            sys.stderr.flush()
        for number, old in zip((1, 2), before, strict=True):
            os.dup2(old, number)
            os.close(old)
        with contextlib.suppress(OSError):
            if not path.stat().st_size:
                path.unlink()


def _take_priority() -> None:
    """The priority of other programs, where this may be: Ray starts workers with a niceness of 15,
    with which they starve beside any other load. A cluster's own setting holds."""
    if os.nice(0) > 0 and NICENESS not in os.environ:
        with contextlib.suppress(PermissionError):
            os.setpriority(os.PRIO_PROCESS, 0, 0)


def _device(spec: JobSpec) -> torch.device:
    """This worker's GPU if the spec asks for one, never the CPU in its place."""
    if not spec.workers.gpu:
        return torch.device("cpu")
    device: torch.device = ray.train.torch.get_device()
    if device.type != "cuda":
        raise UsageError("workers.gpu: this worker has no GPU that torch can use")
    return device
