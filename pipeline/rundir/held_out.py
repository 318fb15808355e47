"""`held_out.npz`: what the trained weights predict for validation rows, beside what is true."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from pipeline.data.origins import Origins
from pipeline.files.atomic import replacing
from pipeline.rundir.records import Numbers

META = "meta"
ARRAYS = ("prediction", "truth", "weight", "row")


@dataclass(frozen=True)
class TermPredictions:
    """Predictions of one loss term, for N items."""

    label: str
    task: Literal["classes", "binary", "values"]
    are_probabilities: bool
    """Or scores, or amounts."""
    names: list[str]
    """Of the classes [C]; of each column of the predictions for amounts and answers."""
    answers: list[tuple[str, str]]
    """What each target column of `binary` calls no and yes."""
    prediction: NDArray[Any]
    """For `classes` [N, C]; for `binary` [N] or [N, K]; for `values` [N, columns]."""
    truth: NDArray[Any]
    """Class numbers [N]; booleans, or amounts, of the prediction's shape."""
    weight: NDArray[np.float64]
    """How much each item counts in metrics: of the truth's shape."""
    row: NDArray[np.int64]
    """Index among the validation rows: of the truth's shape."""
    thresholds: tuple[float, ...] = ()
    """Above which each column of `binary` is taken for yes; a half of a probability, 0 of a score
    unless given."""

    @property
    def decided_by(self) -> NDArray[np.float64]:
        """The threshold of each column of `binary`: [K]."""
        usual = 0.5 if self.are_probabilities else 0.0
        return np.array(self.thresholds or [usual] * len(self.names))


@dataclass(frozen=True)
class HeldOut:
    """The predictions of one evaluation."""

    step: int
    num_rows: int
    """Validation rows."""
    is_sample: bool
    """Whether only some of them are here."""
    terms: list[TermPredictions]
    rows: NDArray[np.int64]
    """Indices of the validation rows that are here, in order: [R]."""
    origins: Origins
    """Where these stand in their files."""

    def find(self, row: int) -> tuple[str, int]:
        """File of a validation row that is here, and its index in it."""
        return self.origins.find(int(np.searchsorted(self.rows, row)))

    def decided(self, decision: Numbers) -> HeldOut:
        """The same with the thresholds that were chosen afterwards, by `threshold/COLUMN`."""
        terms = []
        for term in self.terms:
            thresholds = list(term.decided_by)
            for place, name in enumerate(term.names):
                keys = (f"threshold/{term.label}/{name}", f"threshold/{name}")
                chosen = next((n for k in keys if (n := decision.get(k)) is not None), None)
                if term.task == "binary" and chosen is not None:
                    thresholds[place] = chosen
            terms.append(replace(term, thresholds=tuple(thresholds)))
        return replace(self, terms=terms)

    def write(self, path: Path, check: Callable[[], None] = lambda: None) -> None:
        """The file as a whole, or not at all."""
        terms = [
            {"label": t.label, "task": t.task, "are_probabilities": t.are_probabilities,
             "names": t.names, "answers": t.answers, "thresholds": t.thresholds}
            for t in self.terms
        ]  # fmt: skip
        meta = {
            "step": self.step,
            "num_rows": self.num_rows,
            "is_sample": self.is_sample,
            "terms": terms,
            "paths": self.origins.paths,
        }
        arrays: Any = {
            f"{name}-{index}": getattr(term, name)
            for index, term in enumerate(self.terms)
            for name in ARRAYS
        }
        arrays |= {
            META: np.array(json.dumps(meta)),
            "rows": self.rows,
            "index": self.origins.index,
            "starts": self.origins.starts,
        }
        with replacing(path, check) as file:
            np.savez_compressed(file, **arrays)

    @classmethod
    def read(cls, path: Path) -> HeldOut:
        """Raises OSError without a file, ValueError for one that is damaged."""
        try:
            with np.load(path, allow_pickle=False) as arrays:
                meta = json.loads(str(arrays[META]))
                terms = [
                    TermPredictions(**facts, **{name: arrays[f"{name}-{i}"] for name in ARRAYS})
                    for i, facts in enumerate(meta["terms"])
                ]
                origins = Origins(arrays["index"], arrays["starts"], meta["paths"])
                facts = (meta["step"], meta["num_rows"], meta["is_sample"])
                return cls(*facts, terms, arrays["rows"], origins)
        except OSError:
            raise
        except Exception as error:  # a damaged archive fails in many ways
            raise ValueError(f"{path} is damaged: {error}") from error
