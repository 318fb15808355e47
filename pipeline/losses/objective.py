"""Model and losses as one module, so that every parameter is trained and seen by DDP."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from pipeline.data.batch import Batch, num_rows
from pipeline.errors import ContractError
from pipeline.losses.contract import elements, rows
from pipeline.losses.terms import Predictions, Term, num_classes


class Objective(nn.Module):
    """Model and loss terms as one module: a batch in, one numerator per term out.

    Wrapping both lets DDP see every parameter, those that a loss owns included.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Collection[str],
        terms: list[Term],
        sizes: Mapping[str, int | None],
    ) -> None:
        super().__init__()
        self.model, self.inputs, self.terms, self.sizes = model, list(inputs), terms, dict(sizes)
        self.precision = torch.float32
        heads: dict[str, nn.Module] = {}
        for number, term in enumerate(terms):
            if term.loss.head is not None:
                width = sizes[term.outputs[0]] or 1
                try:
                    heads[str(number)] = term.loss.head(width, num_classes(term))
                except ValueError as error:
                    problem = f"{error} ({num_classes(term)} classes)"
                    raise ContractError(term.label, problem, "change its options") from None
            elif term.loss.module is not None:
                heads[str(number)] = term.loss.module
        self.heads = nn.ModuleDict(heads)

    def head(self, number: int) -> nn.Module | None:
        """Parameters that the loss of term `number` owns and takes as first argument."""
        owned = self.terms[number].loss.head is not None
        return self.heads[str(number)] if owned else None

    def predict(self, batch: Batch) -> dict[str, Tensor]:
        """The model's outputs by name, from the input columns alone."""
        device = next(self.parameters()).device.type
        with torch.autocast(device, torch.bfloat16, enabled=self.precision == torch.bfloat16):
            made = self.model({name: batch[name] for name in self.inputs})
        return {"prediction": made} if isinstance(made, Tensor) else dict(made)

    def items(self, predictions: Predictions, batch: Batch) -> list[Tensor]:
        """The unreduced numbers of each term."""
        return [self.items_of(number, predictions, batch) for number in range(len(self.terms))]

    def items_of(self, number: int, predictions: Predictions, batch: Batch) -> Tensor:
        """The unreduced numbers of one term. Raises ContractError where the loss fails."""
        term, head = self.terms[number], self.head(number)
        arguments = term.arguments(predictions, batch)
        try:
            return term.loss.items(*([head] if head is not None else []), *arguments)
        except Exception as error:  # a user's loss can fail in any way: say which, keep the cause
            raise ContractError(
                term.label,
                f"cannot be computed: {type(error).__name__}: {str(error).partition(chr(10))[0]}",
                "compare shapes and types of output and target with `pipeline list losses`",
            ) from error

    def denominators(self, batch: Batch) -> Tensor:
        """What each term divides by, from the targets alone: float64 [K]."""
        return torch.stack([term.denominator(batch).to("cpu") for term in self.terms])

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Numerator of each term: differentiable [K], and summed in float64 for the record [K]."""
        items = self.items(self.predict(batch), batch)
        numerators = torch.stack([item.sum() for item in items])
        recorded = torch.stack([item.detach().double().sum() for item in items])
        return numerators, recorded


def tried(terms: list[Term], objective: Objective, batch: Batch) -> list[Term]:
    """The terms with every denominator known: users' losses are tried on one batch."""
    if all(term.loss.denominator is not None for term in terms):
        return terms
    resolved = []
    was_training = objective.training
    objective.eval()  # a trial leaves no trace, as in the statistics of a BatchNorm
    with torch.no_grad():
        predictions = objective.predict(batch)
    for number, term in enumerate(terms):
        if term.loss.denominator is not None:
            resolved.append(term)
            continue
        with torch.no_grad():
            items = objective.items_of(number, predictions, batch)
        truth = [column for column in term.truth(batch) if isinstance(column, Tensor)]
        num_items, num_targets = items.numel(), truth[0].numel() if truth else -1
        if items.dim() > 0 and num_items == num_rows(batch):
            count = rows
        elif items.dim() > 0 and num_items == num_targets:
            count = elements
        else:
            shapes = [list(predictions[name].shape) for name in term.outputs]
            raise ContractError(
                term.label,
                f"gave shape {list(items.shape)} from outputs {shapes} and "
                f"targets {[list(column.shape) for column in truth]}: a loss gives one number per "
                "row or per target element, the mean is taken over all workers",
                "leave out .mean() or .sum()"
                if items.dim() == 0
                else "give output and target one shape, as by squeezing a last dimension of 1",
            )
        resolved.append(replace(term, loss=replace(term.loss, denominator=count)))
    objective.train(was_training)
    return resolved
