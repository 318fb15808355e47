"""A job's first numbers in several new processes: what differs, and which component causes it.

Workers, and the process after a crash, are other processes than the one before. What follows from
the order of a `set`, from addresses in memory or from the environment is the same in one process,
however often it is asked.
"""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline import plugins

if TYPE_CHECKING:
    from torch import Tensor

    from pipeline.train.assignment import Assignment

PROCESSES = 3
"""So many that all are unlikely to sum even a small `set` in the same order."""
CAUSE = (
    "in another process, and each worker is one: it depends on the order of a set, an address in "
    "memory, or random numbers that are not torch's"
)


def suspects(told: Assignment) -> list[str]:
    """Components whose numbers differ between new processes."""
    asked = told.run.path / "diagnose.pickle"
    asked.write_bytes(pickle.dumps(replace(told, job=None)))
    answers = [told.run.path / f"diagnose-{number}.json" for number in range(PROCESSES)]
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "pipeline.verify.diagnose", str(asked), str(answer)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONHASHSEED": str(index + 1)},
        )
        for index, answer in enumerate(answers)
    ]
    try:
        codes = [process.wait() for process in started]
    finally:
        for process in started:
            process.kill()
    if any(codes):
        return []  # what fails in another process fails in the runs of `prove` too, which say why
    first, *others = [json.loads(answer.read_text(encoding="utf-8")) for answer in answers]
    for kind, hashes in first.items():  # the first that differs is the cause of those after it
        for name, (given, made) in hashes.items():
            there = [other[kind][name] for other in others if name in other[kind]]
            if any(pair[0] == given and pair[1] != made for pair in there):
                return [f"{name}: {kind} {CAUSE}"]
    return []


Hashes = dict[str, tuple[str, str]]
"""SHA-256 of what each component was given (empty if nothing) and of what it made of it."""


def numbers(told: Assignment) -> dict[str, Hashes]:
    """Hashes by kind, in the order in which they follow from each other."""
    import torch

    from pipeline.probes.calls import passed, total
    from pipeline.train.build import build_optimizer
    from pipeline.train.job import prepare
    from pipeline.train.weights import load_weights

    plugins.receive(told.modules, told.run.imports)
    spec = told.spec
    torch.set_num_threads(spec.workers.threads)
    initial = load_weights(told.run.initial) if spec.model.init_from else None
    job = prepare(spec, told.base, initial=initial)
    batch = job.trial
    bound = job.objective()

    def alone(named: Iterable[tuple[str, Tensor]]) -> Hashes:
        return {name.removeprefix("model."): ("", _sha256([tensor])) for name, tensor in named}

    found = {
        "starts with different values": alone([*bound.named_parameters(), *bound.named_buffers()])
    }
    found["gives different numbers for the same rows"] = {
        call.title: (_sha256(call.given), _sha256(made))
        for call, made in passed(bound, batch).values()
    }
    torch.manual_seed(0)
    predictions = bound.predict(batch)
    found["gives different losses for the same rows"] = alone(
        (f"loss {term.label}", bound.items_of(index, predictions, batch))
        for index, term in enumerate(bound.terms)
    )
    torch.manual_seed(0)
    total(bound, batch).backward()  # type: ignore[no-untyped-call]
    found["has a different gradient"] = alone(
        (name, p.grad) for name, p in bound.named_parameters() if p.grad is not None
    )
    optimizer = build_optimizer(spec, bound.named_parameters())
    for _ in range(3):
        torch.manual_seed(0)
        optimizer.step()
    moved = "", _sha256(list(bound.parameters()))
    found["moves the weights differently"] = {f"optimizer {spec.optimizer.name}": moved}
    return found


def _sha256(tensors: list[Tensor]) -> str:
    from pipeline.train.weights import weights_sha256

    return weights_sha256({str(place): tensor for place, tensor in enumerate(tensors)})


if __name__ == "__main__":
    asked, answer = map(Path, sys.argv[1:])
    hashes = numbers(pickle.loads(asked.read_bytes()))
    answer.write_text(json.dumps(hashes), encoding="utf-8")
