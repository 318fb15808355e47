"""Whether what containers run is what the real programs take, and fits to what is around it.

Command lines are parsed by the programs' own parsers; the job's file is read as `run` reads it.
"""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import click

from pipeline.errors import PipelineError
from pipeline.kubernetes.rules import Document, containers
from pipeline.spec import JobSpec, load, parse_override

from . import operator
from .documents import environment, expanded, name_of, of_kind, one, pods, write_files
from .references import ADMIN_FILES

SCHEDULE = re.compile(r"@(hourly|daily|weekly|monthly)|[\d*/,-]+( [\w*/,-]+){4}")


def mlflow_faults(found: list[Document]) -> list[str]:
    """Of the MLflow server: its command line, port, probes, host names and time to start."""
    return list(_mlflow_faults(found))


def _mlflow_faults(found: list[Document]) -> Iterator[str]:
    from mlflow.cli import cli
    from mlflow.server.security_utils import is_allowed_host_header

    pod = one(found, "Deployment", "mlflow")["spec"]["template"]["spec"]
    (server,) = pod["containers"]
    (upgrade,) = pod["initContainers"]
    options: dict[str, object] = {}
    for container in (server, upgrade):
        words = [*container["command"], *container.get("args", [])]
        try:
            if words[0] != "mlflow":
                raise click.UsageError(f"no such program: {words[0]}")
            options = _parsed(cli, words[1:]) if container is server else options
            if container is upgrade:
                _parsed(cli, words[1:])
        except click.ClickException as error:
            yield f"mlflow, {container['name']}: {error.format_message()}"
            return
    listens = {port["containerPort"] for port in server.get("ports", [])}
    if int(str(options["port"])) not in listens:
        yield f"mlflow listens on {options['port']}, the container opens {sorted(listens)}"
    if options["host"] != "0.0.0.0":
        yield "mlflow listens on one address only: --host=0.0.0.0"
    for key in ("startupProbe", "readinessProbe", "livenessProbe"):
        if server.get(key, {}).get("httpGet", {}).get("path") != "/health":
            yield f"mlflow: {key} asks for /health, which asks for no password"
    start = server.get("startupProbe", {})
    if start.get("periodSeconds", 10) * start.get("failureThreshold", 3) < 180:
        yield "mlflow has less than three minutes to start"
    said = environment(server)
    hosts = said.get("MLFLOW_SERVER_ALLOWED_HOSTS", "").split(",")
    for stranger in ("evil.com", "evil.com:5000", "mlflow.evil.com:5000", ""):
        if is_allowed_host_header(hosts, stranger):
            yield f"mlflow answers to the host {stranger!r}"
    service = one(found, "Service", "mlflow")
    (port,) = service["spec"]["ports"]
    name, namespace = service["metadata"]["name"], service["metadata"].get("namespace")
    wanted = [f"{name}{end}:{port['port']}" for end in ("", f".{namespace}", f".{namespace}.svc")]
    wanted += ["localhost:8080", "127.0.0.1:5000"]
    wanted += [rule["host"] for each in of_kind(found, "Ingress") for rule in each["spec"]["rules"]]
    for host in wanted:
        if not is_allowed_host_header(hosts, host):
            yield f"mlflow refuses the host {host}"
    if said.get("MLFLOW_SERVER_ENABLE_JOB_EXECUTION") != "false":
        yield "mlflow runs jobs beside tracking, which doubles its memory"
    if "--app-name=basic-auth" in server.get("args", []):
        missing = {"MLFLOW_AUTH_ADMIN_PASSWORD", "MLFLOW_FLASK_SERVER_SECRET_KEY"} - said.keys()
        yield from (f"mlflow with passwords has no {name}" for name in sorted(missing))


def _parsed(group: click.Command, words: list[str]) -> dict[str, object]:
    """The options of a command line, by the program's own parser. Raises ClickException."""
    command, context = group, click.Context(group)
    while isinstance(command, click.Group):
        name, *words = words or [""]
        found = command.get_command(context, name)
        if found is None:
            raise click.UsageError(f"no such command: {name}")
        command = found
        context = click.Context(command, info_name=name)
    return dict(command.make_context(command.name, list(words)).params)


def run_faults(run: list[Document], platform: list[Document], folder: Path) -> list[str]:
    """Of a run beside its platform: its command, its files, its nodes, its surroundings."""
    found = []
    for job in of_kind(run, "RayJob"):
        wrong = list(_nodes(job))
        found += wrong or [f"{name_of(job)}: {each}" for each in _job(job, run, folder)]
        found += _surroundings(job, run, platform)
    return found


