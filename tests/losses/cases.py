"""One random case per registered loss: a tiny model, targets, and torch's own mean to compare with.

Every prediction is an activation of `features @ weight`, so that the same case serves the
contract tests (numbers) and the distributed ones (gradients of `weight`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline import registry
from pipeline.data.batch import Batch, Ragged
from pipeline.data.columns import Field, Labels, Number, Tokens
from pipeline.losses.contract import build
from pipeline.losses.objective import Objective
from pipeline.losses.terms import Term

FEATURES = 3
CLASSES = 4


@dataclass(frozen=True)
class Case:
    """A loss with options, what its model gives, its targets, and torch's own criterion."""

    name: str
    options: dict[str, Any]
    shapes: tuple[tuple[int, ...], ...]
    """Shape of each prediction, without the rows."""
    activation: Callable[[Tensor], Tensor]
    targets: tuple[Tensor | Ragged, ...]
    oracle: Callable[..., Tensor]
    """Torch's own mean over (head, *predictions, *targets)."""
    fields: tuple[Field, ...]
    features: Tensor

    @property
    def batch(self) -> Batch:
        """All rows."""
        named = {field.name: t for field, t in zip(self.fields, self.targets, strict=True)}
        return {"features": self.features, **named}

    def rows(self, rows: Any) -> Batch:
        """The given rows."""
        index = torch.as_tensor(np.asarray(rows, dtype=np.int64))
        return {
            name: Ragged(column.values[index], column.lengths[index])
            if isinstance(column, Ragged)
            else column[index]
            for name, column in self.batch.items()
        }

    def objective(self) -> Objective:
        """Model and loss, the same each time, in float64."""
        loss = build(registry.losses[self.name], self.options)
        outputs = tuple(role.name for role in loss.roles)
        term = Term(self.name, 1.0, loss, outputs, self.fields)
        torch.manual_seed(5)
        model = Model(outputs, self.shapes, self.activation)
        widths = {o: s[0] if s else None for o, s in zip(outputs, self.shapes, strict=True)}
        return Objective(model, ["features"], [term], widths).double()


class Model(nn.Module):
    """Named outputs as activations of linear maps."""

    def __init__(
        self,
        outputs: tuple[str, ...],
        shapes: tuple[tuple[int, ...], ...],
        activation: Callable[[Tensor], Tensor],
    ) -> None:
        super().__init__()
        self.outputs, self.shapes, self.activation = outputs, shapes, activation
        sizes = [int(np.prod(shape)) for shape in shapes]
        self.weights = nn.ParameterList(nn.Parameter(torch.randn(FEATURES, s)) for s in sizes)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        features = batch["features"]
        assert isinstance(features, Tensor)
        return {
            name: self.activation((features @ weight).reshape(len(features), *shape))
            for name, weight, shape in zip(self.outputs, self.weights, self.shapes, strict=True)
        }


def identity(x: Tensor) -> Tensor:
    return x


def log_softmax(x: Tensor) -> Tensor:
    return x.log_softmax(1)


def squared(x: Tensor) -> Tensor:
    return x**2 + 0.1


def _mixed_with_zero(
    own: torch.distributions.Distribution, always_zero: Tensor, truth: Tensor
) -> Tensor:
    """Minus the mean log-likelihood of counts that are 0 with a chance of their own."""
    counted = F.logsigmoid(-always_zero) + own.log_prob(truth)
    either = torch.logaddexp(F.logsigmoid(always_zero), counted)
    return -either.where(truth == 0, counted).mean()


def case(name: str, seed: int, num_rows: int) -> Case:
    """A random case of the loss: shapes, options and weights follow from the seed."""
    return _Maker(name, seed, num_rows).make()


