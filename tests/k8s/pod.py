"""A pod's containers, run here by podman: its image, volumes, user, limits and environment.

What the kubelet does with a pod is done by a container runtime; what is missing is the kubelet.
"""

from __future__ import annotations

import contextlib
import os
import resource
import secrets
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.kubernetes.platform import amount
from pipeline.kubernetes.pods import USER
from pipeline.kubernetes.rules import Document

from .documents import expanded, one, write_files
from .image import podman

MIB = 2**20


@dataclass
class Machines:
    """A network of pods on this machine, with a server of names; where volumes are."""

    folder: Path
    objects: list[Document]
    images: dict[str, str]
    """What stands for the images that the manifests name."""
    secrets: dict[str, str]
    """Values of the Secrets' keys."""
    network: str
    gateway: str
    """Address of this machine in it."""
    peaks: dict[str, int] = field(default_factory=dict)
    """Bytes of memory that each pod's main container took at most, as far as it was seen."""
    accounts: dict[str, Path] = field(default_factory=dict)
    """Where the kernel keeps account of each pod's memory."""

    def volume(self, name: str) -> Path:
        """The folder of a volume that pods share."""
        return _owned(self.folder / "volumes" / name)


@contextlib.contextmanager
def machines(
    folder: Path, objects: list[Document], images: dict[str, str], known: dict[str, str]
) -> Iterator[Machines]:
    """A network for pods, taken down afterwards."""
    name, subnet = f"pods-{secrets.token_hex(3)}", f"10.78.{secrets.randbelow(250)}"
    podman("network", "create", f"--subnet={subnet}.0/24", name)
    try:  # the network and its names are there as long as one container is
        keeper = podman("run", "--detach", f"--network={name}", *ulimits(), images["keeper"],
                        "sleep", "infinity")  # fmt: skip
        made = Machines(folder, objects, images, known, name, f"{subnet}.1")
        try:
            with _watched(made):
                yield made
        finally:
            podman("rm", "--force", "--time=0", keeper)
    finally:
        podman("network", "rm", "--force", name)


