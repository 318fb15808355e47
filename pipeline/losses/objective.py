"""Model and losses as one module, so that every parameter is trained and seen by DDP."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.data.batch import Batch, num_rows, only, to_float64
from pipeline.errors import ContractError, UsageError
from pipeline.losses.contract import PredictionKind, elements, rows
from pipeline.losses.memory import dense_gradients, own_memory
from pipeline.losses.modes import evaluating
from pipeline.losses.terms import Predictions, Term, num_classes
from pipeline.spec.data import SampleWeight
from pipeline.tracebacks import describe


@dataclass(frozen=True)
class Share:
    """A micro-batch's part in a loss of the whole batch, once that is known."""

    value: float
    """Mean loss of the global batch."""
    gradients: tuple[Tensor, ...]
    """Gradient of value times rows of the global batch, for each prediction of these rows."""
    parameter_gradients: tuple[Tensor, ...] = ()
    """The same for the loss's own parameters; one micro-batch of the batch carries them."""


Shares = Mapping[int, Share]
"""Shares of one micro-batch, by index of the term."""


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
        *,
        precision: torch.dtype = torch.float32,
        sample_weight: SampleWeight | None = None,
        exposure: str | None = None,
        threshold: float | None = None,
        trial: Batch | None = None,
    ) -> None:
        """`inputs` are the columns that the model reads, `sizes` the widths of its outputs.

        Users' losses are tried on `trial` for what they divide by; without it they have no
        denominator. Raises ContractError for losses that cannot be computed with these.
        """
        super().__init__()
        self.model = model
        self.inputs = list(inputs)
        self.sizes = dict(sizes)
        self.precision, self.sample_weight = precision, sample_weight
        if sample_weight is not None and (coupled := [t for t in terms if t.loss.per_batch]):
            problem = "is one number for the whole batch, which row weights cannot enter"
            raise ContractError(coupled[0].label, problem, "take data.sample_weight out")
        self.exposure = exposure
        self.log_rates = _outputs_of(terms, "log_rates")
        self.rates = _outputs_of(terms, "rates")
        if exposure and not (self.log_rates or self.rates):
            problem = "reads no rate, which data.exposure would multiply"
            raise ContractError(terms[0].label, problem, "use a loss of counts, as poisson_nll")
        self.terms = terms
        self.heads = nn.ModuleDict(_heads(terms, sizes))
        if threshold is not None:
            self._keep_thresholds(threshold)
        if precision == torch.float64:
            self.widen()
        own_memory(self)
        dense_gradients(self)
        if trial is not None:
            self.resolve_denominators(trial)

    def _keep_thresholds(self, threshold: float) -> None:
        """One for each column of yes and no, as buffers: they are part of the trained model."""
        found = False
        for index, term in enumerate(self.terms):
            if term.target.task(term) == "binary" and "probabilities" in term.target.readable(term):
                columns = term.target.nothing(term, 1, "probabilities")[0].shape[1:]
                self.register_buffer(f"threshold_{index}", torch.full(columns, threshold))
                found = True
        if not found:
            problem = "gives no probability of yes, which training.threshold decides by"
            fix = "take training.threshold out, or use a loss of yes and no, as bce_with_logits"
            raise ContractError(self.terms[0].label, problem, fix)

    def with_threshold(self, index: int) -> Term:
        """Term `index` with the threshold that it decides by, where it has one."""
        own = self._buffers.get(f"threshold_{index}")
        return self.terms[index] if own is None else replace(self.terms[index], threshold=own)

    def widen(self) -> None:
        """Compute in float64 from now on; what is complex, in complex128."""
        self.precision = torch.float64
        self.double()
        for tensor in (*self.parameters(), *self.buffers()):
            if tensor.is_complex():
                tensor.data = tensor.data.to(torch.complex128)

    def resolve_denominators(self, batch: Batch) -> None:
        """Find out every term's denominator: users' losses are tried on one batch."""
        if all(term.loss.denominator is not None for term in self.terms):
            return
        # a trial leaves no trace, as in the statistics of a BatchNorm
        with evaluating(self), torch.no_grad():
            predictions = self.predict(batch)
            counts = [
                term.loss.denominator or self._denominator(index, predictions, batch)
                for index, term in enumerate(self.terms)
            ]
        self.terms = [
            replace(term, loss=replace(term.loss, denominator=count))
            for term, count in zip(self.terms, counts, strict=True)
        ]

    def _denominator(
        self, index: int, predictions: Predictions, batch: Batch
    ) -> Callable[..., Tensor]:
        """What a user's loss divides by, from the shape of what it gives."""
        term = self.terms[index]
        items = self.items_of(index, predictions, batch)
        truth = [column for column in term.truth(batch) if isinstance(column, Tensor)]
        if items.dim() > 0 and items.numel() == num_rows(batch):
            return rows
        if items.dim() > 0 and truth and items.numel() == truth[0].numel():
            return elements
        shapes = [list(predictions[name].shape) for name in term.outputs]
        raise ContractError(
            term.label,
            f"gave shape {list(items.shape)} from outputs {shapes} and "
            f"targets {[list(column.shape) for column in truth]}: a loss gives one number per "
            "row or per target element, the mean is taken over all workers",
            'leave out .mean() or .sum(); or register it with per="batch" if it needs all rows'
            if items.dim() == 0
            else "give output and target one shape, as by squeezing a last dimension of 1",
        )

    def head(self, index: int) -> nn.Module | None:
        """Parameters that the loss of term `index` owns and takes as first argument."""
        owned = self.terms[index].loss.head is not None
        return self.heads[str(index)] if owned else None

    def served(self, index: int, predictions: Predictions) -> Tensor:
        """What term `index` serves: probabilities, rates or values on the target's scale."""
        return self.terms[index].served(self.head(index), predictions)

    def predict(self, batch: Batch) -> dict[str, Tensor]:
        """The model's outputs by name, from the input columns alone."""
        with self.autocast():
            outputs = self.model(self._inputs(batch))
        if isinstance(outputs, Tensor):
            outputs = {"prediction": outputs}
        if not isinstance(outputs, Mapping):
            kind = "nothing" if outputs is None else type(outputs).__name__
            raise UsageError(
                f"model {type(self.model).__name__}: its forward gives {kind}: return a tensor, or "
                f"a mapping from outputs' names ({', '.join(self.sizes)}) to tensors"
            )
        return self._exposed(dict(outputs), batch) if self.exposure else dict(outputs)

    def _exposed(self, outputs: dict[str, Tensor], batch: Batch) -> dict[str, Tensor]:
        """The outputs with rates that are multiplied by the rows' exposure."""
        assert self.exposure is not None
        exposure = batch[self.exposure]
        assert isinstance(exposure, Tensor)

        def beside(output: Tensor) -> Tensor:
            factor = exposure.double() if self.precision == torch.float64 else exposure.float()
            return factor.reshape(-1, *[1] * (output.dim() - 1))

        for name in self.log_rates & outputs.keys():
            outputs[name] = outputs[name] + beside(outputs[name]).log()
        for name in self.rates & outputs.keys():
            outputs[name] = outputs[name] * beside(outputs[name])
        return outputs

    @property
    def is_coupled(self) -> bool:
        """Whether a loss needs the whole global batch at once."""
        return any(term.loss.per_batch for term in self.terms)

    def autocast(self) -> AbstractContextManager[Any]:
        """Around the model: bfloat16 if that is its precision."""
        if self.precision != torch.bfloat16:
            return nullcontext()
        return torch.autocast(next(self.parameters()).device.type, torch.bfloat16)

    def _inputs(self, batch: Batch) -> Batch:
        """The columns that the model reads, in its precision."""
        columns = only(batch, tuple(self.inputs))
        return to_float64(columns) if self.precision == torch.float64 else columns

    def items(self, predictions: Predictions, batch: Batch) -> list[Tensor]:
        """What the numerator of each term is the sum of: items times the weights of their rows.

        For a loss that couples rows, its mean loss times the number of rows.
        """
        return [self._weigh(index, predictions, batch) for index in range(len(self.terms))]

    def _weigh(self, index: int, predictions: Predictions, batch: Batch) -> Tensor:
        items = self.items_of(index, predictions, batch)
        if self.terms[index].loss.per_batch:
            return items * num_rows(batch)
        if self.sample_weight is None or not num_rows(batch):
            return items
        weight = self._weights(batch).to(items.dtype)
        return items.reshape(len(weight), -1).sum(1) * weight

    def _weights(self, batch: Batch) -> Tensor:
        """The rows' own weights [N]."""
        assert self.sample_weight is not None
        column = batch[self.sample_weight.column]
        assert isinstance(column, Tensor)
        return column

    def metric_weight(self, batch: Batch) -> Tensor:
        """How much each row counts in metrics: float64 [N]."""
        if self.sample_weight is not None and self.sample_weight.in_metrics:
            return self._weights(batch).double()
        return torch.ones(num_rows(batch), dtype=torch.float64)

    def items_of(self, index: int, predictions: Predictions, batch: Batch) -> Tensor:
        """The unreduced numbers of one term. Raises ContractError where the loss fails."""
        return self.computed(index, self.terms[index].arguments(predictions, batch))

    def computed(self, index: int, arguments: list[Any]) -> Tensor:
        """What the loss of term `index` makes of its predictions and targets."""
        term = self.terms[index]
        head = self.head(index)
        try:
            items: object = term.loss.items(*([head] if head is not None else []), *arguments)
        except Exception as error:  # a user's loss can fail in any way: say which, keep the cause
            shapes = [list(a.shape) for a in arguments if isinstance(a, Tensor)]
            outputs = shapes[: len(term.outputs)]
            targets = shapes[len(term.outputs) :]
            shapes_text = (
                f"outputs of {outputs} and targets of {targets}" if shapes else "its arguments"
            )
            raise ContractError(
                term.label,
                f"cannot be computed from {shapes_text}: {describe(error)}",
                "the model gives the first, data.target the second: do they fit each other?"
                if re.search(r"size|shape|dim|type", str(error), re.IGNORECASE)
                else "correct the loss",
            ) from error
        if not isinstance(items, Tensor):
            raise ContractError(
                term.label,
                f"gives {'nothing' if items is None else type(items).__name__}, not a tensor",
                "return one number per row or per target element; leave out .item() and .numpy()",
            )
        if items.is_complex():
            raise ContractError(
                term.label,
                "gives complex numbers, of which no step goes downhill",
                "return real ones, such as the absolute value",
            )
        return items

    def denominators(self, batch: Batch) -> Tensor:
        """What each term divides by, from targets and weights alone: float64 [K]."""
        counts = [term.denominator(batch).to("cpu") for term in self.terms]
        if self.sample_weight is not None and self.sample_weight.mean_over == "weights":
            weights = self._weights(batch).to("cpu", torch.float64)
            counts = [count * weights for count in counts]
        return torch.stack([count.sum() for count in counts])

    def scales(self, denominators: Tensor) -> Tensor:
        """Weight of each term over what it is divided by, 0 if that is nothing: float64 [K]."""
        both = zip(self.terms, denominators.tolist(), strict=True)
        weights = [term.weight / divisor if divisor > 0 else 0.0 for term, divisor in both]
        return torch.tensor(weights, dtype=torch.float64)

    def forward(
        self, batch: Batch, shares: Shares | None = None, has_items: Sequence[bool] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Numerator of each term: differentiable [K], and summed in float64 for the record [K].

        Losses that couple rows take the batch for the whole one, unless their `shares` are given.
        `has_items` says which terms have something to count in the global batch: the others have no
        gradient, not even one of 0.
        """
        predictions = self.predict(batch)
        known_shares = shares or {}
        parts = [
            self._apply_share(index, predictions, known_shares[index], num_rows(batch))
            if index in known_shares
            else self._sum(self._weigh(index, predictions, batch))
            for index in range(len(self.terms))
        ]
        numerators, recorded = zip(*parts, strict=True)
        if has_items is not None and not all(has_items):
            both = zip(numerators, has_items, strict=True)
            numerators = tuple(part if counts else part.detach() for part, counts in both)
        return torch.stack(numerators), torch.stack(recorded)

    @staticmethod
    def _sum(items: Tensor) -> tuple[Tensor, Tensor]:
        return items.sum(), items.detach().double().sum()

    def _apply_share(
        self, index: int, predictions: Predictions, share: Share, rows: int
    ) -> tuple[Tensor, Tensor]:
        """Something that has the share's gradient, and these rows' part of the whole loss."""
        pairs = [
            *zip(self.terms[index].read(predictions), share.gradients, strict=True),
            *zip(self.owned(index), share.parameter_gradients, strict=False),
        ]
        numerator = torch.stack([(one * other).sum() for one, other in pairs]).sum()
        value = torch.tensor(share.value * rows, dtype=torch.float64, device=numerator.device)
        return numerator, value

    def owned(self, index: int) -> list[nn.Parameter]:
        """Parameters of the loss of term `index`."""
        if str(index) not in self.heads:
            return []
        return [p for p in self.heads[str(index)].parameters() if p.requires_grad]


def _outputs_of(terms: list[Term], kind: PredictionKind) -> set[str]:
    """Outputs of this kind that losses of counts read."""
    return {
        name
        for term in terms
        if term.loss.target == "counts"
        for role, name in zip(term.loss.roles, term.outputs, strict=True)
        if role.kind == kind
    }


def _heads(terms: list[Term], sizes: Mapping[str, int | None]) -> dict[str, nn.Module]:
    """Modules of the losses' own parameters, by index of the term."""
    heads: dict[str, nn.Module] = {}
    for index, term in enumerate(terms):
        if term.loss.head is not None:
            try:
                width = sizes[term.outputs[0]] or 1
                heads[str(index)] = term.loss.head(width, num_classes(term))
            except ValueError as error:
                problem = f"{error} ({num_classes(term)} classes)"
                raise ContractError(term.label, problem, "change its options") from None
        elif term.loss.module is not None:
            heads[str(index)] = term.loss.module
    return heads
