"""A real S3-compatible server (SeaweedFS, from its Python package) for tests."""

from __future__ import annotations

import json
import subprocess
import sysconfig
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pyarrow.fs as pafs
import pytest

from tests.processes import free_ports

PARTS = ("master", "volume", "filer", "s3")
PORTS = [f"{part}.port{kind}" for part in PARTS for kind in ("", ".grpc")]
PORTS += ["s3.port.iceberg", "s3.port.lance"]
KEY, SECRET = "test-key", "test-secret-8d1f"


@dataclass(frozen=True)
class Server:
    """A running server with one bucket, `rows`."""

    endpoint: str
    secret: str = SECRET

    @property
    def filesystem(self) -> pafs.S3FileSystem:
        """Its content."""
        return pafs.S3FileSystem(
            access_key=KEY, secret_key=self.secret, endpoint_override=self.endpoint, scheme="http",
            allow_bucket_creation=True,
        )  # fmt: skip

    def uri(self, path: str) -> str:
        """What a spec names: `path` starts with the bucket."""
        return f"s3://{KEY}:{self.secret}@{path}?scheme=http&endpoint_override={self.endpoint}"


@contextmanager
def running(folder: Path, secret: str = SECRET, address: str = "127.0.0.1") -> Iterator[Server]:
    """Start the server with its files in `folder`, and stop it."""
    rights = {"accessKey": KEY, "secretKey": secret}
    config = {"identities": [{"name": "t", "credentials": [rights], "actions": ["Admin"]}]}
    (folder / "s3.json").write_text(json.dumps(config))
    for left in reversed(range(3)):  # another process may take one of its ports before it does
        ports = dict(zip(PORTS, free_ports(len(PORTS)), strict=True))
        server = _started(folder, ports, address)
        try:
            found = Server(f"{address}:{ports['s3.port']}", secret)
            if _is_ready(found, server):
                yield found
                return
        finally:
            server.kill()  # asked to end, it takes 25 s to say good-bye to itself
            server.wait()
        if not left:
            pytest.fail("SeaweedFS did not start:\n" + (folder / "log").read_text()[-3000:])


def _started(folder: Path, ports: dict[str, int], address: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [
            Path(sysconfig.get_path("scripts")) / "weed", "-logtostderr=true", "server", "-s3",
            "-dir", folder, f"-ip={address}", f"-ip.bind={address}", "-volume.max=20",
            "-master.volumeSizeLimitMB=64", f"-s3.config={folder / 's3.json'}",
            *[f"-{name}={port}" for name, port in ports.items()],
        ],
        stdout=(folder / "log").open("w"), stderr=subprocess.STDOUT,
    )  # fmt: skip


def _is_ready(found: Server, server: subprocess.Popen[bytes]) -> bool:
    """Whether its bucket could be made before the server ended, or two minutes had passed."""
    until = time.monotonic() + 120
    while server.poll() is None and time.monotonic() < until:
        try:
            found.filesystem.create_dir("rows")
            return True
        except OSError:
            time.sleep(0.5)
    return False
