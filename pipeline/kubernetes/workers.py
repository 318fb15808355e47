"""The pods that a spec's workers need: how many, how large, on which nodes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from pipeline.errors import UsageError
from pipeline.kubernetes.platform import Platform, amount
from pipeline.kubernetes.rules import LABEL, LABEL_KEY
from pipeline.spec.sections import Workers

MARKET = "ray.io/market-type"
"""Ray's label of a node that may go at any time (`spot`) or not (`on-demand`)."""
TAKEN = ("app.kubernetes.io", "batch.kubernetes.io", "ray.io", "kueue.x-k8s.io")
"""Of labels, which would change what a pod belongs to."""
RAY_GIB = 1.0
"""Of a pod's memory for Ray itself and its object store."""


@dataclass(frozen=True)
class WorkerPods:
    """A Ray worker group: pods with `workers_per_pod` workers each."""

    least: int
    most: int
    workers_per_pod: int
    cpus: int
    """That Ray gives to workers of a pod."""
    cpu_request: str
    memory: str
    gpus: int
    labels: dict[str, str]
    """Of the pod's Ray node."""
    node_labels: dict[str, str]
    """That nodes must have."""
    avoided_labels: dict[str, str]
    """That nodes must not have."""
    is_apart: bool
    """Whether each pod stands on a node of its own."""
    is_spread: bool
    """Whether pods stand on as many nodes as there are for them."""
    tolerations: list[dict[str, str]]

    @property
    def is_elastic(self) -> bool:
        """Whether their number may change."""
        return self.least < self.most


def worker_pods(workers: Workers, platform: Platform) -> WorkerPods:
    """What `workers` becomes on a platform. Raises UsageError for what it does not have there."""
    if workers.gpu and not platform.gpu_image:
        raise UsageError("workers.gpu: the platform has no GPUs (`gpu_image` is not set in it)")
    if workers.cpus_per_worker <= 0.5:
        raise UsageError(
            f"workers.cpus_per_worker: {workers.cpus_per_worker:g}: a pod has whole CPUs, and Ray "
            "would put several workers on one: give 1 (`cpu_request` of the platform lets pods "
            "share a core)"
        )
    if workers.least < workers.most:
        if not platform.autoscaler:
            raise UsageError(
                "workers.min, workers.max: the platform lets no run grow or shrink (`autoscaler` "
                "is not set); --set workers.num=N --set workers.min=null --set workers.max=null"
            )
        if platform.queue:
            raise UsageError(
                "workers.min, workers.max: a queue admits runs of a fixed size; --set workers.num=N"
                " --set workers.min=null --set workers.max=null"
            )
    if workers.resources:
        raise UsageError(
            "workers.resources: on Kubernetes each pod would be told that it has them, so nothing "
            "would be limited: a queue or a quota does that"
        )
    per_pod = _workers_per_pod(workers, platform)
    spot = _wants_spot(workers, platform)
    node_labels, avoided_labels = _node_labels(workers, platform, spot)
    tolerations = list(platform.gpu_taints) if workers.gpu else []
    tolerations += platform.spot_taints if spot else []
    cpus = workers.cpus_per_worker * per_pod
    return WorkerPods(
        least=workers.least // per_pod,
        most=workers.most // per_pod,
        workers_per_pod=per_pod,
        cpus=math.ceil(cpus),
        cpu_request=f"{math.ceil(cpus * platform.cpu_request * 1000)}m",
        memory=_memory(workers, platform, per_pod),
        gpus=per_pod if workers.gpu else 0,
        labels=_ray_labels(workers, spot),
        node_labels=node_labels,
        avoided_labels=avoided_labels,
        is_apart=workers.placement == "strict_spread",
        is_spread=workers.placement == "spread",
        tolerations=tolerations,
    )


def start_params(pods: WorkerPods) -> dict[str, str]:
    """What `ray start` is told in a worker's pod, all as text."""
    params = {"num-cpus": str(pods.cpus)}
    if pods.gpus:
        params["num-gpus"] = str(pods.gpus)
    return params


def node_affinity(pods: WorkerPods) -> dict[str, Any]:
    """The nodes that pods may stand on; empty where any will do."""
    wanted = [
        *({"key": key, "operator": "In", "values": [value]} for key, value in
          sorted(pods.node_labels.items())),
        *({"key": key, "operator": "NotIn", "values": [value]} for key, value in
          sorted(pods.avoided_labels.items())),
    ]  # fmt: skip
    return required(wanted)


