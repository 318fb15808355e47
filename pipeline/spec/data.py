"""The spec's `data`: which rows and columns are trained on, and what is made of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    BeforeValidator,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from pipeline.registry import nearest
from pipeline.spec.section import Positive, Section, yaml_text
from pipeline.spec.split import HELD_OUT, HeldOutSplit, Split, way


class SampleWeight(Section):
    """How much each row counts."""

    column: str
    """Column of numbers that are at least 0."""
    mean_over: Literal["weights", "items"] = "weights"
    """What the weighted sum is divided by: the weights' sum, as in a weighted mean, or the number
    of items, as if they were not weighted."""
    in_metrics: bool = False
    """Whether it weights rows in metrics of the validation rows too."""


Scale = Literal["standard", "shared", "min_max", "log", "robust", "none"]


DatePart = Literal["elapsed", "year", "week", "day"]


class Constant(Section):
    """A value in the place of missing ones."""

    constant: float | str
    """Number or text, as the column holds."""


POLICIES = ("error", "drop", "mean", "category")
Missing = Literal["error", "drop", "mean", "category"] | Constant


def _refuse_unknown(where: str, word: Any, known: Sequence[str], more: str = "") -> None:
    """One clear fault for a word that is not known; a union gives one for each of its branches."""
    if word not in known:
        text = "{where}expected {known}{more}; found {word}{nearest}"
        facts = {
            "where": where,
            "known": ", ".join(known),
            "more": more,
            "word": repr(word),
            "nearest": nearest(str(word), known),
        }
        raise PydanticCustomError("policy", text, facts)


class Image(Section):
    """What an encoded image becomes: floats from -1 to 1."""

    size: Annotated[list[Positive], Field(min_length=2, max_length=2)]
    """Height and width in pixels; images of another size are resized."""
    mode: Literal["L", "RGB"] = "RGB"
    """Grey [height, width], or colours [3, height, width]."""


class Stream(Section):
    """How training rows are fetched that are not converted in advance."""

    block_rows: Positive | None = None
    """Rows that are read at a time, best a multiple of the files' row groups, which are read whole.
    Unless given 1,048,576, pyarrow's own row group, or fewer where these exceed 512 MiB."""
    window: Positive = 8
    """Blocks, drawn anew each epoch, whose rows are mixed. Up to three windows are on disk."""


def _as_texts(value: Any) -> Any:
    """A mapping with its values as texts, as YAML writes them."""
    if not isinstance(value, Mapping):
        return value
    return {
        key: yaml_text(one) if isinstance(one, str | bool | int) else one
        for key, one in value.items()
    }


class Sampling(Section):
    """Which rows an epoch draws, in place of each row once."""

    balance: str | None = None
    """Column of classes, target or input: rows of each class are drawn equally often."""
    weights: str | None = None
    """Column of numbers from 0: how often each row is drawn beside the others."""
    rows: Annotated[int, Field(gt=0, le=10**9)] | None = None
    """Rows an epoch draws; unless given, as many as there are training rows."""

    @model_validator(mode="after")
    def _one_way(self) -> Sampling:
        if (self.balance is None) == (self.weights is None):
            raise PydanticCustomError("sampling", "give either `balance` or `weights`, a column")
        return self


