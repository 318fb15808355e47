"""The model's description: what it takes, what it gives, how good it is, and what it cannot do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.data.columns import Field, from_json
from pipeline.report.facts import losses
from pipeline.rundir.records import DataFacts, Record, Scores

MAX_COLUMNS = 50
MAX_VALUES = 8


def card(
    record: Record, step: int, scores: Mapping[str, Scores | None], outputs: Sequence[str]
) -> str:
    """Markdown on the model with the weights after `step` steps.

    `scores` are those of each split that it was judged by, `outputs` the columns that it gives.
    """
    data = record.data
    fields = [from_json(field) for field in record.fields]
    inputs = [field for field in fields if field.is_read]
    targets = [field for field in fields if field.is_target]
    rows = ", ".join(f"{count:,} for {split}" for split, count in data.rows.items() if count)
    files = ", ".join(f"`{path}`" for path in data.files[:3])
    more = f" and {data.num_files - 3} more" if data.num_files > 3 else ""
    parts = [
        f"**{record.params['model.name']}** trained with {' + '.join(losses(record.params))} for "
        f"{step:,} steps, by run `{record.name}`.",
        *(_quality(split, of) for split, of in scores.items() if of is not None),
        "\n".join(["| predicts | type | training rows held |", "|---|---|---|",
                   *_rows(targets, data)]) if targets else "",
        f"It gives: {', '.join(f'`{_cell(name)}`' for name in outputs)}.",
        "\n".join(["| input | type | training rows held |", "|---|---|---|", *_rows(inputs, data)]),
        f"Rows: {rows}, from {files}{more}; fingerprint `{data.fingerprint[:16]}`.",
        "\n".join(["Limits:", *(f"- {text}" for text in _limits(inputs))]),
    ]  # fmt: skip
    return "\n\n".join(part for part in parts if part)


def _rows(fields: list[Field], data: DataFacts) -> list[str]:
    shown = [_row(one, data.profile.get(one.name, {})) for one in fields[:MAX_COLUMNS]]
    left = len(fields) - MAX_COLUMNS
    return [*shown, f"| {left} more | | |"] if left > 0 else shown


def _row(field: Field, profile: Mapping[str, Any]) -> str:
    missing = ", may be missing" if field.is_read and field.is_optional else ""
    return f"| {_cell(field.name)} | {field.arrow_type}{missing} | {_held(field, profile)} |"


def _cell(value: Any) -> str:
    """Text that stays in its cell."""
    return str(value).replace("|", "\\|").replace("\n", " ")


def _held(field: Field, profile: Mapping[str, Any]) -> str:
    """The range or the values that the training rows have."""
    if field.vocabulary:
        values = [_cell(value) for value in field.vocabulary]
        more = f", ... ({len(values)} values)" if len(values) > MAX_VALUES else ""
        return f"{', '.join(values[:MAX_VALUES])}{more}"
    low, high = profile.get("min"), profile.get("max")
    if isinstance(low, int | float) and isinstance(high, int | float):
        return f"{low:.6g} to {high:.6g}"
    return f"{low} to {high}" if low is not None and high is not None else ""


def _quality(split: str, scores: Scores) -> str:
    if not scores.metrics:
        return f"There were no {split} rows: they say nothing of how good it is."
    lines = [f"| {split} | value | a constant prediction |", "|---|---|---|"]
    for name, value in scores.metrics.items():
        constant = scores.baselines.get(name)
        cells = ["-" if one is None else f"{one:.4g}" for one in (value, constant)]
        lines.append(f"| {name} | {cells[0]} | {cells[1] if constant is not None else ''} |")
    return "\n".join(lines)


def _limits(inputs: list[Field]) -> list[str]:
    """What whoever uses the model should know."""
    texts = ["Outside of the ranges above it has seen nothing, and says so nowhere."]
    if any(field.vocabulary for field in inputs):
        texts.append("Classes of an input that are not above are all read as one: unknown.")
    if not all(field.is_optional for field in inputs):
        texts.append("A missing value is refused where the table does not say that it may be.")
    return texts