class _Maker:
    def __init__(self, name: str, seed: int, num_rows: int) -> None:
        self.name, self.num_rows = name, num_rows
        self.rng = np.random.default_rng(seed)

    def make(self) -> Case:
        made: Case = getattr(self, self.name)()
        return made

    # -- random pieces
    def floats(self, *shape: int) -> Tensor:
        return torch.from_numpy(self.rng.normal(size=(self.num_rows, *shape)))

    def flip(self) -> bool:
        return bool(self.rng.integers(2))

    def some(self) -> tuple[int, ...]:
        """One number per row, a vector, or a matrix."""
        return [(), (2,), (2, 3)][int(self.rng.integers(3))]

    def classes(self, *shape: int, ignore: int | None = None) -> Tensor:
        found = self.rng.integers(CLASSES, size=(self.num_rows, *shape))
        if ignore is not None:
            found[self.rng.random(found.shape) < 0.4] = ignore
            found[:2] = ignore  # the first worker has rows, and none that counts
        return torch.from_numpy(found)

    def class_weight(self) -> list[float] | None:
        return list(self.rng.uniform(0.1, 3, CLASSES)) if self.flip() else None

    def signs(self, *shape: int) -> Tensor:
        return torch.from_numpy(self.rng.integers(2, size=(self.num_rows, *shape)) * 2.0 - 1)

    def field(self, kind: type[Field] = Number) -> Field:
        sizes: dict[str, Any] = {} if kind is Number else {"num_classes": CLASSES}
        return kind("target", "double", "target", **sizes)

    def built(
        self,
        shapes: tuple[tuple[int, ...], ...],
        targets: tuple[Any, ...],
        oracle: Callable[..., Tensor],
        options: dict[str, Any] | None = None,
        activation: Callable[[Tensor], Tensor] = identity,
        kind: type[Field] = Number,
    ) -> Case:
        fields = (self.field(kind),) if targets else ()
        features = torch.from_numpy(self.rng.normal(size=(self.num_rows, FEATURES)))
        return Case(
            self.name, options or {}, shapes, activation, targets,
            lambda head, *arguments: oracle(*arguments), fields, features,
        )  # fmt: skip

    # -- regression
    def mse(self) -> Case:
        shape = self.some()
        return self.built((shape,), (self.floats(*shape),), nn.MSELoss())

    def l1(self) -> Case:
        shape = self.some()
        return self.built((shape,), (self.floats(*shape),), nn.L1Loss())

    def smooth_l1(self) -> Case:
        shape, beta = self.some(), float(self.rng.uniform(0, 2))
        return self.built(
            (shape,), (self.floats(*shape),), nn.SmoothL1Loss(beta=beta), {"beta": beta}
        )

    def huber(self) -> Case:
        shape, delta = self.some(), float(self.rng.uniform(0.1, 2))
        return self.built(
            (shape,), (self.floats(*shape),), nn.HuberLoss(delta=delta), {"delta": delta}
        )

    def gaussian_nll(self) -> Case:
        shape, full = self.some(), self.flip()
        own = nn.GaussianNLLLoss(full=full)
        return self.built(
            (shape, shape), (self.floats(*shape),), lambda m, v, t: own(m, t, v),
            {"full": full}, squared,
        )  # fmt: skip

    def poisson_nll(self) -> Case:
        shape, log_input, full = self.some(), self.flip(), self.flip()
        counts = torch.from_numpy(self.rng.poisson(2, (self.num_rows, *shape)).astype(float))
        own = nn.PoissonNLLLoss(log_input=log_input, full=full)
        return self.built(
            (shape,), (counts,), own, {"log_input": log_input, "full": full},
            identity if log_input else squared,
        )  # fmt: skip

    # -- classification
    def cross_entropy(self) -> Case:
        weight, smoothing = self.class_weight(), float(self.rng.uniform(0, 0.5)) * self.flip()
        tensor = None if weight is None else torch.tensor(weight, dtype=torch.float64)
        if self.rng.random() < 0.25:
            soft = self.floats(CLASSES).softmax(1)
            own = nn.CrossEntropyLoss(weight=tensor, label_smoothing=smoothing)
            options = {"class_weight": weight, "label_smoothing": smoothing, "soft_targets": True}
            return self.built(((CLASSES,),), (soft,), own, options)
        places = [(), (3,), (2, 2)][int(self.rng.integers(3))]
        ignore = int(self.rng.choice([-100, -1, CLASSES - 1]))
        own = nn.CrossEntropyLoss(weight=tensor, ignore_index=ignore, label_smoothing=smoothing)
        options = {
            "class_weight": weight, "ignore_index": ignore, "label_smoothing": smoothing
        }  # fmt: skip
        target = self.classes(*places, ignore=ignore)
        return self.built(((CLASSES, *places),), (target,), own, options, kind=Labels)

    def nll(self) -> Case:
        weight, places = self.class_weight(), [(), (3,)][int(self.rng.integers(2))]
        tensor = None if weight is None else torch.tensor(weight, dtype=torch.float64)
        own = nn.NLLLoss(weight=tensor, ignore_index=-7)
        return self.built(
            ((CLASSES, *places),), (self.classes(*places, ignore=-7),), own,
            {"class_weight": weight, "ignore_index": -7}, log_softmax, Labels,
        )  # fmt: skip

    def linear_cross_entropy(self) -> Case:
        weight, bias = self.class_weight(), self.flip()
        tensor = None if weight is None else torch.tensor(weight, dtype=torch.float64)

        def mean(head: Any, features: Tensor, target: Tensor) -> Tensor:
            own = nn.CrossEntropyLoss(weight=tensor, ignore_index=-100, label_smoothing=0.1)
            logits = F.linear(features, head.linear.weight, head.linear.bias)
            return own(logits, target)  # type: ignore[no-any-return]

        options = {"class_weight": weight, "bias": bias, "label_smoothing": 0.1, "in_features": 5}
        made = self.built(((5,),), (self.classes(ignore=-100),), identity, options, kind=Labels)
        return Case(**{**made.__dict__, "oracle": mean})

    def adaptive_log_softmax(self) -> Case:
        made = self.built(
            ((6,),), (self.classes(),), identity,
            {"cutoffs": [2], "in_features": 6, "div_value": 2.0}, kind=Labels,
        )  # fmt: skip
        return Case(**{**made.__dict__, "oracle": lambda head, x, t: head(x, t).loss})

    def bce(self) -> Case:
        shape = self.some()
        return self.built(
            (shape,), (self.floats(*shape).sigmoid(),), nn.BCELoss(), {}, torch.sigmoid
        )

    def bce_with_logits(self) -> Case:
        weight, pos = list(self.rng.uniform(0.1, 2, 3)), list(self.rng.uniform(0.1, 2, 3))
        own = nn.BCEWithLogitsLoss(
            torch.tensor(weight, dtype=torch.float64),
            pos_weight=torch.tensor(pos, dtype=torch.float64),
        )
        target = (self.floats(3) > 0).double()
        return self.built(((3,),), (target,), own, {"class_weight": weight, "pos_weight": pos})

    # -- rare classes: the papers' formulas, in which sure predictions may be infinite
    def focal(self) -> Case:
        weight, places = self.class_weight(), [(), (3,)][int(self.rng.integers(2))]
        focus = float(self.rng.choice([0.0, 0.5, 2.0]))
        factors = torch.tensor(weight or [1.0] * CLASSES, dtype=torch.float64)

        def mean(prediction: Tensor, truth: Tensor) -> Tensor:
            is_counted = truth != -100
            kept = truth.where(is_counted, 0)
            share = prediction.softmax(1).gather(1, kept[:, None])[:, 0]
            factor = factors[kept] * is_counted
            return -(factor * (1 - share) ** focus * share.log()).sum() / factor.sum()

        options = {"gamma": focus, "class_weight": weight}
        target = self.classes(*places, ignore=-100)
        return self.built(((CLASSES, *places),), (target,), mean, options, kind=Labels)

    def binary_focal(self) -> Case:
        shape, focus = self.some(), float(self.rng.choice([0.0, 0.5, 2.0]))
        alpha = float(self.rng.uniform()) if self.flip() else None

        def mean(prediction: Tensor, truth: Tensor) -> Tensor:
            yes = prediction.sigmoid()
            share = yes.where(truth == 1, 1 - yes)
            losses = -((1 - share) ** focus) * share.log()
            if alpha is not None:
                losses = losses * torch.full_like(share, alpha).where(truth == 1, 1 - alpha)
            return losses.mean()

        target = (self.floats(*shape) > 0).double()
        return self.built((shape,), (target,), mean, {"gamma": focus, "alpha": alpha})

    def asymmetric(self) -> Case:
        shape, margin = self.some(), float(self.rng.choice([0.0, 0.05, 0.2]))
        of_yes, of_no = map(float, self.rng.uniform(0.1, 4, 2))

        def mean(prediction: Tensor, truth: Tensor) -> Tensor:
            yes = prediction.sigmoid()
            shifted = (yes - margin).clamp(min=1e-300)
            gain = (1 - yes) ** of_yes * yes.log()
            return -gain.where(truth == 1, shifted**of_no * (1 - shifted).log()).mean()

        options = {"gamma_yes": of_yes, "gamma_no": of_no, "margin": margin}
        return self.built((shape,), ((self.floats(*shape) > 0).double(),), mean, options)

    # -- counts and costs: torch's own distributions, and a formula
    def gamma(self) -> Case:
        shape = self.some()

        def mean(prediction: Tensor, truth: Tensor) -> Tensor:
            own = torch.distributions.Exponential((-prediction).exp())
            return -own.log_prob(truth).mean()  # type: ignore[no-untyped-call, no-any-return]

        return self.built((shape,), (self.floats(*shape).exp(),), mean)

    def tweedie(self) -> Case:
        shape, power = self.some(), float(self.rng.uniform(1.1, 1.9))
        target = self.floats(*shape).exp() * (self.floats(*shape) > 0)

        def mean(prediction: Tensor, truth: Tensor) -> Tensor:
            rate = prediction.exp()
            losses = rate ** (2 - power) / (2 - power) - truth * rate ** (1 - power) / (1 - power)
            return losses.mean()

        return self.built((shape,), (target,), mean, {"power": power})

    def negative_binomial(self) -> Case:
        shape = self.some()
        counts = torch.from_numpy(self.rng.poisson(2, (self.num_rows, *shape)).astype(float))

        def mean(prediction: Tensor, dispersion: Tensor, truth: Tensor) -> Tensor:
            logits = prediction + dispersion.log()
            own = torch.distributions.NegativeBinomial(1 / dispersion, logits=logits)
            return -own.log_prob(truth).mean()  # type: ignore[no-untyped-call, no-any-return]

        return self.built((shape, shape), (counts,), mean, {}, squared)

    def zero_inflated_poisson(self) -> Case:
        shape = self.some()
        counts = torch.from_numpy(self.rng.poisson(1, (self.num_rows, *shape)).astype(float))

        def mean(prediction: Tensor, always_zero: Tensor, truth: Tensor) -> Tensor:
            own = torch.distributions.Poisson(prediction.exp())
            return _mixed_with_zero(own, always_zero, truth)

        return self.built((shape, shape), (counts,), mean)

    def zero_inflated_negative_binomial(self) -> Case:
        shape = self.some()
        counts = torch.from_numpy(self.rng.poisson(1, (self.num_rows, *shape)).astype(float))

        def mean(
            prediction: Tensor, dispersion: Tensor, always_zero: Tensor, truth: Tensor
        ) -> Tensor:
            logits = prediction + dispersion.log()
            own = torch.distributions.NegativeBinomial(1 / dispersion, logits=logits)
            return _mixed_with_zero(own, always_zero, truth)

        return self.built((shape,) * 3, (counts,), mean, {}, squared)

    # -- quantiles, grades, teachers
    def pinball(self) -> Case:
        levels = sorted(self.rng.uniform(0.05, 0.95, int(self.rng.integers(1, 4))).tolist())

        def mean(prediction: Tensor, truth: Tensor) -> Tensor:
            each = [
                (level * (truth - amount)).where(truth > amount, (1 - level) * (amount - truth))
                for level, amount in zip(levels, prediction.unbind(1), strict=True)
            ]
            return torch.stack(each).mean()

        options = {"levels": levels}
        return self.built(((len(levels),),), (self.floats(),), mean, options)

    def ordinal(self) -> Case:
        made = self.built(((),), (self.classes(),), identity, kind=Labels)

        def mean(head: Any, prediction: Tensor, truth: Tensor) -> Tensor:
            below = (head()[None, :] - prediction[:, None]).sigmoid()
            edges = torch.cat([0 * below[:, :1], below, 0 * below[:, :1] + 1], dim=1)
            return -edges.diff(dim=1).gather(1, truth[:, None]).log().mean()

        return Case(**{**made.__dict__, "oracle": mean})

    def distillation(self) -> Case:
        temperature = float(self.rng.uniform(0.5, 4))
        own = nn.KLDivLoss(reduction="batchmean")

        def mean(prediction: Tensor, truth: Tensor) -> Tensor:
            softened = truth ** (1 / temperature)
            softened = softened / softened.sum(1, keepdim=True)
            students = (prediction / temperature).log_softmax(1)
            return own(students, softened) * temperature**2  # type: ignore[no-any-return]

        soft, options = self.floats(CLASSES).softmax(1), {"temperature": temperature}
        return self.built(((CLASSES,),), (soft,), mean, options)

    # -- times that are not all seen
    def cox(self) -> Case:
        ties = "efron" if self.flip() else "breslow"

        def mean(prediction: Tensor, truth: Tensor) -> Tensor:
            time, happened = truth.unbind(1)
            risk = prediction.exp()
            total = prediction.sum() * 0
            for moment in torch.unique(time[happened == 1]):
                dying = (time == moment) & (happened == 1)
                for place in range(int(dying.sum())):
                    gone = place / int(dying.sum()) * risk[dying].sum() if ties == "efron" else 0
                    total = total + (risk[time >= moment].sum() - gone).log()
            return (total - prediction[happened == 1].sum()) / len(prediction)

        return self.timed(self.built(((),), (self.floats(),), mean, {"ties": ties}))

    def hazards(self) -> Case:
        def mean(prediction: Tensor, truth: Tensor) -> Tensor:
            total = prediction.sum() * 0
            for chance, (time, happened) in zip(prediction.sigmoid(), truth, strict=True):
                alive = torch.ones(())
                for then, start, end in zip(chance, (0.0, 2.0), (2.0, 4.0), strict=True):
                    if happened and start < time <= end:
                        total = total - (alive * then).log()
                    elif not happened and start <= time < end:
                        total = total - alive.log()
                    alive = alive * (1 - then)
                total = total - (alive.log() if time > 4 or (time == 4 and not happened) else 0)
            return total / len(prediction)

        made = self.built(((2,),), (self.floats(),), mean, {"times": [2.0, 4.0]})
        return self.timed(made)

    def timed(self, made: Case) -> Case:
        """The case with targets of whole times from 1, many of them equal, and what happened."""
        times = self.rng.integers(1, 7, self.num_rows).astype(float)
        happened = self.rng.integers(2, size=self.num_rows).astype(float)
        fields = Number("time", "double", "target"), Number("happened", "double", "target")
        targets = torch.from_numpy(times), torch.from_numpy(happened)
        return replace(made, fields=fields, targets=targets)

    def multilabel_soft_margin(self) -> Case:
        weight = self.class_weight()
        own = nn.MultiLabelSoftMarginLoss(
            None if weight is None else torch.tensor(weight, dtype=torch.float64)
        )
        target = (self.floats(CLASSES) > 0).double()
        return self.built(((CLASSES,),), (target,), own, {"class_weight": weight})

    def multilabel_margin(self) -> Case:
        target = np.full((self.num_rows, CLASSES), -1)
        for row in target:
            chosen = self.rng.permutation(CLASSES)[: self.rng.integers(CLASSES + 1)]
            row[: len(chosen)] = chosen
        own = nn.MultiLabelMarginLoss()
        return self.built(((CLASSES,),), (torch.from_numpy(target),), own, kind=Labels)

    def multi_margin(self) -> Case:
        weight, p = self.class_weight(), int(self.rng.integers(1, 3))
        own = nn.MultiMarginLoss(
            p, 0.7, None if weight is None else torch.tensor(weight, dtype=torch.float64)
        )
        options = {"class_weight": weight, "p": p, "margin": 0.7}
        return self.built(((CLASSES,),), (self.classes(),), own, options, kind=Labels)

    def soft_margin(self) -> Case:
        shape = self.some()
        return self.built((shape,), (self.signs(*shape),), nn.SoftMarginLoss())

    def kl_div(self) -> Case:
        log_target, per = self.flip(), "batch" if self.flip() else "element"
        target = self.floats(CLASSES).log_softmax(1)
        target = target if log_target else target.exp()

        def mean(prediction: Tensor, truth: Tensor) -> Tensor:
            whole = F.kl_div(prediction, truth, reduction="sum", log_target=log_target)
            return whole / (len(truth) if per == "batch" else truth.numel())

        options = {"log_target": log_target, "per": per}
        return self.built(((CLASSES,),), (target,), mean, options, log_softmax)

    # -- ranking
    def hinge_embedding(self) -> Case:
        shape = self.some()
        own = nn.HingeEmbeddingLoss(margin=1.3)
        return self.built((shape,), (self.signs(*shape),), own, {"margin": 1.3}, squared)

    def cosine_embedding(self) -> Case:
        own = nn.CosineEmbeddingLoss(margin=-0.2)
        return self.built(((5,), (5,)), (self.signs(),), own, {"margin": -0.2})

    def margin_ranking(self) -> Case:
        shape = self.some()
        own = nn.MarginRankingLoss(margin=0.3)
        return self.built((shape, shape), (self.signs(*shape),), own, {"margin": 0.3})

    def triplet_margin(self) -> Case:
        swap = self.flip()
        own = nn.TripletMarginLoss(margin=2.0, p=3.0, swap=swap)
        return self.built(((5,), (5,), (5,)), (), own, {"margin": 2.0, "p": 3.0, "swap": swap})

    def triplet_margin_with_distance(self) -> Case:
        distance = str(self.rng.choice(["euclidean", "cosine", "manhattan"]))
        functions: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
            "euclidean": nn.PairwiseDistance(),
            "cosine": lambda a, b: 1 - F.cosine_similarity(a, b),
            "manhattan": nn.PairwiseDistance(p=1.0),
        }
        own = nn.TripletMarginWithDistanceLoss(distance_function=functions[distance], margin=2.0)
        options = {"distance": distance, "margin": 2.0}
        return self.built(((5,), (5,), (5,)), (), own, options)

    # -- of the whole batch
    def info_nce(self) -> Case:
        symmetric = self.flip()

        def mean(first: Tensor, second: Tensor) -> Tensor:
            cosines = torch.stack([F.cosine_similarity(row, second, dim=1) for row in first]) / 0.5
            each = [cosines[i].logsumexp(0) - cosines[i, i] for i in range(len(first))]
            back = [cosines[:, i].logsumexp(0) - cosines[i, i] for i in range(len(first))]
            chosen = each + back if symmetric else each
            return torch.stack(chosen).mean()

        options = {"temperature": 0.5, "symmetric": symmetric}
        return self.built(((5,), (5,)), (), mean, options)

    def triplet_batch_hard(self) -> Case:
        def mean(embedding: Tensor, label: Tensor) -> Tensor:
            found = [embedding.sum() * 0]
            for i, row in enumerate(embedding):
                far = [(row - e).norm() for j, e in enumerate(embedding)
                       if label[j] == label[i] and i != j]  # fmt: skip
                near = [(row - e).norm() for j, e in enumerate(embedding) if label[j] != label[i]]
                if far and near:
                    found.append((max(far) - min(near) + 2.0).clamp(min=0))
            return sum(found, torch.zeros(())) / max(len(found) - 1, 1)

        return self.built(((5,),), (self.classes(),), mean, {"margin": 2.0}, kind=Labels)

    def supervised_contrastive(self) -> Case:
        def mean(embedding: Tensor, label: Tensor) -> Tensor:
            found = [embedding.sum() * 0]
            for i, row in enumerate(embedding):
                others = [j for j in range(len(label)) if j != i]
                cosines = F.cosine_similarity(row[None], embedding[others], dim=1) / 0.5
                same = [k for k, j in enumerate(others) if label[j] == label[i]]
                if same:
                    found.append(-cosines.log_softmax(0)[same].mean())
            return sum(found, torch.zeros(())) / max(len(found) - 1, 1)

        options = {"temperature": 0.5}
        return self.built(((5,),), (self.classes(),), mean, options, kind=Labels)

    def rmse(self) -> Case:
        shape = self.some()
        return self.built(
            (shape,), (self.floats(*shape),), lambda p, t: ((p - t) ** 2).mean().sqrt()
        )

    def dice(self) -> Case:
        shape = self.some()
        target = (self.floats(*shape) > 0).double()

        def mean(logits: Tensor, truth: Tensor) -> Tensor:
            yes = 1 / (1 + (-logits).exp())
            both = yes.sum() + truth.sum()
            return 1 - (2 * (yes * truth).sum() + 0.3) / (both + 0.3)

        return self.built((shape,), (target,), mean, {"smooth": 0.3})

    # -- sequence
    def ctc(self) -> Case:
        lengths = torch.from_numpy(self.rng.integers(0, 4, self.num_rows))
        tokens = torch.from_numpy(self.rng.integers(0, CLASSES - 1, (self.num_rows, 3)))
        own = nn.CTCLoss(zero_infinity=True)

        def mean(prediction: Tensor, target: Ragged) -> Tensor:
            positions = torch.full((len(target),), prediction.shape[2])
            value: Tensor = own(
                prediction.permute(2, 0, 1), target.values, positions, target.lengths
            )
            return value

        return self.built(
            ((CLASSES, 8),), (Ragged(tokens, lengths),), mean, {"zero_infinity": True},
            log_softmax, Tokens,
        )  # fmt: skip
