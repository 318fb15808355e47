"""Columns of tokens: padded lists, shifted targets, text and its tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.feather
import pytest

from pipeline.data.batch import Ragged
from pipeline.data.bind import fit_table as fit
from pipeline.data.columns import Reading
from pipeline.errors import DataError
from pipeline.spec.data import Data
from tests.data.tables import MIXED, batch_of, dataset_of, fitted, people


def test_lists_become_padded_batches_with_lengths() -> None:
    fields, _ = fitted(["tokens", "words", "series"], scale="none")
    batch = dataset_of(list(fields.values()), MIXED).gather(np.array([3, 0, 2]))
    tokens = batch["tokens"]
    assert isinstance(tokens, Ragged)
    assert tokens.values.tolist() == [[5, 6, 0], [1, 2, 3], [0, 0, 0]]
    assert tokens.lengths.tolist() == [2, 3, 0]
    assert tokens.mask.tolist() == [[True, True, False], [True] * 3, [False] * 3]
    assert fields["tokens"].num_codes == 7
    assert fields["words"].vocabulary == ("a", "b", "c")
    series = batch["series"]
    assert isinstance(series, Ragged)
    assert series.values.tolist() == [[3.0], [0.5], [0.0]]


def test_a_shifted_target_is_the_next_item() -> None:
    data = Data(train="x", inputs=["tokens"], target="next", shift={"next": "tokens"})
    fields = fit(data, MIXED, {"next": Reading(as_classes=True, ignored=-100)})
    lists = batch_of(fields, MIXED, data.shift)["next"]
    assert isinstance(lists, Ragged)
    assert lists.padded(-100).tolist() == [[2, 3], [-100, -100], [-100, -100], [6, -100]]


def test_only_lists_of_tokens_can_be_shifted() -> None:
    """Others would be compared with themselves."""
    data = Data(train="x", inputs=["series"], target="next", shift={"next": "series"})
    with pytest.raises(DataError, match="lists of tokens can be shifted"):
        fit(data, MIXED, {"next": Reading()})


def test_text_goes_through_a_tokenizer_file(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    words = tokenizers.models.WordLevel({"[UNK]": 0, "a": 1, "b": 2}, unk_token="[UNK]")
    made = tokenizers.Tokenizer(words)
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.save(str(tmp_path / "tokenizer.json"))
    table = pa.table({"text": ["a b", "c", "b b a"], "y": [0.0, 1.0, 2.0]})
    found = people(tmp_path, table, tokenizers={"text": "tokenizer.json"})
    tokens: Any = found.train.gather(np.arange(3))["text"]
    assert tokens.values.tolist() == [[1, 2, 0], [0, 0, 0], [2, 2, 1]]
    assert tokens.lengths.tolist() == [2, 1, 3]
    assert found.fields[0].num_codes == 3
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match=r"not a tokenizer\.json"):
        people(tmp_path, table, tokenizers={"text": "tokenizer.json"})
