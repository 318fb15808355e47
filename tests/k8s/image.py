"""The images, built here by podman as the Dockerfile says."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
BASE = "python:3.11-slim-bookworm"
OWN_BASE = "localhost/pipeline-base:bookworm"
PACKAGES = "podman runc aardvark-dns mmdebstrap"  # of Debian


def unavailable() -> str:
    """Why there can be no images here; empty where there can."""
    if os.geteuid() != 0:
        return "only root runs containers as the kubelet does"
    missing = [one for one in ("podman", "runc", "mmdebstrap") if not shutil.which(one)]
    return f"no {', '.join(missing)}: apt-get install {PACKAGES}" if missing else ""


def build(target: str) -> str:
    """The name of an image of the Dockerfile, made anew as far as its files have changed."""
    name = f"localhost/pipeline-tests-{target}"
    podman("build", "--isolation=chroot", "--network=host", *_pip(), "--quiet",
           f"--build-arg=BASE={_base()}", f"--ignorefile={ROOT}/k8s/Dockerfile.dockerignore",
           f"--file={ROOT}/k8s/Dockerfile", f"--target={target}", f"--tag={name}", str(ROOT),
           )  # fmt: skip
    return name


def podman(*words: str, timeout: float | None = None) -> str:
    """What podman prints; its error is raised."""
    command = ["podman", "--runtime=runc", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
    if done.returncode:
        raise RuntimeError(f"podman {words[0]}: {done.stderr[-2000:]}")
    return done.stdout.strip()


def _base() -> str:
    """Python's own image where it was pulled; else Debian's packages of the same release."""
    for name in (BASE, OWN_BASE):
        if subprocess.run(["podman", "image", "exists", name]).returncode == 0:
            return name
    with tempfile.TemporaryDirectory() as folder:
        packages = "--include=python3,python3-pip,ca-certificates"
        words = ["mmdebstrap", "--quiet", "--variant=minbase", packages, "bookworm"]
        subprocess.run([*words, f"{folder}/base.tar"], check=True)
        podman("import", "--change=ENV PIP_BREAK_SYSTEM_PACKAGES=1", f"{folder}/base.tar", "half")
        Path(folder, "Dockerfile").write_text("FROM half\nRUN ln -s python3 /usr/bin/python\n")
        podman("build", "--isolation=chroot", f"--tag={OWN_BASE}", folder)
    return OWN_BASE


def _pip() -> list[str]:
    """This machine's settings of pip, which the build's needs too: certificates, wheels."""
    listed = [sys.executable, "-m", "pip", "config", "list"]
    lines = subprocess.run(listed, check=True, capture_output=True, text=True).stdout.splitlines()
    settings = {
        key.rpartition(".")[2]: value.strip("'")
        for key, _, value in (x.partition("=") for x in lines)
    }
    kept = {key: settings[key] for key in ("cert", "find-links", "index-url") if key in settings}
    handle, path = tempfile.mkstemp(prefix="pip-", suffix=".conf")
    with os.fdopen(handle, "w") as file:
        file.write("[global]\n" + "".join(f"{key} = {value}\n" for key, value in kept.items()))
    mounts = {path: "/etc/pip.conf"}
    for place in (str(Path(kept.get("cert", "/")).parent), kept.get("find-links", "/")):
        if place.startswith("/") and place != "/":
            mounts[place] = place
    words = [f"--volume={here}:{there}:ro" for here, there in mounts.items()]
    if "find-links" in kept:  # torch's CPU build is among these
        words.append(f"--build-arg=TORCH_INDEX={kept.get('index-url', 'https://pypi.org/simple')}")
    return words
