"""Whether every worker's node has what the job needs: all are asked before the first step."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path

import ray
import ray.train
from ray.util import get_node_ip_address

from pipeline import plugins
from pipeline.data import cache
from pipeline.distributed import comm
from pipeline.errors import DataError, InputError, PipelineError, RunError
from pipeline.files.store import is_uri
from pipeline.rundir import RunDir
from pipeline.rundir.remote import copies
from pipeline.rundir.remote_worker import WorkerSide
from pipeline.train.assignment import Assignment
from pipeline.train.determinism import versions
from pipeline.train.drains import Notice, Notices
from pipeline.train.job import Job, prepare
from pipeline.train.weights import load_weights

COMPUTING = ("python", "pipeline", "torch", "numpy", "pyarrow")
"""Whose versions have to be the same on all nodes."""
MOST_APART = 60.0
"""Seconds between clocks, from which on they are told of."""


@dataclass(frozen=True)
class Answer:
    """What one worker says of its node."""

    node_id: str
    node: str
    """Its address."""
    problem: str
    """Why it cannot train there; empty if it can."""
    is_input: bool
    """Whether the problem is in what the user gave."""


def receive(told: Assignment) -> tuple[Assignment, WorkerSide | None]:
    """The assignment with this node's copy of a run in an object store, and the run there.

    The node's first worker makes the copy; raises the same error on all workers where one cannot.
    A run in a folder is left as it is.
    """
    storage = told.spec.storage
    if not is_uri(storage):
        return told, None
    run = RunDir(copies(cache.make_folder(told.spec.cache), storage, "workers") / told.run.name)
    remote, problem = WorkerSide(storage, run, command=told.run), ""
    if told.job is not None:  # in the command's own process
        remote.insist(lambda: remote.receive(told.launcher))
        return replace(told, run=run), remote
    if ray.train.get_context().get_local_rank() == 0:
        try:
            remote.insist(lambda: remote.receive(told.launcher))
        except RunError as error:
            problem = str(error)
    _refuse_unable(Answer(_node_id(), get_node_ip_address(), problem, is_input=False))
    return replace(told, run=run), remote


def prepare_together(told: Assignment, notices: Notices) -> tuple[Job, dict[str, str]]:
    """The job, once every worker can train it; and the workers' nodes: address by Ray's id.

    Clocks that differ are worth a notice. Raises the same error on all workers where one cannot
    train, with each such node and what it lacks.
    """
    job, problem, is_input = None, "", False
    try:
        job = _prepare(told)
    except PipelineError as error:
        problem, is_input = str(error), isinstance(error, InputError)
    except Exception as error:  # a module can fail in any way, where others have what it needs
        problem = f"{type(error).__name__}: {error}"
    mine = Answer(_node_id(), get_node_ip_address(), problem, is_input)
    answers = _refuse_unable(mine)
    clocks = comm.of_all(time.time())  # at one moment: some prepare for longer than others
    assert job is not None
    if text := _apart([answer.node for answer in answers], clocks):
        notices.put(Notice(text))
    return job, {answer.node_id: answer.node for answer in answers}


def _refuse_unable(mine: Answer) -> list[Answer]:
    """What all workers say. Raises the error on each of them where one cannot train."""
    answers = comm.of_all(mine)
    lines = [
        f"worker {rank} of {len(answers)}, on node {answer.node}: {answer.problem}"
        for rank, answer in enumerate(answers)
        if answer.problem
    ]
    if lines:
        kind = DataError if any(answer.is_input for answer in answers) else RunError
        raise kind("\n  ".join(lines))
    return answers


def _node_id() -> str:
    """Ray's id of this node; empty without Ray."""
    if not ray.is_initialized():  # asked for its context, Ray would start a cluster
        return ""
    return str(ray.get_runtime_context().get_node_id())


def _prepare(told: Assignment) -> Job:
    """The job of this worker. Raises errors without its rank and node."""
    if not told.run.spec.exists():
        raise RunError(
            f"does not see the run's folder {told.run.path}; set `storage` to a folder that every "
            "node mounts, or to an object store (s3://...)"
        )
    here, there = versions(), told.versions
    if odd := [f"{k} {here[k]}, not {there[k]}" for k in COMPUTING if here[k] != there[k]]:
        raise RunError(
            f"has {', '.join(odd)} as the command that started it; give all nodes one image"
        )
    plugins.receive(told.modules, told.run.imports)
    initial = load_weights(told.run.initial) if told.spec.model.init_from else None
    base = Path.cwd() / told.base
    job = prepare(told.spec, base, trusted_seconds=cache.TRUSTED_SECONDS, initial=initial)
    if job.fingerprint != told.fingerprint:
        raise RunError(
            f"reads other rows from {told.spec.data.train} than the command that started it; "
            "every node must see the same files"
        )
    return job


def _apart(nodes: list[str], clocks: list[float]) -> str:
    """That clocks of nodes are apart, as times in the record then are."""
    odd = {
        node: clock - clocks[0]
        for node, clock in zip(nodes, clocks, strict=True)
        if abs(clock - clocks[0]) > MOST_APART
    }
    if not odd:
        return ""
    parts = ", ".join(f"that of {node} is {apart:+.0f} s off" for node, apart in odd.items())
    return f"clocks differ from node {nodes[0]}'s: {parts}; times in the record may be wrong"
