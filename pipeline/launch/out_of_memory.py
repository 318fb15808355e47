"""What Ray says of workers that it killed because a node ran out of memory, in a few words."""

from __future__ import annotations

import re

NODE = re.compile(r"\(IP: (\S+), ID: .*? was ([\d.]+)GB used / ([\d.]+)GB limit")
THRESHOLD = re.compile(r"exceeded threshold of (\d+)B")
PROCESS = re.compile(
    r"^(Selected to kill: )?\(.*task name=(\w+).*actual memory used=([\d.]+)GB", re.M
)
WORKER = "RayTrainWorker"
GIB = 2**30


def explain(text: str) -> str:
    """Which node, who was killed and what would fit; nothing if `text` tells of something else."""
    node, threshold = NODE.search(text), THRESHOLD.search(text)
    if node is None or threshold is None:
        return ""
    address, used, total = node[1], float(node[2]), float(node[3])
    limit = int(threshold[1]) / GIB
    processes = [(bool(kill), name, float(size)) for kill, name, size in PROCESS.findall(text)]
    workers = [size for _, name, size in processes if name == WORKER]
    said = (
        f"node {address} ran out of memory ({used:.1f} of {total:.1f} GiB used, and Ray kills from "
        f"{limit:.1f} on)"
    )
    if not workers:
        return f"{said}, most of it by others than this run's workers"
    killed = [f"{size:.1f}" for is_killed, name, size in processes if is_killed and name == WORKER]
    who = f"Ray killed a worker with {' and one with '.join(killed)} GiB. " if killed else ""
    each, room = max(workers), max(limit - used + sum(workers), 0)
    return (
        f"{said}. {who}There is room for {int(room / each)} of {len(workers)} workers with "
        f"{each:.1f} GiB each: `workers.gib_per_worker` starts fewer on a node, a smaller "
        "`training.microbatch_size` takes less"
    )