@dataclass
class Running:
    """A pod's main container, which has started."""

    name: str
    address: str

    def terminate(self) -> None:
        """SIGTERM to its first process, as the kubelet sends it."""
        podman("kill", "--signal=TERM", self.name)

    def is_running(self) -> bool:
        return podman("inspect", "--format={{.State.Running}}", self.name) == "true"

    def log(self) -> str:
        """What it has printed."""
        words = ["podman", "logs", self.name]
        done = subprocess.run(words, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        return done.stdout

    def wait(self, seconds: float) -> int:
        """Its exit code; killed where it takes longer than its grace."""
        try:
            return int(podman("wait", self.name, timeout=seconds))
        except subprocess.TimeoutExpired:
            podman("kill", self.name)
            return int(podman("wait", self.name))

    def execute(self, command: list[str]) -> None:
        """A command in it, as `exec` of a hook runs it."""
        podman("exec", self.name, *command)


@contextlib.contextmanager
def running(pod: Document, at: Machines, name: str = "", *names: str) -> Iterator[Running]:
    """A pod: its init containers to their ends, one after the other, then the main one.

    `names` are more host names that lead to it.
    """
    name = name or pod["metadata"]["name"]
    folder = at.folder / f"{name}-{secrets.token_hex(3)}"
    folder.mkdir()
    (container, *_) = pod["spec"]["containers"]
    for each in pod["spec"].get("initContainers", []):
        podman("run", "--rm", *_options(pod, each, at, folder), *_command(each, at))
    aliases = [f"--network-alias={each}" for each in (name, *names)]
    options = [*_options(pod, container, at, folder), *aliases, f"--hostname={name}"]
    made = podman("run", "--detach", *options, *_command(container, at))
    try:
        place = "--format={{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}"
        address = podman("inspect", place, made)
        with contextlib.suppress(OSError):  # it has ended already
            at.accounts[name] = _account(made)
        yield Running(made, address)
    finally:
        at.accounts.pop(name, None)
        podman("rm", "--force", "--time=0", made)


def _options(pod: Document, container: Document, at: Machines, folder: Path) -> list[str]:
    """How a container is run: what the kubelet tells the container runtime."""
    own, whole = container["securityContext"], pod["spec"]["securityContext"]
    limits = container["resources"]["limits"]
    words = [
        f"--network={at.network}", *ulimits(), f"--memory={int(amount(limits['memory']))}",
        f"--user={whole['runAsUser']}:{whole['runAsGroup']}",
        *(f"--cap-drop={each}" for each in own["capabilities"]["drop"]),
    ]  # fmt: skip
    if "cpu" in limits:
        words.append(f"--cpus={amount(limits['cpu'])}")
    if not own["allowPrivilegeEscalation"]:
        words.append("--security-opt=no-new-privileges")
    if own["readOnlyRootFilesystem"]:
        words += ["--read-only", "--read-only-tmpfs=false"]
    if "workingDir" in container:
        words.append(f"--workdir={container['workingDir']}")
    for each in container.get("env", []):
        words.append(f"--env={each['name']}={_value(each, at)}")
    volumes = {each["name"]: each for each in pod["spec"].get("volumes", [])}
    for mount in container.get("volumeMounts", []):
        source, end = _source(volumes[mount["name"]], at, folder), mount["mountPath"]
        if source is None:
            words.append(f"--tmpfs={end}:rw,size=1g,mode=1777")
        else:
            words.append(f"--volume={source}:{end}{':ro' if mount.get('readOnly') else ''}")
    return words


def ulimits() -> list[str]:
    """Podman asks for more than this machine's own limits, which not every root may raise."""
    kinds = (("nofile", resource.RLIMIT_NOFILE), ("nproc", resource.RLIMIT_NPROC))
    own = {name: min(resource.getrlimit(kind)[1], 2**14) for name, kind in kinds}
    return [f"--ulimit={name}={most}:{most}" for name, most in own.items()]


def _command(container: Document, at: Machines) -> list[str]:
    """The image and what it is to run, with the variables that Kubernetes puts in."""
    values = {each["name"]: _value(each, at) for each in container.get("env", [])}
    words = [expanded(one, values) for one in [*container["command"], *container.get("args", [])]]
    return [f"--entrypoint={words[0]}", at.images[container["image"]], *words[1:]]


def _value(variable: Document, at: Machines) -> str:
    reference = variable.get("valueFrom", {}).get("secretKeyRef")
    return at.secrets[reference["key"]] if reference else str(variable.get("value", ""))


def _source(volume: Document, at: Machines, folder: Path) -> Path | None:
    """The folder behind a volume; None for one in memory."""
    if volume.get("emptyDir", {}).get("medium") == "Memory":
        return None
    if "persistentVolumeClaim" in volume:
        return at.volume(str(volume["persistentVolumeClaim"]["claimName"]))
    source = _owned(folder / str(volume["name"]))
    if "configMap" in volume:
        held = one(at.objects, "ConfigMap", volume["configMap"]["name"])
        data = source / f"..{folder.name}"  # as the kubelet does, another in each pod
        if not data.exists():
            (source / "..data").symlink_to(data.name)
            write_files(held, volume["configMap"]["items"], data)
            for top in data.iterdir():
                (source / top.name).symlink_to(f"..data/{top.name}")
    return source


def _owned(folder: Path) -> Path:
    """A folder that belongs to the pods' group, as `fsGroup` asks."""
    folder.mkdir(parents=True, exist_ok=True)
    os.chown(folder, USER, USER)
    return folder


@contextlib.contextmanager
def _watched(at: Machines) -> Iterator[None]:
    """Keeps `peaks`: what the kubelet calls the working set, read twice a second."""
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(0.5):
            for name, account in list(at.accounts.items()):
                with contextlib.suppress(OSError):  # it has just ended
                    at.peaks[name] = max(at.peaks.get(name, 0), _working_set(account))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _account(container: str) -> Path:
    """Where the kernel keeps account of a container's memory, under cgroups of both versions."""
    pid = podman("inspect", "--format={{.State.Pid}}", container)
    groups = dict(
        line.split(":", 2)[1:] for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines()
    )
    if "memory" in groups:
        return Path(f"/sys/fs/cgroup/memory{groups['memory']}/memory.usage_in_bytes")
    return Path(f"/sys/fs/cgroup{groups['']}/memory.current")


def _working_set(account: Path) -> int:
    """Bytes in use, less pages of files that the kernel may drop at once."""
    stat = dict(line.split() for line in (account.parent / "memory.stat").read_text().splitlines())
    return int(account.read_text()) - int(stat.get("total_inactive_file", stat["inactive_file"]))
