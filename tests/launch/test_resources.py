"""What workers need and nodes have: refused, waited for, and told."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from pipeline.errors import RunError, UsageError
from pipeline.launch import resources
from pipeline.launch.resources import GIB, Node, refuse_too_small, room, shortage, wait_for_room
from pipeline.spec import load
from pipeline.spec.sections import Workers
from tests.conftest import MINIMAL


def workers(**settings: Any) -> Workers:
    return load(MINIMAL | {"workers": settings}).workers


def node(
    name: str, total: Mapping[str, float], free: Mapping[str, float] | None = None, **labels: str
) -> Node:
    return Node(name, total, total if free is None else free, labels)


@pytest.mark.parametrize(
    ("settings", "totals", "message"),
    [
        (
            {"num": 1, "cpus_per_worker": 3},
            [{"CPU": 2.0}, {"CPU": 2.0}],
            "1 x 3 CPUs; the cluster has room for 0: 2 CPUs on n0; 2 CPUs on n1",
        ),
        (
            {"num": 3, "cpus_per_worker": 2},
            [{"CPU": 3.0}, {"CPU": 2.0}],
            "3 x 2 CPUs; the cluster has room for 2: 3 CPUs on n0; 2 CPUs on n1",
        ),
        ({"num": 3}, [{"CPU": 2.0}], "3 x 1 CPU; the cluster has room for 2: 2 CPUs on n0"),
        (
            {"num": 2, "gpu": True, "accelerator": "A100"},
            [{"CPU": 8.0, "GPU": 1.0, "accelerator_type:A100": 1.0}, {"CPU": 8.0, "GPU": 8.0}],
            "2 x 1 CPU, 1 GPU, A100; the cluster has room for 1: 8 CPUs, 1 GPU, A100 on n0; "
            "8 CPUs, 8 GPUs, no A100 on n1",
        ),
        (
            {"num": 1, "gib_per_worker": 4, "resources": {"licence": 1}},
            [{"CPU": 8.0, "memory": 8.0 * GIB}] * 5 + [{"CPU": 8.0, "licence": 3}],
            "1 x 1 CPU, 1 licence, 4 GiB; the cluster has room for 0: 8 CPUs, 0 licence, 8 GiB "
            "on each of 5 nodes; 8 CPUs, 3 licence, 0 GiB on each of 1 nodes",
        ),
        ({"num": 1}, [], "1 x 1 CPU; the cluster has room for 0: no node"),
    ],
)
def test_workers_are_placed_on_single_nodes(
    settings: dict[str, Any], totals: list[dict[str, float]], message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("RAY_CLUSTER_NAME", "digits")  # as in every pod of KubeRay
    asked = workers(**settings)
    nodes = [node(f"n{index}", total) for index, total in enumerate(totals)]
    with pytest.raises(UsageError) as caught:
        refuse_too_small(asked, nodes)
    assert str(caught.value) == f"workers: {message}"
    monkeypatch.setenv("RAY_enable_autoscaler_v2", "1")
    refuse_too_small(asked, nodes)


@pytest.mark.parametrize(
    ("asked", "fits"),
    [("a", 1), ("!a", 2), ("in(a, b)", 2), ("!in(a, b)", 1), ("c", 0)],
)
def test_a_label_chooses_nodes(asked: str, fits: int) -> None:
    one = {"CPU": 1.0}
    nodes = [node("1", one, zone="a"), node("2", one, zone="b"), node("3", one)]
    assert room(workers(num=1, labels={"zone": asked}), nodes) == fits
    text = shortage(workers(num=1, labels={"zone": asked}), nodes)
    assert f"1 CPU on nodes with zone: {asked}; the cluster has room for {fits}" in text


@pytest.mark.parametrize(
    ("placement", "fits"), [("pack", 5), ("spread", 5), ("strict_pack", 3), ("strict_spread", 2)]
)
def test_a_strict_placement_holds_fewer(placement: str, fits: int) -> None:
    nodes = [node("1", {"CPU": 3.0}), node("2", {"CPU": 2.0}), node("3", {"CPU": 0.5})]
    asked = workers(num=4, placement=placement)
    assert room(asked, nodes) == fits
    if placement == "strict_spread":
        with pytest.raises(UsageError, match=r"4 x 1 CPU, strict_spread; .* room for 2"):
            refuse_too_small(asked, nodes)


@pytest.mark.parametrize(
    ("each", "total", "fits"), [(0.07, 7.0, 100), (0.34, 17.0, 50), (0.2, 3 - 2.4, 3), (0.3, 1, 3)]
)
def test_fractions_are_counted_as_ray_does(each: float, total: float, fits: int) -> None:
    assert room(workers(num=1, cpus_per_worker=each), [node("n", {"CPU": total})]) == fits


def test_what_others_hold_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resources, "LOOK_SECONDS", 0.0)
    asked = workers(num=2, cpus_per_worker=2)
    free = iter([1.0, 3.0, 4.0])
    told: list[str] = []
    wait_for_room(asked, lambda: [node("n", {"CPU": 4.0}, {"CPU": next(free)})], told.append)
    assert told == [
        "waiting for 2 x 2 CPUs; there is room for 0 now: 1 CPU on n",
        "waiting for 2 x 2 CPUs; there is room for 1 now: 3 CPUs on n",
    ]
    assert next(free, None) is None


def test_waiting_ends_when_the_job_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resources, "LOOK_SECONDS", 0.01)
    asked = workers(num=2, wait="0.05s")
    with pytest.raises(RunError, match=r"waited 0.05s for 2 x 1 CPU; there is room for 1 now"):
        wait_for_room(asked, lambda: [node("n", {"CPU": 4.0}, {"CPU": 1.0})], lambda _: None)
