"""A job's model, losses and optimizer out of the registries, freshly initialised from its seed."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pipeline import registry
from pipeline.data.batch import Batch
from pipeline.data.columns import Field
from pipeline.errors import InputError, UsageError
from pipeline.losses.bind import Output, bind, outputs
from pipeline.losses.objective import Objective
from pipeline.losses.terms import Term
from pipeline.spec import JobSpec
from pipeline.tracebacks import describe
from pipeline.train.parameters import choose_trained, groups, initialise

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


def bind_seeded(spec: JobSpec, fields: list[Field]) -> list[Term]:
    """The spec's losses, bound to their targets; parameters of their own start from the seed."""
    torch.manual_seed(spec.training.seed)
    return bind(spec, fields)


def build_objective(
    spec: JobSpec,
    fields: list[Field],
    terms: list[Term] | None = None,
    trial: Batch | None = None,
    initial: Mapping[str, Tensor] | None = None,
) -> Objective:
    """Model and losses of the spec, freshly initialised from its seed, or from `initial` weights.

    `terms` are bound to the fields already; those with parameters of their own are bound anew, as
    each objective trains its own. `trial` is a batch on which users' losses are tried; without it
    they have no denominator, which only training needs.
    """
    if terms is None or any(term.loss.module is not None for term in terms):
        terms = bind_seeded(spec, fields)
    model_outputs = outputs(terms, spec)
    inputs = {field.name: field for field in fields if field.is_input}
    chosen = spec.training.threshold  # at the end, for a metric
    torch.manual_seed(spec.training.seed)
    try:
        model = build_model(spec.model.name, inputs, model_outputs, spec.model.options)
        if not isinstance(model, nn.Module):
            kind = type(model).__name__
            raise UsageError(f"model {spec.model.name}: {kind} is not an nn.Module")
        _refuse_lazy(model, spec.model.name)
        if initial is not None and spec.model.init_from:
            initialise(model, initial, spec.model.init_from)
        choose_trained(model, spec.model)
        return Objective(
            model,
            inputs,
            terms,
            {name: output.size for name, output in model_outputs.items()},
            precision=PRECISIONS[spec.training.precision],
            sample_weight=spec.data.sample_weight,
            exposure=spec.data.exposure,
            threshold=0.5 if isinstance(chosen, str) else chosen,
            trial=trial,
        )
    except InputError:
        raise
    except Exception as error:  # a user's model can fail in any way: say where, keep the cause
        raise model_error(spec.model.name, error, inputs) from error


def model_error(name: str, error: Exception, inputs: Iterable[str], doing: str = "") -> UsageError:
    """What is said of an error in a user's model."""
    columns = f"; `batch` holds {', '.join(inputs)}" * isinstance(error, KeyError)
    return UsageError(f"model {name}: {doing}{describe(error)}{columns}")


def build_optimizer(
    spec: JobSpec, named: Iterable[tuple[str, nn.Parameter]]
) -> torch.optim.Optimizer:
    """The spec's optimizer over those of the named parameters that are trained."""
    chosen = spec.optimizer
    parameters = groups(named, chosen)
    if not parameters:
        raise UsageError("model.freeze: nothing is left to train")
    optimizer: torch.optim.Optimizer = registry.optimizers[chosen.name].build(
        parameters, **chosen.options
    )
    return optimizer


def build_model(
    name: str, inputs: dict[str, Field], outputs: dict[str, Output], options: dict[str, Any]
) -> Any:
    """The registered model, given as many of inputs and outputs as it takes."""
    build = registry.models[name].build
    parameters = inspect.signature(build).parameters.values()
    wanted = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return build(*(inputs, outputs)[: len(wanted)], **options)


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
