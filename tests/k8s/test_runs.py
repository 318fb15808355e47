"""Runs as they are rendered from job specs: what the operator makes of them, what they start."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.errors import SpecError, UsageError
from pipeline.kubernetes.manifests import manifests
from pipeline.kubernetes.platform import Platform, parse, read
from pipeline.kubernetes.render import checked, prepare, to_yaml
from pipeline.kubernetes.rules import Document
from pipeline.kubernetes.run import Run
from pipeline.spec import parse_override
from tests.approved import approve

from . import schemas
from .checks import run_checks
from .conftest import ROOT, RUNS
from .documents import documents, environment, expanded, of_kind, render

JOBS = sorted((ROOT / "jobs").glob("*.yaml"))


def platform(**settings: str) -> Platform:
    return parse({"image": "pipeline:0.1.0", **settings}, "pipeline", "platform")


def run_of(job: Path | str, *overrides: str, on: Platform | None = None, **options: Any) -> Run:
    values = dict(parse_override(text) for text in overrides)
    path = job if isinstance(job, Path) else ROOT / f"jobs/{job}.yaml"
    imports = options.pop("imports", [])
    return prepare(str(path), overrides, values, imports, on or platform(), **options)


def job_of(run: Run) -> Document:
    (job,) = of_kind(manifests(run), "RayJob")
    return job


@pytest.mark.parametrize("name", RUNS)
def test_a_run_passes_every_check(
    name: str,
    runs: dict[str, tuple[list[Document], list[Document]]],
    crds: schemas.Crds,
    tmp_path: Path,
) -> None:
    run, beside = runs[name]
    for check, faults in run_checks(run, beside, tmp_path, crds).items():
        assert faults() == [], check


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.stem)
def test_every_job_of_the_project_is_rendered_and_read_back(path: Path) -> None:
    imports = [str(path.with_suffix(".py"))] if path.with_suffix(".py").exists() else []
    run = run_of(path, imports=imports)
    assert documents(to_yaml(checked(run))) == manifests(run)


def test_the_name_follows_from_what_is_trained_and_not_from_where() -> None:
    first = run_of("digits")
    assert run_of("digits", "workers.num=4", on=platform(image="other:1")).name == first.name
    assert run_of("digits", "training.epochs=3").name != first.name
    assert first.name.startswith("digits-")


@pytest.mark.parametrize("name", ["UPPER", "9-lives", "words and more", "x" * 80, "7", "a.b_c"])
def test_any_name_of_a_job_becomes_one_that_the_operator_takes(name: str, tmp_path: Path) -> None:
    tree = yaml.safe_load((ROOT / "jobs/diabetes.yaml").read_text()) | {"name": name}
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(tree))
    assert checked(run_of(tmp_path / "job.yaml"))


def test_files_travel_as_they_stand_here(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "jobs", tmp_path / "jobs")
    (tmp_path / "jobs/rows.bin.csv").write_bytes(b"x,y\n1,2\n\xff,3\n")
    job = tmp_path / "jobs/mine.yaml"
    tree = {"name": "t", "model": "linear", "loss": "mse"}
    job.write_text(json.dumps(tree | {"data": {"target": "y", "train": "rows.bin.csv"}}))
    (held,) = of_kind(manifests(run_of(job)), "ConfigMap")
    assert held["data"]["0-mine.yaml"] == job.read_text()
    assert set(held["binaryData"]) == {"1-rows.bin.csv"}


@pytest.mark.parametrize("rows", ["x,y\n1,a\x85b\n", "x,y\n1,\u2028\n", "x\r\ny\r\n", "a: b\n\n\n"])
def test_no_character_is_lost_on_the_way(rows: str, tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_bytes(rows.encode())
    job = tmp_path / "job.yaml"
    tree = {"name": "t", "model": "linear", "loss": "mse"}
    job.write_text(json.dumps(tree | {"data": {"target": "y", "train": "rows.csv"}}))
    run = run_of(job)
    assert documents(to_yaml(checked(run))) == manifests(run)
    (held,) = of_kind(documents(to_yaml(checked(run))), "ConfigMap")
    assert held["data"]["1-rows.csv"] == rows


@pytest.mark.processes
def test_kubectl_reads_what_is_printed(kubectl: str, tmp_path: Path) -> None:
    """Its YAML is another than Python's: a name that it takes for a number is refused."""
    run = run_of("digits", "name='1e-3'", "workers.labels={zone: '1e3'}")
    (tmp_path / "run.yaml").write_text(to_yaml(checked(run)))
    (tmp_path / "kustomization.yaml").write_text("resources: [run.yaml]\n")
    held, job = render(kubectl, tmp_path)
    assert held["metadata"]["annotations"]["pipeline/job"] == "1e-3"
    (group,) = job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    assert group["labels"] == {"zone": "1e3"}


