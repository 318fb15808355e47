"""From files to records: what validation rows must not be seen for, and errors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.feather
import pytest
from torch import Tensor

from pipeline.errors import DataError
from pipeline.spec.data import Data
from tests.data.tables import read, write


def test_preprocessing_does_not_see_the_validation_rows(tmp_path: Path) -> None:
    write(tmp_path, pa.table({"x": [0.0, 2.0], "y": [0.0, 1.0]}), "train.parquet")
    write(tmp_path, pa.table({"x": [100.0], "y": [0.0]}), "held.parquet")
    found = read(Data(train="train.parquet", validation="held.parquet", target="y"), tmp_path)
    assert (found.fields[0].mean, found.fields[0].deviation) == (1.0, 1.0)
    assert found.validation is not None
    held = found.validation.gather(np.arange(1))["x"]
    assert isinstance(held, Tensor)
    assert held.tolist() == [99.0]


def test_a_secret_in_a_uri_is_not_repeated(tmp_path: Path) -> None:
    with pytest.raises(DataError) as raised:
        read(Data(train="nope://user:hunter2@host/x.csv?key=hunter3", target="y"), tmp_path)
    assert "hunter" not in str(raised.value)
    assert "host/x.csv" in str(raised.value)
