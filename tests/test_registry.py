"""Names and options of components."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from pipeline.errors import UsageError
from pipeline.registry import Registry, nearest


def registry() -> Registry[Callable[..., Any]]:
    return Registry("loss", "pipeline.losses")


def quantile(prediction: float, *, level: float = 0.5, name: str | None = None) -> None:
    """Pinball loss.

    More about it.
    """


def test_options_are_the_keyword_only_parameters() -> None:
    losses = registry()
    losses.register("quantile")(quantile)
    entry = losses["quantile"]
    assert entry.doc == "Pinball loss."
    assert entry.place.startswith(f"{__file__}:")
    assert entry.options.model_validate({"level": "0.25"}).model_dump() == {
        "level": 0.25, "name": None,
    }  # fmt: skip
    for wrong in ({"levle": 1}, {"level": "high"}, {"level": float("nan")}, {"prediction": 1.0}):
        with pytest.raises(ValueError, match="1 validation error"):
            entry.options.model_validate(wrong)


def test_a_name_is_given_once_but_a_module_may_be_loaded_again() -> None:
    losses = registry()
    losses.register("quantile")(quantile)
    losses.register("quantile")(quantile)
    with pytest.raises(UsageError, match=r"loss 'quantile' is registered twice: .* and "):
        losses.register("quantile")(registry)


def test_the_nearest_name_is_asked_for() -> None:
    known = ["mse", "cross_entropy", "huber"]
    assert nearest("cros_entropy", known) == "; did you mean 'cross_entropy'?"
    assert nearest("MSELoss", known) == "; did you mean 'mse'?"
    assert nearest("mse_loss", known) == "; did you mean 'mse'?"
    assert nearest("perplexity", known) == ""
