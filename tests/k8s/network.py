"""Who may connect to whom, by an evaluation of network policies."""

from __future__ import annotations

import ipaddress

from pipeline.kubernetes.rules import Document

from .documents import pods


def may_connect(
    found: list[Document],
    source: Document | str,
    target: Document | str,
    port: int,
    protocol: str = "TCP",
) -> bool:
    """Whether the NetworkPolicies of `found` let `source` open a connection to `target`:`port`.

    An end is an address outside the cluster, or {"namespace": name, "labels": {...}}; "here" is
    the namespace of the policies.
    """
    policies = [each["spec"] for each in found if each.get("kind") == "NetworkPolicy"]

    def allowed(own: Document | str, peer: Document | str, direction: str, peers: str) -> bool:
        if isinstance(own, str) or own["namespace"] != "here":
            return True  # these policies do not govern it
        governing = [
            each
            for each in policies
            if direction in each.get("policyTypes", [])
            and _selects(each["podSelector"], own["labels"])
        ]
        rules = [rule for each in governing for rule in each.get(direction.lower(), [])]
        return not governing or any(
            _opens(rule, port, protocol)
            and (peers not in rule or any(_matches(each, peer) for each in rule[peers]))
            for rule in rules
        )

    return allowed(source, target, "Egress", "to") and allowed(target, source, "Ingress", "from")


def _selects(selector: Document, labels: Document) -> bool:
    if set(selector) - {"matchLabels"}:
        raise NotImplementedError(f"a selector with {sorted(selector)}")
    return bool(selector.get("matchLabels", {}).items() <= labels.items())


def _opens(rule: Document, port: int, protocol: str) -> bool:
    ports = rule.get("ports")
    return not ports or any(
        each.get("port", port) == port and each.get("protocol", "TCP") == protocol for each in ports
    )


def _matches(peer: Document, end: Document | str) -> bool:
    if "ipBlock" in peer:
        if not isinstance(end, str):
            return False  # some network plugins never match a pod by its address
        address = ipaddress.ip_address(end)
        inside = address in ipaddress.ip_network(peer["ipBlock"]["cidr"])
        outs = peer["ipBlock"].get("except", [])
        return inside and not any(address in ipaddress.ip_network(out) for out in outs)
    if isinstance(end, str):
        return False
    if "namespaceSelector" in peer:
        name = {"kubernetes.io/metadata.name": end["namespace"]}
        if not _selects(peer["namespaceSelector"], name):
            return False
    elif end["namespace"] != "here":
        return False
    return _selects(peer.get("podSelector", {}), end["labels"])


# Who asks, whom, on which port, and whether it may; an end is a pod's part, or an address.
MATRIX = [
    ("ray", "ray", 6379, True),
    ("ray", "ray", 41234, True),
    ("submitter", "ray", 8265, True),
    ("operator", "ray", 8265, True),
    ("ray", "mlflow", 5000, True),
    ("ray", "dns", 53, True),
    ("mlflow", "dns", 53, True),
    ("submitter", "dns", 53, True),
    ("elsewhere", "ray", 8265, False),
    ("elsewhere", "ray", 6379, False),
    ("elsewhere", "mlflow", 5000, False),
    ("stranger", "ray", 8265, False),
    ("stranger", "mlflow", 5000, False),
    ("stranger", "192.0.2.1", 443, False),
    ("elsewhere", "stranger", 80, False),
    ("elsewhere", "submitter", 80, False),
    ("operator", "ray", 10001, False),
    ("submitter", "ray", 10001, False),
    ("submitter", "mlflow", 5000, False),
    ("mlflow", "ray", 8265, False),
    ("ray", "10.20.0.5", 5432, False),
    ("ray", "192.168.7.7", 443, False),
    ("ray", "169.254.169.254", 80, False),
    ("mlflow", "169.254.169.254", 80, False),
    ("mlflow", "203.0.113.9", 5432, False),
]
OF_SCHEDULER = [
    ("scheduler", "10.30.0.1", 443, True),
    ("scheduler", "dns", 53, True),
    ("scheduler", "198.51.100.7", 443, False),
    ("scheduler", "ray", 8265, False),
    ("scheduler", "mlflow", 5000, False),
    ("ray", "scheduler", 80, False),
]
ELSEWHERE = {
    "operator": "kuberay-operator",
    "dns": "kube-system",
    "elsewhere": "default",
    "monitoring": "monitoring",
    "ingress": "ingress-nginx",
}


