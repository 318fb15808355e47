"""A pod's container as a process here: namespaces of its own, its volumes, user and environment.

The kernel does what it does for a container; what is missing is the kubelet, the image and cgroups.
"""

from __future__ import annotations

import base64
import contextlib
import os
import secrets
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.kubernetes.pods import USER
from pipeline.kubernetes.rules import Document

from .documents import environment, one

ROOT = Path(__file__).parents[2]


@dataclass
class Machines:
    """A network of this machine's, with an address for each pod; where volumes and names are."""

    folder: Path
    token: str
    names: dict[str, str] = field(default_factory=dict)
    """Addresses by host names."""
    objects: list[Document] = field(default_factory=list)
    bridge: str = field(default_factory=lambda: f"b{secrets.token_hex(3)}")
    subnet: str = field(default_factory=lambda: f"10.78.{secrets.randbelow(250)}")
    num: int = 1

    @property
    def gateway(self) -> str:
        """Address of this machine in it."""
        return f"{self.subnet}.1"

    def volume(self, name: str) -> Path:
        """The folder of a volume that pods share."""
        folder = self.folder / "volumes" / name
        folder.mkdir(parents=True, exist_ok=True)
        os.chown(folder, USER, USER)
        return folder


@contextlib.contextmanager
def machines(folder: Path, objects: list[Document]) -> Iterator[Machines]:
    """A network for pods, taken down afterwards. Needs root."""
    made = Machines(folder, secrets.token_hex(16), objects=objects)
    _ip(f"link add {made.bridge} type bridge", f"addr add {made.gateway}/24 dev {made.bridge}",
        f"link set {made.bridge} up")  # fmt: skip
    try:
        yield made
    finally:
        subprocess.run(["ip", "link", "del", made.bridge], check=False)


@dataclass
class Running:
    """A container that runs."""

    process: subprocess.Popen[bytes]
    log: Path
    namespace: str
    script: Path
    environment: dict[str, str]

    def terminate(self) -> None:
        """SIGTERM to its first process, as the kubelet sends it."""
        os.kill(self._first(), signal.SIGTERM)

    def wait(self, seconds: float) -> int:
        """Its exit code; killed where it takes longer than its grace."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.kill(self._first(), signal.SIGKILL)
            return self.process.wait()

    def execute(self, command: list[str]) -> subprocess.CompletedProcess[bytes]:
        """A command in it, as `exec` of a hook runs it."""
        words = ["nsenter", f"--target={self._first()}", "--all", "--root", "--wd"]
        user = ["setpriv", f"--reuid={USER}", f"--regid={USER}", "--clear-groups"]
        return subprocess.run([*words, *user, *command], env=self.environment, check=True)

    def _first(self) -> int:
        """The process that is the container's first, in our numbers."""
        pid = self.process.pid
        for _ in range(50):
            children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
            inner = Path(f"/proc/{pid}/status").read_text()
            levels = next(line for line in inner.splitlines() if line.startswith("NSpid"))
            if len(levels.split()) > 2:
                return pid
            if children:
                pid = int(children[0])
            else:
                time.sleep(0.1)
        raise AssertionError(f"no process in it: {self.log.read_text()}")


@contextlib.contextmanager
def running(
    pod: Document, at: Machines, name: str = "", extra: Mapping[str, str] | None = None
) -> Iterator[Running]:
    """A pod's first container. `extra` are more host names that lead to it."""
    name = name or pod["metadata"]["name"]
    at.num += 1
    address = f"{at.subnet}.{at.num}"
    at.names |= dict.fromkeys([name, *(extra or {})], address)
    space = f"p{secrets.token_hex(3)}"
    folder = at.folder / space
    folder.mkdir()
    (container, *_) = pod["spec"]["containers"]
    own = environment(container) | {"HOME": "/tmp", "PATH": _path()}
    own["GRPC_DNS_RESOLVER"] = "native"  # there is no name server, but /etc/hosts
    for each in container["env"]:
        if "secretKeyRef" in each.get("valueFrom", {}):
            own[each["name"]] = at.token
    script = folder / "start.sh"
    script.write_text(_script(pod, container, at, folder))
    _ip(f"netns add {space}", f"link add {space}a type veth peer name {space}b",
        f"link set {space}a master {at.bridge} up", f"link set {space}b netns {space}",
        f"-n {space} addr add {address}/24 dev {space}b", f"-n {space} link set lo up",
        f"-n {space} link set {space}b up",
        f"-n {space} route add default via {at.gateway}")  # fmt: skip
    log = folder / "log"
    words = ["ip", "netns", "exec", space, "unshare", "--mount", "--pid", "--fork", "--kill-child",
             "bash", "-e", str(script), *container["command"], *container["args"]]  # fmt: skip
    with log.open("wb") as out:
        process = subprocess.Popen(words, env=own, stdout=out, stderr=out, start_new_session=True)
    try:
        yield Running(process, log, space, script, own)
    finally:
        if process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        subprocess.run(["ip", "netns", "del", space], check=False)