@pytest.mark.parametrize("name", ["two workers", "on spot nodes", "elastic with GPUs"])
def test_a_rayjob_is_the_one_that_was_approved(
    name: str, runs: dict[str, tuple[list[Document], list[Document]]]
) -> None:
    """So that a change of what pods get is seen by whoever reads the change."""
    run, _ = runs[name]
    path = Path(__file__).parent / "approved" / f"{name.replace(' ', '-')}.yaml"
    (job,) = of_kind(run, "RayJob")
    approve(path, to_yaml([job]).replace(job["metadata"]["name"], "digits-NAME"))


def test_a_long_name_does_not_hide_what_tells_two_jobs_apart() -> None:
    names = {run_of("digits", f"name={'n' * 45}-{day}").name for day in (1, 2)}
    assert len(names) == 2


def test_fresh_is_refused_where_a_queue_may_suspend_it() -> None:
    with pytest.raises(UsageError, match="would start anew each time"):
        run_of("digits", fresh=True, on=platform(queue="q"))
    with pytest.raises(UsageError, match="300 s or more"):
        run_of("digits", timeout="10s")


def test_more_files_than_a_config_map_holds_are_refused_with_the_ways_out(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("x,y\n" + "1,2\n" * 300_000)
    tree = {"name": "t", "model": "linear", "loss": "mse"}
    job = tmp_path / "job.yaml"
    job.write_text(json.dumps(tree | {"data": {"target": "y", "train": "rows.csv"}}))
    with pytest.raises(UsageError, match=r"1\.1 MiB of local files.*/data.*object store"):
        manifests(run_of(job))


@pytest.mark.processes
@pytest.mark.parametrize(
    "value", ["a$b", "a$$b", "$(HOME)", "a`b`", 'a"b', "a\\b", "a'b", "a & b; c", "$(ls)\nx"]
)
def test_no_shell_on_the_way_to_the_head_changes_a_word(value: str) -> None:
    """The kubelet reads the command, then a shell of the submitter; `ray job submit` quotes it for
    one of the head."""
    run = run_of("digits")
    named = replace(run, overrides=(f"tracking.experiment={value}",))
    prints = [sys.executable, "-c", "import sys, json; print(json.dumps(sys.argv[1:]))"]
    entrypoint = expanded(job_of(named)["spec"]["entrypoint"], {"HOME": "/root"})
    text = f"{shlex.join(prints)} {entrypoint}"
    words = json.loads(subprocess.run(["bash", "-ce", text], stdout=subprocess.PIPE).stdout)
    text = shlex.join([*prints, *words])
    words = json.loads(subprocess.run(["sh", "-c", text], stdout=subprocess.PIPE).stdout)
    assert words == shlex.split(named.command)
    assert f"tracking.experiment={value}" in words


def test_deadlines_follow_from_the_spec() -> None:
    spec = job_of(run_of("digits"))["spec"]
    assert (spec["activeDeadlineSeconds"], spec["preRunningDeadlineSeconds"]) == (86400, 900)
    spec = job_of(run_of("digits", "training.time_limit=2h", "workers.wait=10m"))["spec"]
    assert (spec["activeDeadlineSeconds"], spec["preRunningDeadlineSeconds"]) == (11400, 600)
    spec = job_of(run_of("digits", fresh=True))["spec"]
    assert spec["backoffLimit"] == 0  # with --fresh in its command it would start anew
    spec = job_of(run_of("digits", timeout="30m", retries=0))["spec"]
    assert (spec["activeDeadlineSeconds"], spec["backoffLimit"]) == (1800, 0)


@pytest.mark.parametrize(
    ("overrides", "pods", "per_pod"),
    [
        (["workers.num=16"], 2, 8),
        (["workers.num=9"], 3, 3),
        (["workers.num=7"], 1, 7),
        (["workers.num=11"], 11, 1),
        (["workers.num=16", "workers.placement=spread"], 16, 1),
        (["workers.num=4", "workers.placement=strict_pack"], 1, 4),
    ],
)
def test_workers_share_a_pod_as_far_as_a_node_has_gpus(
    overrides: list[str], pods: int, per_pod: int
) -> None:
    job = job_of(run_of("digits", "workers.gpu=true", *overrides, on=platform(gpu_image="g:1")))
    (group,) = job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    (container,) = group["template"]["spec"]["containers"]
    assert group["replicas"] == pods
    assert container["image"] == "g:1"
    assert container["resources"]["limits"]["nvidia.com/gpu"] == str(per_pod)
    assert group["rayStartParams"]["num-gpus"] == str(per_pod)


@pytest.mark.parametrize(
    ("overrides", "settings", "words"),
    [
        (["workers.gpu=true"], {}, "the platform has no GPUs"),
        (["workers.cpus_per_worker=0.5"], {}, "a pod has whole CPUs"),
        (["workers.min=1", "workers.max=2"], {}, "lets no run grow"),
        (["workers.min=1", "workers.max=2"], {"autoscaler": "true", "queue": "q"}, "fixed size"),
        (["workers.accelerator=A100"], {}, "A100 is not among the platform's `gpu_types`: none"),
        (["workers.labels={ray.io/market-type: spot}"], {}, "the platform has no spot nodes"),
        (["workers.labels={ray.io/market-type: cheap}"], {}, "expected one of spot"),
        (["workers.labels={zone: 'in(a,b)'}"], {}, r"workers\.labels\.zone.*expected a label"),
        (["workers.labels={'not a label!': a}"], {}, r"workers\.labels\.not a label!"),
        (["storage=s3://b/runs"], {}, "lets no run reach an object store"),
        (["workers.labels={app.kubernetes.io/component: mlflow}"], {}, "a meaning of its own"),
        (["workers.resources={licence: 1}"], {}, "nothing would be limited"),
        (
            ["workers.gpu=true", "workers.num=8"],
            {"gpu_image": "g:1", "worker_memory": "512Mi"},
            "of which Ray takes 1 GiB",
        ),
        (
            ["workers.gpu=true", "workers.num=9", "workers.placement=strict_pack"],
            {"gpu_image": "g:1"},
            "strict_pack wants 9 GPUs",
        ),
    ],
)
def test_what_the_platform_does_not_have_is_said(
    overrides: list[str], settings: dict[str, str], words: str
) -> None:
    with pytest.raises(UsageError, match=words):
        manifests(run_of("digits", *overrides, on=platform(**settings)))


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({}, "image: Field required"),
        ({"image": "a:1", "imagge": "b"}, "imagge: unknown.*'image'"),
        ({"image": "a:1", "worker_memory": "128Mi"}, "Ray alone takes"),
        ({"image": "a:1", "head_memory": "3 GB"}, "'3 GB' is not a quantity"),
        ({"image": "a:1", "grace_seconds": "10"}, "greater than or equal to 60"),
        ({"image": "a:1", "gpu_taints": "nvidia.com/gpu"}, "expected a taint"),
        ({"image": "a:1", "gpu_types": "A100"}, "expected KEY=VALUE"),
        ({"image": ""}, "at least 1 character"),
        ({"image": "a:1", "image_pull_policy": "Nevr"}, "'Always', 'IfNotPresent' or 'Never'"),
        ({"image": "a:1", "spot_taints": "a=b:NoSchedul"}, "expected a taint"),
        ({"image": "a:1", "runs_claim": ""}, "/runs with a `runs_claim`"),
        ({"image": "a:1", "storage": "/tmp"}, "/runs with a `runs_claim`"),
    ],
)
def test_wrong_settings_are_said_by_name(data: dict[str, str], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        parse(data, "", "platform")


def test_settings_are_text_in_the_one_namespace_with_what_components_add(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="grace_seconds: a ConfigMap holds text"):
        parse({"image": "a:1", "grace_seconds": 120}, "", "platform")  # type: ignore[dict-item]
    with pytest.raises(UsageError, match="is team-a, and has to be pipeline"):
        parse({"image": "a:1"}, "team-a", "platform")
    with pytest.raises(UsageError, match="name its folder"):
        read(str(ROOT / "k8s/overlays/production/platform.yaml"))


def test_labels_choose_nodes_of_kubernetes() -> None:
    run = run_of("digits", "workers.labels={zone: a, arch: '!arm64'}")
    (group,) = job_of(run)["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    assert group["labels"] == {"zone": "a"}  # of Ray's nodes
    affinity = group["template"]["spec"]["affinity"]["nodeAffinity"]
    (term,) = affinity["requiredDuringSchedulingIgnoredDuringExecution"]["nodeSelectorTerms"]
    assert term["matchExpressions"] == [
        {"key": "zone", "operator": "In", "values": ["a"]},
        {"key": "arch", "operator": "NotIn", "values": ["arm64"]},
    ]


@pytest.mark.parametrize(
    ("override", "storage", "note"),
    [
        ("storage=/runs/team", "/runs/team", ""),
        ("storage=/mnt/ours", "/runs", "storage: /runs in place of /mnt/ours"),
        ("data.train=/data/x.csv", "/runs", r"data.train: /data/x.csv is on no volume"),
        ("checkpoint.copy_to=/safe", "/runs", "checkpoint.copy_to: /safe is on no volume"),
    ],
)
def test_what_of_the_spec_does_not_hold_there_is_noted(
    override: str, storage: str, note: str
) -> None:
    run = run_of("digits", override)
    assert run.storage == storage
    assert [one.partition(" of the pods")[0] for one in run.notes] == [note] * bool(note)


def test_a_fault_of_the_spec_is_said_as_everywhere() -> None:
    with pytest.raises(SpecError, match="epochz"):
        run_of("digits", "training.epochz=3")


def test_the_hook_and_the_limits_leave_time_to_save() -> None:
    job = job_of(run_of("digits", on=platform(grace_seconds="300")))
    for group in (
        job["spec"]["rayClusterSpec"]["headGroupSpec"],
        *job["spec"]["rayClusterSpec"]["workerGroupSpecs"],
    ):
        pod = group["template"]["spec"]
        assert pod["terminationGracePeriodSeconds"] == 300
        assert environment(pod["containers"][0])["RAY_JOB_STOP_WAIT_TIME_S"] == "270"


@pytest.mark.processes
def test_the_command_prints_what_kubectl_takes() -> None:
    overlay = ROOT / "k8s/overlays/local"
    words = ["k8s", "render", str(ROOT / "jobs/digits.yaml"), "--platform", str(overlay)]
    done = subprocess.run(
        [sys.executable, "-m", "pipeline", *words, "--set", "workers.num=2"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    kinds = [each["kind"] for each in documents(done.stdout)]
    assert kinds == ["ConfigMap", "RayJob"]
    assert done.stderr == ""
