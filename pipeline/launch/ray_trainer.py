"""Ray Train, in one place: `TorchTrainer` on the workers that a spec asks for."""

from __future__ import annotations

import math
import os
import secrets
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from pipeline.errors import PipelineError, StoppedError
from pipeline.launch.ray_cluster import DRIVER_ENVIRONMENT, nodes, session
from pipeline.launch.resources import has_cluster, may_grow, needs, wait_for_room
from pipeline.launch.signals import attend
from pipeline.spec import JobSpec
from pipeline.spec.sections import Workers
from pipeline.train.assignment import Assignment

ELASTIC_ENVIRONMENT = {
    # how long a worker group may wait for the nodes it was promised; 60 s by default, for which a
    # run stands still after a node is lost
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "15",
}
MAX_RESTARTS = 3
"""How often a worker that predicts is started again, and its file begun anew."""
RESIZE_SECONDS = 15.0  # between looks for more nodes; 60 by default


def in_process(spec: JobSpec) -> bool:
    """One worker, and no cluster to put it on: it runs in the command's own process."""
    return spec.workers.most == 1 and not has_cluster()


def fit(
    assignment: Assignment,
    max_failures: int = -1,
    tell: Callable[[str], None] = lambda _: None,
    note: Callable[[str], None] = lambda _: None,
) -> None:
    """Run a job on its workers, to the end; dead ones are replaced, `max_failures` times.

    An assignment that holds the job itself, and not only its spec, is run in this process. `tell`
    is told what is waited for, where others hold the cluster, `note` what else there is to say.
    Raises the first failing worker's own error, which is not tried again, or RunError; and
    StoppedError after a signal, when the workers have saved their state and ended.
    """
    spec, run = assignment.spec, assignment.run
    if spec.workers.max and not may_grow():
        for key, value in ELASTIC_ENVIRONMENT.items():
            os.environ.setdefault(key, value)
    alone = assignment.job is not None
    with session(spec, alone):
        import ray.train.torch as ray_torch
        from ray.train import FailureConfig, LoggingConfig, RunConfig

        from pipeline.launch.failures import Restarts, cause_of, is_untried, own_error
        from pipeline.launch.process_group import ReachableTorchConfig
        from pipeline.rundir.remote_command import following
        from pipeline.train.worker import work

        workers = spec.workers
        restarts = Restarts(run)

        def trained() -> None:
            if has_cluster() and not may_grow():
                wait_for_room(workers, nodes, tell)
            trainer = ray_torch.TorchTrainer(
                work,
                train_loop_config={"assignment": assignment},
                torch_config=ReachableTorchConfig(
                    backend="nccl" if workers.gpu else "gloo",
                    timeout_s=math.ceil(workers.timeout_seconds),
                ),
                scaling_config=_scaling(workers, alone),
                run_config=RunConfig(
                    name=f"{run.name}-{secrets.token_hex(2)}",
                    storage_path=str(run.path.parent / ".ray"),
                    logging_config=LoggingConfig(log_level="ERROR"),
                    failure_config=FailureConfig(max_failures=max_failures),
                    callbacks=[] if alone else [restarts],
                    worker_runtime_env={"env_vars": _environment(workers)},
                ),
            )
            trainer.fit()

        def followed() -> None:
            with following(spec.storage, run, note):
                trained()

        while True:
            try:
                attend(followed, run, waits_for_workers=not alone)
                return
            except StoppedError as stopped:
                if (error := stopped.__cause__) and (own := own_error(error)):
                    stopped.where += f"\n  a worker had failed before: {own}"
                raise
            except PipelineError:
                raise
            except Exception as error:  # Ray wraps the worker's own in several of its own
                cause = cause_of(error)
                if max_failures == 0 or not is_untried(error):
                    raise cause from error
                restarts.count(cause)


def _scaling(workers: Workers, alone: bool) -> Any:
    """How many workers there are to be, and what each takes of which nodes."""
    from ray.train import ScalingConfig

    if alone:
        return ScalingConfig(num_workers=0, use_gpu=workers.gpu)
    own = _taken(workers)
    accelerator = workers.accelerator if has_cluster() else None
    return ScalingConfig(
        num_workers=workers.num or (workers.least, workers.most),
        use_gpu=workers.gpu,
        resources_per_worker={k: n for k, n in own.items() if not k.startswith("accelerator")},
        accelerator_type=accelerator,
        placement_strategy=workers.placement.upper(),
        label_selector=workers.labels if has_cluster() and workers.labels else None,
        elastic_resize_monitor_interval_s=RESIZE_SECONDS,
    )


def _taken(workers: Workers) -> dict[str, float]:
    """What a worker takes: on one machine its cores and its GPU alone."""
    wanted = needs(workers)
    return wanted if has_cluster() else {k: n for k, n in wanted.items() if k in ("CPU", "GPU")}


def _environment(workers: Workers) -> dict[str, str]:
    """Environment variables of the workers."""
    return {**DRIVER_ENVIRONMENT, "OMP_NUM_THREADS": str(workers.threads)}


def each_on_workers(
    spec: JobSpec,
    begin: Callable[[], Any],
    work: Callable[[Any, Any], Any],
    items: Sequence[Any],
) -> Iterator[Any]:
    """What `work(begun, item)` gives for each item, as soon as it is known, in any order.

    `begun` is what `begin()` gives on each of the spec's workers. One that dies is replaced, and
    what it was at is done again. Raises the first worker's own error.
    """
    with session(spec):
        import ray
        from ray.util import ActorPool

        from pipeline.launch.failures import cause_of

        workers = spec.workers
        actor = ray.remote(
            num_cpus=workers.cpus_per_worker,
            num_gpus=int(workers.gpu),
            max_restarts=MAX_RESTARTS,
            max_task_retries=MAX_RESTARTS,
            runtime_env={"env_vars": _environment(workers)},
        )(_Worker)
        pool = ActorPool([actor.remote(begin) for _ in range(workers.most)])
        try:
            yield from pool.map_unordered(lambda one, item: one.work.remote(work, item), items)
        except ray.exceptions.RayError as error:
            raise cause_of(getattr(error, "cause", None) or error) from error


class _Worker:
    """Begins once, and works on one item after another."""

    def __init__(self, begin: Callable[[], Any]) -> None:
        self.begin = begin
        self.begun: Any = None

    def work(self, work: Callable[[Any, Any], Any], item: Any) -> Any:
        """What is to be done with an item."""
        if self.begun is None:  # an error of it is one of the work
            self.begun = self.begin()
        return work(self.begun, item)