def required(expressions: list[dict[str, Any]]) -> dict[str, Any]:
    """The affinity that requires all of them of a node."""
    if not expressions:
        return {}
    terms = {"nodeSelectorTerms": [{"matchExpressions": expressions}]}
    return {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": terms}}


def _workers_per_pod(workers: Workers, platform: Platform) -> int:
    """As many as share a node's GPUs, so that these talk directly; one each without GPUs."""
    together = math.gcd(workers.least, workers.most)
    if workers.placement == "strict_pack":
        if workers.gpu and together > platform.gpus_per_node:
            raise UsageError(
                f"workers.placement: strict_pack wants {together} GPUs on one node, the platform's "
                f"have {platform.gpus_per_node} (`gpus_per_node`)"
            )
        return together
    if not workers.gpu or workers.placement != "pack":
        return 1
    most = min(together, platform.gpus_per_node)
    return max(n for n in range(1, most + 1) if together % n == 0)


def _memory(workers: Workers, platform: Platform, per_pod: int) -> str:
    if workers.gib_per_worker is None and per_pod == 1:
        return platform.worker_memory
    own = workers.gib_per_worker
    if own is None and amount(platform.worker_memory) <= RAY_GIB * 2**30:
        raise UsageError(
            f"`worker_memory` of the platform is {platform.worker_memory}, of which Ray takes "
            f"{RAY_GIB:g} GiB; workers.gib_per_worker says what each needs"
        )
    each = amount(platform.worker_memory) / 2**30 - RAY_GIB if own is None else own
    return f"{math.ceil((each * per_pod + RAY_GIB) * 1024)}Mi"


def _wants_spot(workers: Workers, platform: Platform) -> bool | None:
    """Whether workers want nodes that may go (True), must not have them (False), or do not care."""
    said = workers.labels.get(MARKET)
    if said is None:
        return None
    meanings = {"spot": True, "!spot": False, "on-demand": False, "!on-demand": True}
    if said not in meanings:
        raise UsageError(
            f"workers.labels.{MARKET}: {said!r}: expected one of {', '.join(meanings)}"
        )
    if not platform.spot_label and meanings[said]:
        raise UsageError(
            f"workers.labels.{MARKET}: the platform has no spot nodes (`spot_label` is not set)"
        )
    return meanings[said]


def _gpu_type(accelerator: str, platform: Platform) -> dict[str, str]:
    if accelerator not in platform.gpu_types:
        known = ", ".join(platform.gpu_types) or "none"
        raise UsageError(
            f"workers.accelerator: {accelerator} is not among the platform's `gpu_types`: {known}"
        )
    return {platform.gpu_type_label: platform.gpu_types[accelerator]}


def _node_labels(
    workers: Workers, platform: Platform, spot: bool | None
) -> tuple[dict[str, str], dict[str, str]]:
    """Labels of Kubernetes that nodes must have, and that they must not have."""
    wanted = dict(platform.spot_label) if spot else {}
    avoided = dict(platform.spot_label) if spot is False else {}
    if workers.accelerator:
        wanted |= _gpu_type(workers.accelerator, platform)
    for key, value in workers.labels.items():
        if key == MARKET:
            continue
        if key.partition("/")[0] in TAKEN:
            raise UsageError(f"workers.labels.{key}: Kubernetes has a meaning of its own for it")
        side, value = (avoided, value[1:]) if value.startswith("!") else (wanted, value)
        if not (LABEL_KEY.fullmatch(key) and LABEL.fullmatch(value)):
            raise UsageError(
                f"workers.labels.{key}: {value!r}: expected a label of Kubernetes, as `zone: a`, "
                "or `zone: '!a'` for nodes without it"
            )
        side[key] = value
    return wanted, avoided


def _ray_labels(workers: Workers, spot: bool | None) -> dict[str, str]:
    """What the pods' Ray nodes are called, so that Ray puts the workers there."""
    own = {key: value for key, value in workers.labels.items() if key != MARKET}
    labels = {key: value for key, value in own.items() if not value.startswith("!")}
    if spot is not None:
        labels[MARKET] = "spot" if spot else "on-demand"
    return labels
