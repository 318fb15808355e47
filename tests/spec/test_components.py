"""Components of the spec: a name, or a name with options."""

from __future__ import annotations

import pytest

from pipeline import registry
from pipeline.spec import flat
from pipeline.spec.loader import load
from tests.conftest import MINIMAL, built_in


def test_a_loss_can_be_a_name_or_a_mapping_or_a_list() -> None:
    by_name = load(MINIMAL | {"loss": "mse"})
    assert by_name == load(MINIMAL | {"loss": {"name": "mse"}})
    assert by_name == load(MINIMAL | {"loss": [{"name": "mse", "weight": 1.0}]})


def test_options_get_their_defaults_so_that_the_record_is_complete() -> None:
    recorded = flat(load(MINIMAL | {"loss": "huber"}))
    assert recorded["loss.0.delta"] == 1.0
    assert recorded["optimizer.name"] == "adamw"
    assert recorded["training.seed"] == 0


@pytest.mark.parametrize("kind", registry.REGISTRIES)
def test_every_entry_has_a_doc_line_and_typed_options(kind: str) -> None:
    for name in built_in(kind):
        entry = registry.REGISTRIES[kind][name]
        assert entry.doc.endswith("."), name
        assert entry.options.model_json_schema()["additionalProperties"] is False