def _job(job: Document, run: list[Document], folder: Path) -> Iterator[str]:
    from pipeline.cli import cli

    words = shlex.split(expanded(job["spec"]["entrypoint"], {}))  # as `ray job submit` has them
    if words[:3] != ["python", "-m", "pipeline"]:
        yield f"entrypoint runs {words[0]}, not `python -m pipeline`"
        return
    try:
        options = _parsed(cli, words[3:])
    except click.ClickException as error:
        yield f"entrypoint: {error.format_message()}"
        return
    root = _mounted(job, run, folder)
    path = root / str(options["job"])
    if not path.is_file():
        yield f"entrypoint: {options['job']} is not where the pod has it"
        return
    imports = options["imports"]
    assert isinstance(imports, tuple)
    for name in imports:
        if name.endswith(".py") and not (root / name).is_file():
            yield f"entrypoint: --import {name} is not where the pod has it"
    overrides = options["overrides"]
    assert isinstance(overrides, tuple)
    try:
        spec = load(path, dict(parse_override(text) for text in overrides))
    except PipelineError as error:
        yield f"entrypoint: {error}"
        return
    yield from _sizes(job, spec)
    yield from _storage(job, spec)


def _mounted(job: Document, run: list[Document], folder: Path) -> Path:
    """A folder with what the head's pod has in its working directory."""
    pod = job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    (container, *_) = pod["containers"]
    names = {
        mount["name"]
        for mount in container["volumeMounts"]
        if mount["mountPath"] == container.get("workingDir")
    }
    for volume in pod["volumes"]:
        if volume["name"] in names and "configMap" in volume:
            held = one(run, "ConfigMap", volume["configMap"]["name"])
            write_files(held, volume["configMap"].get("items", []), folder)
    return folder


def _sizes(job: Document, spec: JobSpec) -> Iterator[str]:
    """Whether the spec's workers find room in the pods, at the least and at the most."""
    workers = spec.workers
    per_pod, least, most = 0, 0, 0
    for group in job["spec"]["rayClusterSpec"]["workerGroupSpecs"]:
        params = group["rayStartParams"]
        (container, *_) = group["template"]["spec"]["containers"]
        limits = container["resources"]["limits"]
        gpus = int(params.get("num-gpus", 0))
        if gpus != sum(int(n) for key, n in limits.items() if key.endswith("gpu")):
            yield f"group {group['groupName']}: num-gpus is not the pods' GPUs"
        per_pod = math.floor(int(params["num-cpus"]) / workers.cpus_per_worker)
        if workers.gpu:
            per_pod = min(per_pod, gpus)
        least += group["minReplicas"] * per_pod
        most += group["maxReplicas"] * per_pod
        for key, value in (workers.labels or {}).items():
            is_for_ray = key != "ray.io/market-type" and not value.startswith("!")
            if is_for_ray and group.get("labels", {}).get(key) != value:
                yield f"group {group['groupName']}: its nodes are not labelled {key}={value}"
        for key in workers.resources:
            if key not in params.get("resources", ""):
                yield f"group {group['groupName']}: its nodes have no {key}"
    if least < workers.least or most < workers.most:
        yield f"pods have room for {least} to {most} workers, not {workers.least} to {workers.most}"
    if most > workers.most:
        yield f"pods have room for {most} workers, of which {workers.most} are used"


def _storage(job: Document, spec: JobSpec) -> Iterator[str]:
    if "://" in spec.storage:
        return
    cluster = job["spec"]["rayClusterSpec"]
    claims = []
    for group in [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]:
        pod = group["template"]["spec"]
        mounts = {each["mountPath"]: each["name"] for each in pod["containers"][0]["volumeMounts"]}
        volumes = {each["name"]: each for each in pod["volumes"]}
        volume = volumes.get(mounts.get(spec.storage, ""), {})
        claims.append(volume.get("persistentVolumeClaim", {}).get("claimName"))
    if None in claims or len(set(claims)) > 1:
        yield f"storage {spec.storage} is not one volume that all pods mount"


def _nodes(job: Document) -> Iterator[str]:
    """Whether Ray takes the parameters that the operator hands it."""
    from ray.scripts.scripts import cli as ray

    for pod in operator.expand(job)[:-1]:
        (container, *_) = pod["spec"]["containers"]
        words = shlex.split(container["args"][0].partition(";")[2])
        try:
            options = _parsed(ray, words[1:])
        except click.ClickException as error:
            yield f"pod {pod['metadata']['name']}: ray start: {error.format_message()}"
            continue
        shm = next(
            (v["emptyDir"].get("sizeLimit", "0") for v in pod["spec"]["volumes"]
             if v.get("emptyDir", {}).get("medium") == "Memory"), "0",
        )  # fmt: skip
        from pipeline.kubernetes.platform import amount

        if int(str(options["object_store_memory"] or 2**60)) > amount(shm):
            yield f"pod {pod['metadata']['name']}: the object store does not fit into /dev/shm"


