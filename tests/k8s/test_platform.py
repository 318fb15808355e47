"""The platform's manifests, of every overlay and of components together, without a cluster."""

from __future__ import annotations

import json
import re
import shutil
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from pydantic_core import PydanticUndefined

from pipeline.kubernetes.manifests import RAY_VERSION
from pipeline.kubernetes.platform import Platform, read
from pipeline.kubernetes.pods import USER
from pipeline.kubernetes.rules import Document, containers
from pipeline.launch.gauges import NAMES

from . import references
from .checks import platform_checks
from .conftest import COMPONENTS, K8S, OVERLAYS, ROOT, combinations, compose
from .documents import DuplicateKeyError, RenderError, documents, one, pods, render

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LOCKS = sorted((K8S / "requirements").glob("*.txt"))


@pytest.mark.parametrize("overlay", [*OVERLAYS, "elastic"])
def test_an_overlay_passes_every_check(overlay: str, built: dict[str, list[Document]]) -> None:
    for name, check in platform_checks(built[overlay]).items():
        assert check() == [], name


@pytest.mark.parametrize("components", combinations(), ids="-".join)
def test_components_go_together(components: list[str], kubectl: str, tmp_path: Path) -> None:
    found = render(kubectl, compose(tmp_path, components))
    checks = platform_checks(found)
    del checks["core schema"]  # of each object by itself, which the overlays show
    for name, check in checks.items():
        assert check() == [], name
    assert read(str(tmp_path / "k8s/overlays/composed")).namespace == "pipeline"


def test_overlays_use_every_component_but_two() -> None:
    used = set()
    for name in OVERLAYS:
        text = (K8S / "overlays" / name / "kustomization.yaml").read_text()
        used |= {Path(path).name for path in yaml.safe_load(text)["components"]}
    assert used == {*COMPONENTS} - {"elastic", "cron"}


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_settings_of_an_overlay_are_read(overlay: str) -> None:
    assert read(str(K8S / "overlays" / overlay)).image


def test_rendering_twice_gives_the_same(kubectl: str, built: dict[str, list[Document]]) -> None:
    assert render(kubectl, K8S / "overlays/production") == built["production"]


@pytest.mark.parametrize("path", sorted(K8S.rglob("*.yaml")), ids=str)
def test_no_file_names_a_key_twice(path: Path) -> None:
    assert documents(path.read_text())


def test_a_key_that_a_file_names_twice_is_refused() -> None:
    with pytest.raises(DuplicateKeyError, match="replicas"):
        documents("spec:\n  replicas: 1\n  replicas: 2\n")


def test_a_kustomization_that_names_a_missing_file_is_refused(kubectl: str, tmp_path: Path) -> None:
    shutil.copytree(K8S / "base", tmp_path / "base")
    (tmp_path / "base" / "storage.yaml").unlink()
    with pytest.raises(RenderError, match=r"storage\.yaml"):
        render(kubectl, tmp_path / "base")


def test_a_setting_that_is_missing_is_refused(kubectl: str, tmp_path: Path) -> None:
    overlay = compose(tmp_path, ["database"])
    path = overlay / "platform.yaml"
    path.write_text(path.read_text().replace("manifest_database_cidr", "manifest_database"))
    with pytest.raises(RenderError, match="manifest_database_cidr"):
        render(kubectl, overlay)


def test_images_are_those_of_the_settings(built: dict[str, list[Document]]) -> None:
    for overlay in OVERLAYS:
        wanted = one(built[overlay], "ConfigMap", "platform")["data"]["manifest_mlflow_image"]
        images = {c["image"] for _, pod in pods(built[overlay]) for c in containers(pod)}
        assert images - {"postgres:17"} == {wanted}


def test_the_images_have_the_user_that_the_pods_run_as(built: dict[str, list[Document]]) -> None:
    lines = (K8S / "Dockerfile").read_text().splitlines()
    users = {line.split()[1] for line in lines if line.startswith("USER ")}
    assert users == {f"{USER}:{USER}"}
    pod = one(built["local"], "Deployment", "mlflow")["spec"]["template"]["spec"]
    assert pod["securityContext"]["runAsUser"] == USER


@pytest.mark.parametrize("path", LOCKS, ids=lambda path: path.stem)
def test_a_lock_has_what_the_project_asks_for_each_with_a_hash(path: Path) -> None:
    entries = path.read_text().replace("\\\n", " ").splitlines()
    lines = [line for line in entries if line.strip() and not line.startswith("#")]
    assert all("--hash=sha256:" in line for line in lines)
    locked = dict(line.split()[0].split("==") for line in lines)
    wanted = [Requirement(text) for text in PROJECT["dependencies"]]
    if path.stem == "mlflow":
        assert {"psycopg", "psycopg-binary", "boto3", "flask-wtf"} <= locked.keys()
        assert "torch" not in locked
        wanted = [each for each in wanted if each.name == "mlflow"]
    else:
        assert locked["ray"] == RAY_VERSION
        assert ("+cpu" in locked["torch"]) is (path.stem == "cpu")
        assert any(name.startswith("nvidia-cu") for name in locked) is (path.stem == "gpu")
    for each in wanted:
        assert each.specifier.contains(locked[each.name], prereleases=True), each


def test_alerts_and_dashboard_ask_for_gauges_that_runs_have() -> None:
    folder = K8S / "components/monitoring"
    asked = set()
    for name in ("alerts.yaml", "runs.json"):
        asked |= set(re.findall(r"ray_(pipeline_\w+)", (folder / name).read_text()))
    assert asked == set(NAMES)
    panels = json.loads((folder / "runs.json").read_text())["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)


def test_the_page_lists_every_setting() -> None:
    """What it should hold is in the message of a failure."""
    text = (K8S / "platform.md").read_text()
    for name, field in Platform.model_fields.items():
        default = "" if field.default in ("", PydanticUndefined, [], {}) else f"`{field.default}`"
        default = "`nvidia.com/gpu:NoSchedule`" if name == "gpu_taints" else default
        default = "`false`" if field.default is False else default
        meaning = " ".join(str(field.description).split())
        if name != "namespace":
            assert f"| `{name}` | {default} | {meaning} |\n" in text
    used = [path.read_text() for path in K8S.rglob("*.yaml")]
    for name in sorted(set(re.findall(r"data\.(manifest_\w+)", "".join(used)))):
        assert f"| `{name}` |" in text


def test_the_readme_makes_every_secret_that_pods_need() -> None:
    text = (K8S / "README.md").read_text()
    for name in references.ADMIN_SECRETS:
        assert f" {name} " in text, name
