"""What all kinds of columns share."""

from __future__ import annotations

from pipeline.data.columns import from_json
from tests.data.tables import fitted


def test_fields_travel_as_json() -> None:
    fields, _ = fitted(["amount", "color", "grid", "words"])
    for field in fields.values():
        assert from_json(field.to_json()) == field