def _surroundings(job: Document, run: list[Document], platform: list[Document]) -> Iterator[str]:
    from mlflow.server.security_utils import is_allowed_host_header

    (server,) = one(platform, "Deployment", "mlflow")["spec"]["template"]["spec"]["containers"]
    hosts = environment(server)["MLFLOW_SERVER_ALLOWED_HOSTS"].split(",")
    settings = one(platform, "ConfigMap", "platform")
    if job["metadata"].get("namespace") != settings["metadata"].get("namespace"):
        yield "the run is in another namespace than its platform"
    for where, pod in pods([job]):
        (container, *_) = pod["spec"]["containers"]
        said = environment(container)
        if container["name"] != "ray":
            continue
        uri = urlsplit(said.get("MLFLOW_TRACKING_URI", ""))
        if uri.scheme != "http" or not is_allowed_host_header(hosts, uri.netloc):
            yield f"{where}: MLFLOW_TRACKING_URI is not one that the server answers to"
        mounts = {mount["mountPath"] for mount in container["volumeMounts"]}
        if said.get("PIPELINE_CACHE") not in mounts:
            yield f"{where}: PIPELINE_CACHE is not a volume, and /tmp is too small for it"
        if container.get("workingDir") not in mounts:
            yield f"{where}: the working directory is not where the job's files are"
        secrets = {each["secretRef"]["name"] for each in container.get("envFrom", [])}
        wanted = {settings["data"].get(key) for key in ("mlflow_secret", "storage_secret")}
        if missing := {name for name in wanted if name} - secrets:
            yield f"{where}: without the secrets {sorted(missing)}"
    queue = settings["data"].get("queue")
    if queue and job["metadata"].get("labels", {}).get("kueue.x-k8s.io/queue-name") != queue:
        yield "the run is in no queue of its platform"
    ours = [c["image"] for _, pod in pods(run) for c in containers(pod)]
    known = {settings["data"].get("image"), settings["data"].get("gpu_image")}
    yield from (f"image {image} is not of the platform" for image in sorted({*ours} - known))


def schedule_faults(found: list[Document]) -> list[str]:
    """Of what the clock starts: its times, its command, its job's file, what it may."""
    return [fault for each in of_kind(found, "CronJob") for fault in _schedule(each, found)]


def _schedule(document: Document, found: list[Document]) -> Iterator[str]:
    from pipeline.cli import cli

    where, spec = name_of(document), document["spec"]
    if not SCHEDULE.fullmatch(spec["schedule"]):
        yield f"{where}: {spec['schedule']!r} is no schedule"
    if spec.get("concurrencyPolicy") != "Forbid":
        yield f"{where}: a late one would be submitted beside the next"
    ((_, pod),) = pods([document])
    (container,) = pod["spec"]["containers"]
    words = shlex.split(container["args"][0])
    try:
        if words[:2] != ["exec", "pipeline"]:
            raise click.UsageError(f"runs {' '.join(words[:2])}")
        options = _parsed(cli, words[2:])
    except click.ClickException as error:
        yield f"{where}: {error.format_message()}"
        return
    if not (options.get("yes") and options.get("detach")):
        yield f"{where}: nobody is there to be asked, or to follow it"
    if "TICK##*-" not in str(options["overrides"]):
        yield f"{where}: the second one would have the first one's name"
    volumes = {each["name"]: each.get("configMap", {}) for each in pod["spec"]["volumes"]}
    folder, _, name = str(options["job"]).rpartition("/")
    held = [volumes[one["name"]] for one in container["volumeMounts"] if one["mountPath"] == folder]
    if not any(name in ADMIN_FILES.get(one.get("name"), ()) for one in held):
        yield f"{where}: {options['job']} is in no volume"
    account = pod["spec"].get("serviceAccountName")
    bound = {
        one["roleRef"]["name"]
        for one in of_kind(found, "RoleBinding")
        for subject in one["subjects"]
        if subject["name"] == account
    }
    roles = {one["metadata"]["name"] for one in of_kind(found, "Role")}
    own = one(found, "ServiceAccount", account) if account else {}
    if "trainer" not in bound & roles or own.get("automountServiceAccountToken") is False:
        yield f"{where}: it may not do what those may who train"


def hook_faults(run: list[Document]) -> list[str]:
    """The hook before a head's end: a module that is there, with the time that it has."""
    import importlib.util

    found = []
    for job in of_kind(run, "RayJob"):
        pod = job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
        hook = pod["containers"][0].get("lifecycle", {}).get("preStop", {})
        words = hook.get("exec", {}).get("command", [])
        if words[:2] != ["python", "-m"] or not importlib.util.find_spec(words[2]):
            found.append(f"preStop: {' '.join(words)} is not a module of ours")
        elif not re.fullmatch(r"\d+", words[3]) or (
            int(words[3]) >= pod.get("terminationGracePeriodSeconds", 30)
        ):
            found.append("preStop: it has less time than the pod's grace")
    return found
