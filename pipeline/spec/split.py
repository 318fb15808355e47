"""Rows held out of the training files: how the spec says which."""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from pipeline.spec.section import Positive, Section

HeldOutSplit = Literal["validation", "test"]
HELD_OUT: tuple[HeldOutSplit, ...] = get_args(HeldOutSplit)


class Split(Section):
    """Rows held out of the training files: drawn row by row or in groups, or by time."""

    fraction: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Fraction of the rows to hold out: about so many, as each row, or each `group`, is drawn by
    itself; as near as equal times allow with `time`; with `stratify` so many of each class, up to
    one row."""
    folds: Annotated[int, Field(ge=2)] | None = None
    """In place of `fraction`: into how many parts the rows are cut, of which one is held out."""
    fold: Positive | None = None
    """Which of the `folds` is held out, from 1; `pipeline run --folds` sets both for the validation
    rows."""
    group: str | None = None
    """Column whose rows with the same value stay together, such as all visits of a patient."""
    stratify: str | None = None
    """Column of classes: of each the same share is held out, up to one row; equal rows stay
    together. Unlike other splits, added rows can move rows from one side to the other."""
    time: str | None = None
    """Column of dates, times or numbers: the latest rows are held out."""
    since: float | str | None = None
    """With `time`: the first date, time or number that is held out."""

    @model_validator(mode="after")
    def _one_way(self) -> Split:
        columns = [name for name in ("group", "stratify", "time") if getattr(self, name)]
        if len(columns) > 1:
            text = "give one of {columns}, the column to split by"
            raise PydanticCustomError("split", text, {"columns": " and ".join(columns)})
        sizes = [name for name in ("fraction", "folds", "since") if getattr(self, name) is not None]
        if len(sizes) != 1:
            text = "give either `fraction` or `folds`, or with `time` its `since`"
            raise PydanticCustomError("split", text)
        if self.since is not None and self.time is None:
            raise PydanticCustomError("split", "`since` goes with `time`")
        if self.folds is not None and self.time is not None:
            raise PydanticCustomError("split", "`folds` do not go with `time`")
        if (self.fold is None) != (self.folds is None):
            raise PydanticCustomError("split", "`fold` and `folds` go together")
        if self.fold and self.folds and self.fold > self.folds:
            facts = {"fold": self.fold, "folds": self.folds}
            raise PydanticCustomError("split", "`fold` is {fold}, of only {folds} `folds`", facts)
        return self

    @property
    def column(self) -> str:
        """The column that decides; empty for rows that are drawn by themselves."""
        return self.group or self.stratify or self.time or ""

    @property
    def shown(self) -> str:
        """Which rows, in words."""
        if self.folds:
            return f"fold {self.fold} of {self.folds}"
        size = f"the rows since {self.since}" if self.since is not None else f"{self.fraction}"
        return f"{size} by {self.column}" if self.column else size

    @property
    def share(self) -> float | None:
        """Of the rows to hold out; None for a split by time that says since when."""
        return self.fraction if self.folds is None else 1 / self.folds


def way(asked: str | list[str] | float | Split | None) -> tuple[tuple[str, str], float] | None:
    """What a share of the rows is drawn by, and that share."""
    if isinstance(asked, float):
        return ("rows", ""), asked
    if isinstance(asked, Split) and asked.share is not None:
        kinds = ("group", "stratify", "time")
        kind = next((name for name in kinds if getattr(asked, name)), "rows")
        kind += " in folds" * (asked.folds is not None)
        return (kind, asked.column), asked.share
    return None
