"""The first steps of a job by plain torch: what our own sums, orders and layouts are held against.

One process, one tensor for each gradient, `backward` for each micro-batch, and the optimizer as its
name builds it, without fused kernels. Nothing of `distributed`, `data.partition` or `train.step` is
used, so that a fault of theirs that is the same on any number of workers shows.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from pipeline.data.batch import Batch
from pipeline.data.partition import split_batch
from pipeline.distributed.seeds import seed_for
from pipeline.losses.objective import Objective
from pipeline.probes.buffers import changing_buffers
from pipeline.rundir.records import StepPoint
from pipeline.train.build import build_optimizer
from pipeline.train.job import Job


def steps(job: Job, num_steps: int) -> tuple[list[StepPoint], Objective]:
    """Points as in the journal, with each term's loss; and model and losses after the last step.

    Micro-batches are those of the spec, with their seeds; a loss of the whole batch gets all rows
    at once.
    """
    spec = job.spec
    settings = job.spec.training
    sampler = job.sampler()
    bound = job.objective()
    changing = changing_buffers(bound, job.trial)
    trained = [p for p in bound.parameters() if p.requires_grad]
    optimizer = build_optimizer(spec, bound.named_parameters())
    for group in optimizer.param_groups:
        group.update({key: False for key in ("fused", "foreach") if key in group})
    rates = [group["lr"] for group in optimizer.param_groups]
    labels = [term.label for term in bound.terms]
    points: list[StepPoint] = []
    with job.train.opened("plain") as dataset:
        for step in range(num_steps):
            factor = job.learning_rate_factor(step)
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * factor
            size = None if bound.is_coupled else settings.microbatch_size
            microbatches = split_batch(sampler.rows(step), size, 1)
            divisors = bound.denominators(dataset.gather(sampler.rows(step)))
            sums = torch.zeros_like(divisors)
            bound.zero_grad(set_to_none=True)  # also what the optimizer does not hold
            with _StepBuffers(bound, changing) as buffers:
                for index, rows in enumerate(microbatches):
                    buffers.restart()
                    torch.manual_seed(seed_for(settings.seed, step, index))
                    sums += _backward(bound, dataset.gather(rows), divisors)
            if settings.clip_norm is not None:
                nn.utils.clip_grad_norm_(trained, settings.clip_norm)
            torch.manual_seed(seed_for(settings.seed, step))
            optimizer.step()
            both = zip(sums.tolist(), divisors.tolist(), strict=True)
            losses = [loss / divisor if divisor else None for loss, divisor in both]
            terms = zip(bound.terms, losses, strict=True)
            total = sum(term.weight * loss for term, loss in terms if loss is not None)
            points.append(
                {
                    "step": step + 1,
                    "epoch": (step + 1) / job.steps_per_epoch,
                    "train": {"loss": total},
                    "terms": dict(zip(labels, losses, strict=True)),
                }
            )
    return points, bound


def _backward(bound: Objective, batch: Batch, divisors: Tensor) -> Tensor:
    """Add the gradient of one micro-batch's part in the mean; returns the sum of each loss."""
    recorded: Tensor
    numerators, recorded = bound(batch)
    terms = zip(bound.terms, numerators, divisors, strict=True)
    parts = [term.weight * part / divisor for term, part, divisor in terms if divisor]
    if parts:
        torch.stack(parts).sum().backward()  # type: ignore[no-untyped-call]
    return recorded


class _StepBuffers:
    """Each micro-batch starts from the step's buffers, and the mean of what it makes of them stays.

    Of those that add up over rows the sum of the changes does. This is what micro-batches mean
    here, whoever computes them; without them it changes nothing.
    """

    def __init__(self, bound: Objective, changing: Mapping[str, bool]) -> None:
        self._bound, self._changing = bound, changing

    def __enter__(self) -> _StepBuffers:
        self._before = self._now()
        self._made: list[dict[str, Tensor]] = []
        return self

    def _now(self) -> dict[str, Tensor]:
        named = self._bound.named_buffers()
        return {name: b.detach().clone() for name, b in named if b.layout == torch.strided}

    def restart(self) -> None:
        """The buffers as they were before the step."""
        self._made.append(self._now())
        self._take(self._before)

    def _take(self, values: dict[str, Tensor]) -> None:
        """Except for what a forward pass has made, or made larger."""
        for name, buffer in self._bound.named_buffers():
            if name in values and buffer.shape == values[name].shape:
                buffer.detach().copy_(values[name])

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            return
        made = [*self._made[1:], self._now()]  # the first is from before any forward pass
        after = {}
        for name, before in self._before.items():
            values = [one[name] for one in made if name in one and one[name].shape == before.shape]
            if len(values) < len(made):
                continue
            if self._changing.get(name):
                after[name] = before + sum(value - before for value in values)
            else:
                is_mean = before.is_floating_point() or before.is_complex()
                after[name] = torch.stack(values).mean(0) if is_mean else values[-1]
        self._take(after)
