"""A job spec made concrete: its rows as tensors, its model and losses bound to them."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from pipeline import registry
from pipeline.data import cache
from pipeline.data.batch import Batch
from pipeline.data.columns import Field
from pipeline.data.convert import Say
from pipeline.data.sampler import Sampler, WindowSampler, steps_per_epoch
from pipeline.data.streaming import Streamed
from pipeline.distributed.buffers import changing
from pipeline.errors import ContractError, DataError, InputError, UsageError
from pipeline.losses.objective import Objective, tried
from pipeline.losses.terms import Output, bind, outputs, readings
from pipeline.spec import JobSpec
from pipeline.tracebacks import described

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


@dataclass(frozen=True, repr=False)
class Job(cache.Converted):
    """What every worker needs: the same on each, a pure function of spec and data."""

    spec: JobSpec

    @property
    def num_rows(self) -> int:
        """Training rows."""
        return len(self.train)

    def sampler(self) -> Sampler | WindowSampler:
        """Which rows each step uses."""
        settings = self.spec.training
        seed = settings.seed if settings.shuffle else None
        if isinstance(self.train, Streamed):
            plan = self.train.plan
            return WindowSampler(
                plan.bounds, settings.batch_size, seed, plan.window, settings.epochs
            )
        lengths = None
        if settings.bucket_by is not None:
            lengths = np.diff(self.train.lists[settings.bucket_by].offsets)
        return Sampler(self.num_rows, settings.batch_size, seed, lengths)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps that use each training row once."""
        return steps_per_epoch(self.num_rows, self.spec.training.batch_size)

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.spec.training.epochs * self.steps_per_epoch

    def is_evaluated(self, step: int, last_step: int) -> bool:
        """Whether the validation rows are looked at after `step` steps."""
        is_due = step % self.steps_per_epoch == 0 or step == last_step
        return self.validation is not None and is_due

    @property
    def num_validation_rows(self) -> int:
        """Validation rows, 0 without validation."""
        return len(self.validation) if self.validation else 0


def prepare(
    spec: JobSpec, base: Path, say: Say = lambda _: None, trusted_seconds: float = 0.0
) -> Job:
    """The spec's rows, converted now or found in the cache, which is read through once.

    `say` is told how far a conversion has come. Raises DataError naming file and column.
    """
    float_dtype = np.float64 if spec.training.precision == "float64" else np.float32
    found = cache.rows(
        spec.data, base, readings(spec), float_dtype, spec.cache,
        say=say, trusted_seconds=trusted_seconds,
    )  # fmt: skip
    bucket = spec.training.bucket_by
    if bucket is not None and bucket not in found.train.lists:
        lists = ", ".join(found.train.lists) or "there are none"
        raise DataError(f"training.bucket_by: {bucket!r} is no column of lists ({lists})")
    return Job(**vars(found), spec=spec)


def objective(spec: JobSpec, fields: list[Field], trial: Batch | None = None) -> Objective:
    """Model and losses of the spec, freshly initialised from its seed.

    `trial` is a batch on which users' losses are tried; without it they have no denominator,
    which only training needs.
    """
    terms = bind(spec, fields)
    made = outputs(terms, spec)
    inputs = {field.name: field for field in fields if field.is_input}
    torch.manual_seed(spec.training.seed)
    try:
        model = built(spec.model.name, inputs, made, spec.model.options)
        if not isinstance(model, nn.Module):
            raise UsageError(f"model {spec.model.name}: {type(model).__name__} is no nn.Module")
        _refuse_lazy(model, spec.model.name)
        sizes = {name: output.size for name, output in made.items()}
        bound = Objective(model, inputs, terms, sizes)
        bound.sample_weight = spec.data.sample_weight
        if bound.sample_weight is not None and bound.is_coupled:
            label = next(term.label for term in terms if term.loss.per_batch)
            problem = "is one number for the whole batch, which row weights cannot enter"
            raise ContractError(label, problem, "take data.sample_weight out")
        bound.precision = PRECISIONS[spec.training.precision]
        if bound.precision == torch.float64:
            bound.widen()
        _own_memory(bound, spec.model.name)
        _with_dense_gradients(bound)
        if trial is not None:
            bound.terms = tried(terms, bound, trial)
            bound.changing = changing(bound, trial)
    except InputError:
        raise
    except Exception as error:  # a user's model can fail in any way: say where, keep the cause
        raise of_model(spec.model.name, error, inputs) from error
    return bound


def of_model(name: str, error: Exception, inputs: Iterable[str], doing: str = "") -> UsageError:
    """What is said of an error in a user's model."""
    columns = f"; `batch` holds {', '.join(inputs)}" * isinstance(error, KeyError)
    return UsageError(f"model {name}: {doing}{described(error)}{columns}")


def build_optimizer(spec: JobSpec, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """The spec's optimizer over those of the parameters that are trained."""
    chosen, trained = spec.optimizer, [p for p in parameters if p.requires_grad]
    made: torch.optim.Optimizer = registry.optimizers[chosen.name].build(trained, **chosen.options)
    return made


def _refuse_lazy(model: nn.Module, name: str) -> None:
    """Raise UsageError for modules whose size only a first batch would tell."""
    for path, module in model.named_modules():
        kind = type(module).__name__
        own = module.parameters(recurse=False)
        if any(isinstance(p, nn.parameter.UninitializedParameter) for p in own):
            raise UsageError(
                f"model {name}: {path or 'it'} is a {kind}, whose size its first batch would tell: "
                f"take {kind.removeprefix('Lazy')} with its size, as Features(inputs).width"
            )


def _own_memory(bound: nn.Module, name: str) -> None:
    """Let each number of a buffer stand in memory once. Raises UsageError where a weight does not.

    Steps write into both. (`expand` makes tensors that repeat one number.)
    """
    for path, parameter in bound.named_parameters():
        if _repeats(parameter):
            raise UsageError(
                f"model {name}: parameter {path!r} repeats numbers in memory, as `expand` makes "
                "them, and cannot be updated: append .clone()"
            )
    for path, buffer in list(bound.named_buffers()):
        if _repeats(buffer) or buffer.is_conj() or buffer.is_neg():
            module, _, own = path.rpartition(".")
            bound.get_submodule(module).register_buffer(
                own,
                buffer.resolve_conj().resolve_neg().contiguous(),
                persistent=path in bound.state_dict(),
            )


def _with_dense_gradients(bound: nn.Module) -> None:
    """Embeddings whose gradients are summed as other tensors are; their numbers are the same."""
    for module in bound.modules():
        if isinstance(module, nn.Embedding | nn.EmbeddingBag):
            module.sparse = False


def _repeats(tensor: torch.Tensor) -> bool:
    return tensor.layout == torch.strided and any(
        size > 1 and stride == 0 for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    )


def built(
    name: str, inputs: dict[str, Field], outputs: dict[str, Output], options: dict[str, Any]
) -> Any:
    """The registered model, given as many of inputs and outputs as it takes."""
    build = registry.models[name].build
    parameters = inspect.signature(build).parameters.values()
    wanted = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return build(*(inputs, outputs)[: len(wanted)], **options)


def trial_batch(job: Job) -> Batch:
    """The first training rows and the longest lists: enough to see a mistake, quick to compute."""
    first = np.arange(min(job.num_rows, job.spec.training.batch_size, 64))
    longest = [int(np.diff(lists.offsets).argmax()) for lists in job.train.lists.values()]
    return job.train.gather(np.unique([*first, *longest]))
