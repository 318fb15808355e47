"""What is made of Ray's text about workers that it killed for memory: one of Ray 2.60's own."""

from __future__ import annotations

from pipeline.launch.out_of_memory import explain

FIRST = """\
2 worker(s) were killed due to the node running low on memory. Memory on the node (IP: 192.0.2.2, \
ID: 0526d5244c9ad053898cd32e7ff253eb673d089bdb14e1701e1081fe) was 5.95GB used / 23.54GB limit \
(0.252561)
OOM kill reason: Memory usage 6383140864B exceeded threshold of 6319128576B (25.0% of \
25276514304B limit)
Object store memory usage: [- objects spillable: 1
- bytes spillable: 3845
]
Ray killed 2 worker(s) based on the killing policy
Considered workers: [
"""
WORKERS = """\
Selected to kill: (Actor(b34215957a8f58878fd9236c01000000): job ID=01000000, lease ID=0600, task \
name=DatasetManager.__init__, required resources={}, pid=6800, actual memory used=0.11GB, \
worker ID=1dd7b357d22f8029db1b5e0b8bcca72b3a1d1c59fe2010703091a8da)
Selected to kill: (Actor(eecb1b591f265c2445bfddab01000000): job ID=01000000, lease ID=0500, task \
name=RayTrainWorker.__init__, required resources={CPU_group_461b: 1}, pid=6720, actual memory \
used=1.43GB, worker ID=9749328cb33dd1a9ba31f7e865ecb9f3c00e69ae72f16d5ae0bbb241)
(Actor(b258b178a0ff726713d8616c01000000): job ID=01000000, lease ID=0400, task \
name=RayTrainWorker.__init__, required resources={CPU_group_461b: 1}, pid=6730, actual memory \
used=1.80GB, worker ID=99a79e34376343a740555139b784fcabc7697db57340f5b658cc5629)
"""
OUT = "node 192.0.2.2 ran out of memory (6.0 of 23.5 GiB used, and Ray kills from 5.9 on)"


def test_it_says_who_was_killed_with_how_much_and_what_would_fit() -> None:
    assert explain(FIRST + WORKERS + "]\n") == (
        f"{OUT}. Ray killed a worker with 1.4 GiB. There is room for 1 of 2 workers with 1.8 GiB "
        "each: `workers.gib_per_worker` starts fewer on a node, a smaller "
        "`training.microbatch_size` takes less"
    )


def test_without_a_worker_that_was_killed_it_says_what_is_known() -> None:
    assert explain(FIRST + "]\n") == OUT
    assert explain(FIRST + WORKERS.replace("1.43GB", "0.00GB")) == OUT


def test_workers_of_another_job_are_not_counted() -> None:
    others = WORKERS.replace("ID=01000000, lease ID=0400", "ID=02000000, lease ID=0400")
    assert "room for 0 of 1 workers with 1.4 GiB" in explain(FIRST + others)


def test_another_death_is_none_of_memory() -> None:
    assert explain("The actor died because its worker process has died.") == ""
