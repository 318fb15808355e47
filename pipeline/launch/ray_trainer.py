"""Ray, in one place: the settings that make it start fast and quietly, and `TorchTrainer`."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import queue
import secrets
import socket
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from pipeline.errors import PipelineError, StoppedError, UsageError
from pipeline.launch.signals import attend
from pipeline.spec import JobSpec
from pipeline.train.assignment import Assignment

# Read by Ray while it is imported or started; a user's own setting wins.
DRIVER_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",  # no report to outside
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # the new behaviour, without its warning
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # the patch prints every line twice
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",  # 2 s by default: how late an end is noticed
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # relative paths mean the same in every worker
    "TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S": "5",  # 30 s by default, waited after a crash
}
OWN_CLUSTER_ENVIRONMENT = {
    "RAY_AUTH_MODE": "disabled",  # local and private: no token file in the user's home
    "RAY_worker_niceness": "0",  # 15 by default: workers starve beside any other load
    "RAY_enable_worker_prestart": "0",  # prestarted processes are never used by Train
    "RAY_prestart_worker_first_driver": "0",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # nothing can preempt the only node
}
OBJECT_STORE_BYTES = 80 * 2**20  # the least Ray takes: rows never pass through it


ELASTIC_ENVIRONMENT = {
    # how long a worker group may wait for the nodes it was promised; 60 s by default, for which a
    # run stands still after a node is lost
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "15",
}
MAX_RESTARTS = 3
"""How often a worker that predicts is started again, and its file begun anew."""
REACH_SECONDS = 5.0
"""How long a cluster may take to answer, and again to say who may come in."""
RESIZE_SECONDS = 15.0  # between looks for more nodes; 60 by default


def in_process(spec: JobSpec) -> bool:
    """One worker, and no cluster to put it on: it runs in the command's own process."""
    return spec.workers.most == 1 and "RAY_ADDRESS" not in os.environ


def fit(assignment: Assignment, max_failures: int = -1) -> None:
    """Run a job on its workers, to the end; dead ones are replaced, `max_failures` times.

    An assignment that holds the job itself, and not only its spec, is run in this process.
    Raises the first failing worker's own error, which is not tried again, or RunError; and
    StoppedError after a signal, when the workers have saved their state and ended.
    """
    spec, run = assignment.spec, assignment.run
    elastic = ELASTIC_ENVIRONMENT if spec.workers.max and not _may_grow() else {}
    for key, value in (DRIVER_ENVIRONMENT | elastic).items():
        os.environ.setdefault(key, value)
    with warnings.catch_warnings(), _quiet():
        warnings.simplefilter("ignore")
        import ray
        import ray.train.torch as ray_torch
        from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig

        from pipeline.launch.failures import Restarts, cause_of, is_untried, own_error
        from pipeline.train.worker import work

        alone = assignment.job is not None
        workers = spec.workers
        worker_environment = {**DRIVER_ENVIRONMENT, "OMP_NUM_THREADS": str(workers.threads)}
        restarts = Restarts(run)

        def trainer() -> Any:
            return ray_torch.TorchTrainer(
                work,
                train_loop_config={"assignment": assignment},
                torch_config=ray_torch.TorchConfig(
                    backend="nccl" if workers.gpu else "gloo",
                    timeout_s=math.ceil(workers.timeout_seconds),
                ),
                scaling_config=ScalingConfig(
                    num_workers=0 if alone else workers.num or (workers.least, workers.most),
                    use_gpu=workers.gpu,
                    resources_per_worker={"CPU": workers.cpus_per_worker}
                    | ({"GPU": 1} if workers.gpu else {}),
                    elastic_resize_monitor_interval_s=RESIZE_SECONDS,
                ),
                run_config=RunConfig(
                    name=f"{run.name}-{secrets.token_hex(2)}",
                    storage_path=str(run.path.parent / ".ray"),
                    logging_config=LoggingConfig(log_level="ERROR"),
                    failure_config=FailureConfig(max_failures=max_failures),
                    callbacks=[] if alone else [restarts],
                    worker_runtime_env={"env_vars": worker_environment},
                ),
            )

        with _own_signals(ray), _cluster(spec, ray, alone):
            while True:
                try:
                    attend(trainer().fit, run, waits_for_workers=not alone)
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


@contextlib.contextmanager
def _own_signals(ray: Any) -> Iterator[None]:
    """Signals to this process, or to its whole group as from `timeout`, are ours to answer.

    Ray's answer to SIGTERM, to exit with code 15, does not take the place of ours; and the
    processes of a local cluster, which would end and take the workers with them, get a group of
    their own. They still die with this one.
    """
    utils = ray._private.utils
    before = utils.set_sigterm_handler, utils.set_kill_on_parent_death_linux

    def in_own_group() -> None:
        os.setpgid(0, 0)
        before[1]()

    utils.set_sigterm_handler = lambda _: None
    utils.set_kill_on_parent_death_linux = in_own_group
    try:
        yield
    finally:
        utils.set_sigterm_handler, utils.set_kill_on_parent_death_linux = before