def _path() -> str:
    return f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin:/bin"


def _script(pod: Document, container: Document, at: Machines, folder: Path) -> str:
    """Makes the container's file system, and becomes its command."""
    volumes = {each["name"]: each for each in pod["spec"].get("volumes", [])}
    mounts = {
        each["mountPath"]: (_source(volumes[each["name"]], at, folder), each.get("readOnly"))
        for each in container["volumeMounts"]
    }
    hosts = folder / "hosts"
    hosts.write_text("".join(f"{ip} {host}\n" for host, ip in
                             [("localhost", "127.0.0.1"), *at.names.items()]))  # fmt: skip
    lines = [
        "mount --make-rprivate /",
        f"new={folder}/root; mkdir $new; mount -t tmpfs tmpfs $new",
        "for one in /*; do case $one in /proc|/dev|/tmp|/root|/home) continue;; esac",
        "  if [ -L $one ]; then cp -P $one $new$one; elif [ -d $one ]; then mkdir $new$one",
        "  mount --rbind $one $new$one; mount -o remount,bind,ro $new$one; fi; done",
        "mkdir $new/proc $new/dev; mount -t proc proc $new/proc; mount --rbind /dev $new/dev",
        f"mount --bind {hosts} $new/etc/hosts",
    ]
    for place, (source, is_read_only) in sorted(mounts.items()):
        target = f"$new{place}"
        if source is None:
            lines += [f"mkdir -p {target}", f"mount -t tmpfs -o size=1g,mode=1777 tmpfs {target}"]
        else:
            lines += [f"mkdir -p {target}", f"mount --bind {source} {target}"]
        if is_read_only:
            lines.append(f"mount -o remount,bind,ro {target}")
    for needed in _needed():
        lines += [f"mkdir -p $new{needed}", f"mount --rbind {needed} $new{needed}"]
    if container["securityContext"]["readOnlyRootFilesystem"]:
        lines.append("mount -o remount,ro $new")
    context = pod["spec"]["securityContext"]
    user = [
        "setpriv", f"--reuid={context['runAsUser']}", f"--regid={context['runAsGroup']}",
        "--clear-groups", "--no-new-privs", "--bounding-set=-all",
    ]  # fmt: skip
    within = shlex.quote(f'cd {container.get("workingDir", "/")} && exec "$@"')
    lines.append(f'exec /usr/sbin/chroot $new {shlex.join(user)} bash -c {within} bash "$@"')
    return "\n".join(lines) + "\n"


def _needed() -> list[str]:
    """Folders of this checkout and of its Python that are below what the pod has anew."""
    places = {str(ROOT), sys.prefix, str(Path(sys.executable).resolve().parents[1])}
    return sorted(place for place in places if place.startswith(("/tmp/", "/root/", "/home/")))


def _source(volume: Document, at: Machines, folder: Path) -> Path | None:
    """The folder behind a volume; None for one in memory."""
    if volume.get("emptyDir", {}).get("medium") == "Memory":
        return None
    if "persistentVolumeClaim" in volume:
        return at.volume(str(volume["persistentVolumeClaim"]["claimName"]))
    source = folder / str(volume["name"])
    source.mkdir(exist_ok=True)
    os.chown(source, USER, USER)
    if "configMap" in volume:
        held = one(at.objects, "ConfigMap", volume["configMap"]["name"])
        (source / "..data").symlink_to(f"..{folder.name}")  # as the kubelet does, another in each
        for item in volume["configMap"]["items"]:
            path = source / f"..{folder.name}" / item["path"]
            top = item["path"].partition("/")[0]
            if not (source / top).is_symlink():
                (source / top).symlink_to(f"..data/{top}")
            path.parent.mkdir(parents=True, exist_ok=True)
            if item["key"] in held["data"]:
                path.write_text(held["data"][item["key"]])
            else:
                path.write_bytes(base64.b64decode(held["binaryData"][item["key"]]))
    return source


def _ip(*commands: str) -> None:
    for command in commands:
        subprocess.run(["ip", *command.split()], check=True)
