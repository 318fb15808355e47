"""A job's first numbers in several new processes: what is another one there, and of whom.

Workers, and the process after a crash, are other processes than the one before. What follows from
the order of a `set`, from addresses in memory or from the environment is the same in one process,
however often it is asked.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline import plugins

if TYPE_CHECKING:
    from torch import Tensor

PROCESSES = 3
"""So many orders of a `set` that three numbers are hardly summed in one order by all."""
CAUSE = (
    "in another process, as each worker is one: it follows the order of a set, an address in "
    "memory, or random numbers from elsewhere than torch"
)


def suspects(config: dict[str, Any]) -> list[str]:
    """Components whose numbers differ between new processes; `config` is what workers are told."""
    given = json.dumps({key: config[key] for key in ("spec", "base", "folder", "imports")})
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "pipeline.launch.apart"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
            env={**os.environ, "PYTHONHASHSEED": str(number + 1)},
        )
        for number in range(PROCESSES)
    ]  # fmt: skip
    try:
        printed = [process.communicate(given)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    if any(process.returncode for process in started):
        return []  # the legs say why it cannot run in another process
    first, *others = [json.loads(text.splitlines()[-1]) for text in printed]
    for kind, hashes in first.items():  # the first that differs is the cause of those after it
        for name, digest in hashes.items():
            given, _, made = digest.rpartition(" ")
            told = [other[kind].get(name, "").rpartition(" ") for other in others]
            if any(t[0] == given and t[2] != made for t in told):
                return [f"{name}: {kind} {CAUSE}"]
    return []


def numbers(config: dict[str, Any]) -> dict[str, dict[str, str]]:
    """SHA-256 by kind and component, in the order in which they follow from each other."""
    import torch

    from pipeline import registry
    from pipeline.spec import JobSpec
    from pipeline.suspects.calls import passed, total
    from pipeline.train.job import objective, prepared, trial_batch

    folder = Path(config["folder"])
    plugins.receive(config["imports"], folder / "imports")
    spec = JobSpec.model_validate(config["spec"])
    torch.set_num_threads(spec.workers.threads)
    job = prepared(spec, Path(config["base"]))
    batch = trial_batch(job)
    bound = objective(spec, job.fields, batch)
    own = list(bound.named_parameters()) + list(bound.named_buffers())
    found = {"starts otherwise": {name.removeprefix("model."): _sha256([t]) for name, t in own}}
    found["gives other numbers for the same rows"] = {
        call.title: f"{_sha256(call.given)} {_sha256(made)}"
        for call, made in passed(bound, batch).values()
    }
    torch.manual_seed(0)
    predictions = bound.predict(batch)
    found["gives other losses for the same rows"] = {
        f"loss {term.label}": _sha256([bound.items_of(number, predictions, batch)])
        for number, term in enumerate(bound.terms)
    }
    torch.manual_seed(0)
    total(bound, batch).backward()  # type: ignore[no-untyped-call]
    found["has another gradient"] = {
        name.removeprefix("model."): _sha256([p.grad])
        for name, p in bound.named_parameters()
        if p.grad is not None
    }
    build = registry.optimizers[spec.optimizer.name].build
    optimizer = build([p for p in bound.parameters() if p.requires_grad], **spec.optimizer.options)
    for _ in range(3):
        torch.manual_seed(0)
        optimizer.step()
    moved = _sha256(list(bound.parameters()))
    found["moves the weights otherwise"] = {f"optimizer {spec.optimizer.name}": moved}
    return found


def _sha256(tensors: list[Tensor]) -> str:
    from pipeline.train.weights import weights_sha256

    return weights_sha256({str(place): tensor for place, tensor in enumerate(tensors)})


if __name__ == "__main__":
    print(json.dumps(numbers(json.loads(sys.stdin.read()))))
