"""The Ray cluster of a command: the one that RAY_ADDRESS names, or one of its own."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import queue
import socket
import threading
import warnings
from collections.abc import Iterator
from typing import Any

from pipeline.errors import UsageError
from pipeline.launch.resources import Node, has_cluster, refuse_too_small
from pipeline.spec import JobSpec

# Read by Ray while it is imported or started; a user's own setting wins.
DRIVER_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",  # no report to outside
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # the new behaviour, without its warning
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # the patch prints every line twice
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",  # 2 s by default: how late an end is noticed
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # the first worker looks itself (`train/drains.py`)
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # relative paths mean the same in every worker
    "TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S": "5",  # 30 s by default, waited after a crash
}
OWN_CLUSTER_ENVIRONMENT = {
    "RAY_AUTH_MODE": "disabled",  # local and private: no token file in the user's home
    "RAY_worker_niceness": "0",  # 15 by default: workers starve beside any other load
    "RAY_enable_worker_prestart": "0",  # prestarted processes are never used by Train
    "RAY_prestart_worker_first_driver": "0",
}
OBJECT_STORE_BYTES = 80 * 2**20  # the least Ray takes: rows never pass through it
REACH_SECONDS = 5.0
"""How long a cluster may take to answer, and again to say who may come in."""


@contextlib.contextmanager
def session(spec: JobSpec, alone: bool = False) -> Iterator[None]:
    """A Ray cluster for one run or several, of at most as many workers as `spec` says.

    `alone` is for Train in this process, which needs none. Raises UsageError for a cluster that
    does not answer, or can never hold the workers.
    """
    for key, value in DRIVER_ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    with warnings.catch_warnings(), _quiet():
        warnings.simplefilter("ignore")
        import ray

        with _own_signals(ray), _connected(spec, ray, alone):
            yield


@contextlib.contextmanager
def _connected(spec: JobSpec, ray: Any, alone: bool) -> Iterator[None]:
    if alone or ray.is_initialized():
        yield
        return
    workers = spec.workers
    try:
        if not has_cluster():
            for key, value in OWN_CLUSTER_ENVIRONMENT.items():
                os.environ.setdefault(key, value)
        _read_authentication_again()
        if has_cluster():
            refuse_unreachable(os.environ["RAY_ADDRESS"])
            ray.init(logging_level="ERROR", log_to_driver=False)
            refuse_too_small(workers, nodes())
        else:
            ray.init(
                address="local",  # not one that happens to run on this machine
                num_cpus=math.ceil(workers.most * workers.cpus_per_worker),  # more than cores run
                include_dashboard=False,
                logging_level="ERROR",
                log_to_driver=False,
                object_store_memory=OBJECT_STORE_BYTES,
            )
            _refuse_too_few_gpus(spec)
        # no setting stops a long line for each dead worker; progress says it in a short one
        ray._private.worker.print_to_stdstream = lambda *_, **__: None
        yield
    finally:
        ray.shutdown()


def _read_authentication_again() -> None:
    """Ray keeps the mode and the token that this process had first, as for another cluster: of the
    processes of this one, which have those of the environment now, it would refuse every call."""
    with contextlib.suppress(ImportError, AttributeError):
        from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]

        Config.initialize("")
        AuthenticationTokenLoader.instance().reset_cache()  # in this order, as in Ray's own tests


def nodes() -> list[Node]:
    """The living nodes of the cluster that this process is connected to."""
    import ray

    free = ray._private.state.available_resources_per_node()
    return [
        Node(
            node["NodeManagerAddress"],
            node["Resources"],
            free.get(node["NodeID"], {}),
            node["Labels"],
        )
        for node in ray.nodes()
        if node["Alive"]
    ]


def _refuse_too_few_gpus(spec: JobSpec) -> None:
    """More workers than cores run on one machine, but not more than GPUs."""
    num_gpus = sum(node.total.get("GPU", 0) for node in nodes())
    if spec.workers.gpu and num_gpus < spec.workers.least:
        there = f"this machine has {num_gpus:g}"
        raise UsageError(f"workers: {spec.workers.least} with a GPU each; {there}")


def refuse_unreachable(address: str) -> None:
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