def faults(platform: list[Document], run_pods: list[Document]) -> list[str]:
    """Connections that the policies should allow and do not, or the reverse.

    Labels are those of the rendered pods: of the run's, as the operator makes them, where they
    are given.
    """
    ends = _ends(platform, run_pods)
    rows = list(MATRIX)
    names = {each["metadata"]["name"] for each in platform}
    outside = "mlflow-to-database" in names
    rows += [("mlflow", "10.20.0.5", 5432, outside)]
    stores = {"ray-to-object-store", "mlflow-to-object-store"} & names
    rows += [("mlflow", "198.51.100.7", 443, bool(stores)), ("mlflow", "10.30.0.1", 443, False)]
    rows += [("ray", "10.20.1.9", 443, bool(stores)), ("mlflow", "10.20.1.9", 443, bool(stores))]
    rows += [("ray", "198.51.100.7", 443, bool(stores) or "ray-to-the-internet" in names)]
    rows += [("monitoring", "ray", 8080, "prometheus" in names)]
    rows += [("ingress", "mlflow", 5000, "ingress-to-mlflow" in names)]
    rows += [("monitoring", "mlflow", 5000, False), ("ingress", "ray", 8265, False)]
    rows += [("head", "10.30.0.1", 443, "autoscaler" in names)]
    rows += [("worker", "10.30.0.1", 443, False)]
    rows += OF_SCHEDULER if "scheduler" in ends else []
    if "postgres" in ends:
        rows += [("mlflow", "postgres", 5432, True)]
        rows += [
            (who, "postgres", 5432, False) for who in ("ray", "submitter", "stranger", "elsewhere")
        ]
    found = []
    if not any(_denies_all(one["spec"]) for one in platform if one.get("kind") == "NetworkPolicy"):
        found.append("no policy denies all that no other allows, in both directions")
    for source, target, port, expected in rows:
        protocol = "UDP" if port == 53 else "TCP"
        for one in ends.get(source, [source]):
            for other in ends.get(target, [target]):
                if may_connect(platform, one, other, port, protocol) is not expected:
                    verb = "does not reach" if expected else "reaches"
                    found.append(f"{source} {verb} {target}:{port}")
    return sorted(set(found))


def _denies_all(spec: Document) -> bool:
    is_for_all = spec["podSelector"] == {} and set(spec["policyTypes"]) == {"Ingress", "Egress"}
    return is_for_all and not spec.get("ingress") and not spec.get("egress")


def _ends(platform: list[Document], run_pods: list[Document]) -> dict[str, list[Document]]:
    """Pods by their part, with the labels that they are rendered with."""
    component = "app.kubernetes.io/component"
    ends: dict[str, list[Document]] = {
        name: [{"namespace": space, "labels": {}}] for name, space in ELSEWHERE.items()
    }
    ends["stranger"] = [{"namespace": "here", "labels": {}}]
    for document in platform:
        if document.get("kind") == "Deployment":
            labels = document["spec"]["template"]["metadata"].get("labels", {})
            ends[document["metadata"]["name"]] = [{"namespace": "here", "labels": labels}]
        if document.get("kind") == "CronJob":
            (labels,) = (pod["metadata"].get("labels", {}) for _, pod in pods([document]))
            ends["scheduler"] = [{"namespace": "here", "labels": labels}]
    if run_pods:
        for pod in run_pods:
            labels = pod["metadata"]["labels"]
            part = pod["metadata"]["name"].partition("-")[0]
            ends.setdefault(part, []).append({"namespace": "here", "labels": labels})
        ends["ray"] = [*ends["head"], *ends["worker"]]
    else:  # as the renderer labels them
        for part in ("ray", "submitter"):
            ends[part] = [{"namespace": "here", "labels": {component: part}}]
        for kind in ("head", "worker"):
            labels = {component: "ray", "ray.io/node-type": kind}
            ends[kind] = [{"namespace": "here", "labels": labels}]
    return ends