class Data(Section):
    """Which rows and columns are trained on."""

    train: str | list[str]
    """Parquet, Arrow IPC or CSV: path, glob, folder, list or URI; or `sample:NAME`.
    Relative paths start at the job spec's folder."""
    validation: str | list[str] | Annotated[float, Field(gt=0, lt=1)] | Split | None = None
    """Validation files, or the fraction of the training rows to hold out; or a mapping:
    `{fraction}` or `{folds, fold}`, with `group` or `stratify`; `{fraction, time}` or
    `{since, time}`."""
    test: str | list[str] | Annotated[float, Field(gt=0, lt=1)] | Split | None = None
    """Rows that are looked at once, with the weights that become the model: files or a split, as in
    `validation`, whose rows are then taken from what is left (by `time`: the latest before)."""
    split_seed: int = 0
    """Chooses which rows a fraction holds out; independent of training.seed."""
    inputs: list[str] | None = None
    """Input columns; unless given, every column that has no other role, except for an index that
    pandas wrote."""
    target: str | list[str] | None = None
    """Target column or columns; none for losses that only compare predictions."""
    positive: Annotated[dict[str, str], BeforeValidator(_as_texts)] = Field(default={})
    """The value that means yes, by target, as `{status: active}`, for losses of yes and no; unless
    given, true, 1, or the second of two texts in the order of the alphabet."""
    stream: Stream | None = None
    """For files larger than this machine's disk: rows are fetched while training, shuffled in two
    levels, which gives another curve than without it. `true`, or `{block_rows, window}`."""
    shift: dict[str, str] = Field(default={})
    """Targets made from list columns, as `{next: tokens}`: at each position, the item after it."""
    categorical: list[str] = Field(default=[])
    """Input columns of integers that are names, not amounts: read through a vocabulary."""
    dates: list[str] | dict[str, list[DatePart]] = Field(default=[])
    """Input columns of dates or times, each with the parts to read: `elapsed` (days since 1970),
    and `year`, `week`, `day` (the position in it, as sine and cosine; `day` is the time of day). A
    list of columns reads all parts."""
    images: dict[str, Image] = Field(default={})
    """Input columns of encoded images (PNG, JPEG, ...), as `{photo: {size: [64, 64]}}`."""
    tokenizers: dict[str, str] = Field(default={})
    """Input columns of text, each with the `tokenizer.json` that turns it into tokens (needs
    `pip install tokenizers`)."""
    missing: Missing | dict[str, Missing] = "error"
    """What to do with missing values and NaN, for all columns or by column: `error`, `drop` (the
    row), `mean` (of the training rows), `category` (a category of its own), or by column
    `{constant: value}`. A target is only filled in if its column is named, since what is filled in
    counts as truth."""
    scale: Scale | dict[str, Scale] = "standard"
    """Numeric inputs, all or by column: `standard` (mean 0 and deviation 1 over the training rows),
    `min_max` (0 to 1), `log` (log(1 + x), then standard), `robust` (median 0 and 1 from the lower
    to the upper quartile) or `none`. Each position of a vector has
    its own statistics; `shared` is `standard` with one mean and deviation for all positions."""
    sample_weight: SampleWeight | None = None
    """Column that weights each row in every loss, or `{column, mean_over, in_metrics}`."""
    sampling: Sampling | None = None
    """Rows drawn more or less often, as `{balance: COLUMN}` or `{weights: COLUMN}`: an epoch has
    each row as often as its share says, rounded up or down; validation and test each row once."""
    exposure: str | None = None
    """Column of numbers above 0 that counts grow in proportion to, as years insured: it multiplies
    the rate that losses of counts predict, in training and when served."""
    target_scale: Scale | dict[str, Scale] = "none"
    """As `scale`, for numeric targets, all or by column. Losses and their options are in the
    scaled unit, metrics and served predictions in the column's own."""

    @field_validator("train", "validation", "test", "inputs", "target", "categorical", "dates")
    @classmethod
    def _distinct(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, list):
            if not value and info.field_name not in ("categorical", "dates"):
                raise PydanticCustomError("empty", "an empty list")
            twice = {item for item in value if value.count(item) > 1}
            if twice:
                raise PydanticCustomError("twice", "{items} twice", {"items": sorted(twice)})
        return value

    @field_validator("sample_weight", mode="before")
    @classmethod
    def _column(cls, value: Any) -> Any:
        return {"column": value} if isinstance(value, str) else value

    @field_validator("stream", mode="before")
    @classmethod
    def _with_defaults(cls, value: Any) -> Any:
        if isinstance(value, bool):
            return {} if value else None
        if not (value is None or isinstance(value, Mapping | Stream)):
            text = "expected true, false or {known}; found {value}"
            facts = {"known": "{block_rows, window}", "value": repr(value)}
            raise PydanticCustomError("policy", text, facts)
        return value

    @field_validator("missing", mode="before")
    @classmethod
    def _known_policies(cls, value: Any) -> Any:
        if not isinstance(value, Mapping):
            _refuse_unknown("", value, POLICIES, " (a constant goes by column)")
            return value
        for column, policy in value.items():
            is_constant = isinstance(policy, Mapping) and set(policy) == {"constant"}
            if not (is_constant or isinstance(policy, Constant)):
                _refuse_unknown(f"{column}: ", policy, POLICIES, " or {constant: value}")
            number = policy["constant"] if is_constant else 0.0
            if isinstance(number, float) and not math.isfinite(number):
                text = "{column}: a constant is a finite number or a text, found {found}"
                raise PydanticCustomError("policy", text, {"column": column, "found": str(number)})
        return value

    @field_validator("scale", "target_scale", mode="before")
    @classmethod
    def _known_scales(cls, value: Any, info: ValidationInfo) -> Any:
        known = get_args(Scale)
        by_column = value.items() if isinstance(value, Mapping) else [("", value)]
        for column, scale in by_column:
            _refuse_unknown(f"{column}: " if column else "", scale, known)
        return value

    @field_validator("dates", "categorical", mode="before")
    @classmethod
    def _columns(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, str):
            raise PydanticCustomError("policy", "expected a list of columns: [{v}]", {"v": value})
        if info.field_name == "dates" and isinstance(value, Mapping):
            for column, parts in value.items():
                for part in parts if isinstance(parts, list) else [parts]:
                    _refuse_unknown(f"{column}: ", part, get_args(DatePart), " in a list")
        return value

    @field_validator("validation", "test", mode="before")
    @classmethod
    def _files_or_fraction(cls, value: Any) -> Any:
        if isinstance(value, Mapping):
            try:
                return Split.model_validate(value)
            except ValidationError as error:
                first = error.errors(include_url=False)[0]
                key = ".".join(map(str, first["loc"]))
                known = list(Split.model_fields)
                text = first["msg"]
                if first["type"] == "extra_forbidden":
                    text = f"unknown key{nearest(key, known)} (allowed: {', '.join(known)})"
                text = f"{key}: {text}" if key else text
                raise PydanticCustomError("policy", "{text}", {"text": text}) from None
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if is_number and not 0 < value < 1:
            text = "expected files, or a fraction of the training rows between 0 and 1; found {v}"
            raise PydanticCustomError("fraction", text, {"v": value})
        return value

    @model_validator(mode="after")
    def _apart(self) -> Data:
        both = sorted(set(self.inputs or []) & set(self.targets))
        if both:
            raise PydanticCustomError(
                "leak", "{columns}: both input and target", {"columns": ", ".join(both)}
            )
        for weight, key in self.weight_columns.items():
            if weight in (*(self.inputs or []), *self.targets):
                text = "{column}: {key} cannot be input or target too"
                raise PydanticCustomError("leak", text, {"column": weight, "key": key})
        weights = [
            self.sampling and self.sampling.weights,
            self.sample_weight and self.sample_weight.column,
        ]
        if self.exposure is not None and self.exposure in weights:
            text = "{column}: is data.exposure, so it cannot be a weight too"
            raise PydanticCustomError("leak", text, {"column": self.exposure})
        return self

    @model_validator(mode="after")
    def _rows_left(self) -> Data:
        ways = [way(self.validation), way(self.test)]
        if ways[0] is not None and ways[1] is not None and ways[0][0] == ways[1][0]:
            share = ways[0][1] + ways[1][1]
            if share >= 1:
                text = "`validation` and `test` together take {share} of the rows: none are left"
                raise PydanticCustomError("split", text, {"share": f"{share:g}"})
        return self

    def held_out(self, split: HeldOutSplit) -> str | list[str] | float | Split | None:
        """What the spec says of the rows for `validation` or `test`."""
        return self.validation if split == "validation" else self.test

    @property
    def split_columns(self) -> dict[str, str]:
        """Columns that rows are held out by, each with the first key that says so."""
        columns: dict[str, str] = {}
        for split in HELD_OUT:
            asked = self.held_out(split)
            if isinstance(asked, Split) and asked.column:
                columns.setdefault(asked.column, f"data.{split}")
        return columns

    @property
    def weight_columns(self) -> dict[str, str]:
        """Columns of numbers beside inputs and targets, each with the key that names it."""
        named = {
            "data.exposure": self.exposure,
            "data.sampling.weights": self.sampling and self.sampling.weights,
            "data.sample_weight": self.sample_weight and self.sample_weight.column,
        }
        return {column: key for key, column in named.items() if column}

    @property
    def targets(self) -> list[str]:
        """Target columns as a list, empty without a target."""
        return [self.target] if isinstance(self.target, str) else (self.target or [])

    @property
    def weighs_metrics(self) -> bool:
        """Whether rows have weights that metrics take too."""
        return self.sample_weight is not None and self.sample_weight.in_metrics

    def missing_in(self, column: str) -> Missing:
        """What happens to missing values of the column."""
        return self.missing.get(column, "error") if isinstance(self.missing, dict) else self.missing

    def parts_of(self, column: str) -> list[DatePart]:
        """What is taken of a column of dates."""
        everything: list[DatePart] = ["elapsed", "year", "week", "day"]
        return everything if isinstance(self.dates, list) else self.dates[column]

    def target_scale_of(self, column: str) -> Scale:
        """How the numeric target column is scaled."""
        scale = self.target_scale
        return scale.get(column, "none") if isinstance(scale, dict) else scale

    def scale_of(self, column: str) -> Scale:
        """How the numeric input column is scaled."""
        return self.scale.get(column, "standard") if isinstance(self.scale, dict) else self.scale