@contextlib.contextmanager
def session(spec: JobSpec) -> Iterator[None]:
    """One Ray cluster for several runs, of at most as many workers as `spec` says."""
    for key, value in DRIVER_ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    with warnings.catch_warnings(), _quiet():
        warnings.simplefilter("ignore")
        import ray

        with _own_signals(ray), _cluster(spec, ray, alone=False):
            yield


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
        environment = {**DRIVER_ENVIRONMENT, "OMP_NUM_THREADS": str(workers.threads)}
        actor = ray.remote(
            num_cpus=workers.cpus_per_worker,
            num_gpus=int(workers.gpu),
            max_restarts=MAX_RESTARTS,
            max_task_retries=MAX_RESTARTS,
            runtime_env={"env_vars": environment},
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


@contextlib.contextmanager
def _cluster(spec: JobSpec, ray: Any, alone: bool) -> Iterator[None]:
    """A Ray cluster for the time of the run: the one we are in, or one of our own."""
    if alone or ray.is_initialized():
        yield
        return
    try:
        if "RAY_ADDRESS" in os.environ:
            _refuse_unreachable(os.environ["RAY_ADDRESS"])
            ray.init(logging_level="ERROR")
        else:
            for key, value in OWN_CLUSTER_ENVIRONMENT.items():
                os.environ.setdefault(key, value)
            ray.init(
                address="local",  # not one that happens to run on this machine
                # more workers than cores run
                num_cpus=math.ceil(spec.workers.most * spec.workers.cpus_per_worker),
                include_dashboard=False,
                logging_level="ERROR",
                log_to_driver=False,
                object_store_memory=OBJECT_STORE_BYTES,
            )
            # no setting stops a long line for each dead worker; progress says it in a short one
            ray._private.worker.print_to_stdstream = lambda *_, **__: None
        _refuse_too_few(spec, [node["Resources"] for node in ray.nodes() if node["Alive"]])
        yield
    finally:
        ray.shutdown()


def _refuse_unreachable(address: str) -> None:
    """Raise UsageError where no cluster answers, or refuses our token: Ray would wait for long."""
    if "://" in address and not address.startswith("ray://"):
        raise UsageError(
            f"RAY_ADDRESS {address}: expected HOST:PORT, as `ray start` prints it; addresses with "
            "http are for `ray job submit`"
        )
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not (host and port.isdigit()):  # `auto` and `local` are found by Ray
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), REACH_SECONDS).close()
    except OSError as error:
        raise UsageError(
            f"RAY_ADDRESS {address}: no cluster answers there: {error.strerror or error}"
        ) from None
    if address.startswith("ray://"):
        return
    answer: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()
    threading.Thread(target=_ask, args=(f"{host}:{port}", answer), daemon=True).start()
    try:
        refusal = answer.get(timeout=REACH_SECONDS)
    except queue.Empty:
        raise UsageError(
            f"RAY_ADDRESS {address}: what answers there is not a Ray cluster, or too busy"
        ) from None
    if refusal is not None:
        is_token = type(refusal).__name__ == "AuthenticationError"
        reason = (
            "the cluster refuses this token: set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or "
            "RAY_AUTH_TOKEN_PATH"
            if is_token
            else str(refusal).partition("\n")[0]
        )
        raise UsageError(f"RAY_ADDRESS {address}: {reason}")


def _ask(address: str, answer: queue.SimpleQueue[BaseException | None]) -> None:
    from ray._raylet import GcsClient  # type: ignore[attr-defined]

    try:
        GcsClient(address=address).get_all_node_info(timeout=int(REACH_SECONDS))
        answer.put(None)
    except BaseException as error:
        answer.put(error)


def _refuse_too_few(spec: JobSpec, nodes: list[dict[str, float]]) -> None:
    """A cluster that can never hold the workers would let the job wait for ever.

    A worker stands on one node: what is left over on several of them is of no use to it.
    """
    if _may_grow():
        return
    workers = spec.workers
    least = workers.least
    cpus = workers.cpus_per_worker
    gpus = 1 if workers.gpu else 0
    if gpus and sum(node.get("GPU", 0) for node in nodes) < least:
        num_gpus = sum(node.get("GPU", 0) for node in nodes)
        raise UsageError(f"workers: {least} with a GPU each, the cluster has {num_gpus:g} GPUs")
    fitting = [
        min(int(node.get("CPU", 0) / cpus), int(node.get("GPU", 0)) if gpus else least)
        for node in nodes
    ]
    if sum(fitting) < least:
        known = " + ".join(f"{node.get('CPU', 0):g}" for node in nodes if node.get("CPU"))
        raise UsageError(
            f"workers: {least} x {cpus:g} CPUs{' and a GPU each' if gpus else ''}; the cluster has "
            f"{known or 0} CPUs on its nodes, room for {sum(fitting)}"
        )


def _may_grow() -> bool:
    """Whether an autoscaler may add nodes; KubeRay sets this in a head that has one."""
    asked = {key.upper(): value for key, value in os.environ.items()}
    return asked.get("RAY_ENABLE_AUTOSCALER_V2", "0").lower() not in ("", "0", "false")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Ray's loggers at ERROR: what matters reaches the user as an exception."""
    names = ("ray", "ray.train", "ray.data", "ray._private", "torch.distributed")
    before = {name: logging.getLogger(name).level for name in names}
    for name in names:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        yield
    finally:
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)
