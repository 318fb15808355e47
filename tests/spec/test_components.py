"""Components of the spec: a name, or a name with options."""

from __future__ import annotations

import jsonschema
import pytest
from pydantic import BaseModel

from pipeline import registry
from pipeline.spec import flat, schema
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


class Margin(BaseModel):
    """An option that is a mapping."""

    low: float = 0.0


def test_options_may_be_mappings_of_the_users_own_and_are_in_the_schema(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def banded(*, margin: Margin = Margin()) -> None:  # noqa: B008
        """A loss with an option that is a mapping."""

    monkeypatch.setitem(registry.losses.entries, "banded", registry.Entry("banded", "loss", banded))
    described = schema()
    jsonschema.Draft202012Validator.check_schema(described)
    validator = jsonschema.Draft202012Validator(described)
    spec = MINIMAL | {"loss": {"name": "banded", "margin": {"low": 0.5}}}
    assert validator.is_valid(spec)
    spec = MINIMAL | {"loss": {"name": "banded", "margin": {"low": "much"}}}
    assert not validator.is_valid(spec)
    assert load(MINIMAL | {"loss": {"name": "banded"}}).loss[0].options == {"margin": {"low": 0.0}}
