"""What Ray says of workers that it killed because a node ran out of memory, in a few words."""

from __future__ import annotations

import re

NODE = re.compile(r"\(IP: (\S+), ID: .*? was ([\d.]+)GB used / ([\d.]+)GB limit")
THRESHOLD = re.compile(r"exceeded threshold of (\d+)B")
PROCESS = re.compile(
    r"^(Selected to kill: )?\(.*?job ID=(\w+),.*task name=(\w+).*actual memory used=([\d.]+)GB",
    re.MULTILINE,
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
    summary = (
        f"node {address} ran out of memory ({used:.1f} of {total:.1f} GiB used, and Ray kills from "
        f"{limit:.1f} on)"
    )
    workers = [
        (job, float(size), bool(mark))
        for mark, job, name, size in PROCESS.findall(text)
        if name == WORKER
    ]
    killed = [(job, size) for job, size, is_killed in workers if is_killed]
    if not killed or not killed[0][1]:
        return summary
    ours = [size for job, size, _ in workers if job == killed[0][0]]
    sizes = " and one with ".join(f"{size:.1f}" for job, size in killed if job == killed[0][0])
    room = max(limit - used + sum(ours), 0)
    fitting = min(int(room / max(ours)), len(ours) - 1)
    return (
        f"{summary}. Ray killed a worker with {sizes} GiB. There is room for {fitting} of "
        f"{len(ours)} workers with {max(ours):.1f} GiB each: `workers.gib_per_worker` starts fewer "
        "on a node, a smaller `training.microbatch_size` takes less"
    )
