"""Columns of encoded images."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

import pipeline
from pipeline.errors import DataError
from tests.data.tables import people, values_of


def png(value: int, size: tuple[int, int] = (6, 4)) -> bytes:
    content = io.BytesIO()
    Image.new("RGB", size, (value, 0, 255)).save(content, "PNG")
    return content.getvalue()


def test_images_are_decoded_by_the_feed(tmp_path: Path) -> None:
    table = pa.table({"photo": [png(0), png(255, (12, 8))], "y": [0.0, 1.0]})
    images: Any = {"photo": {"size": [4, 6]}}
    found = people(tmp_path, table, images=images)
    made = values_of(found, "photo")
    assert made.shape == (2, 3, 4, 6)
    assert made[0, :, 0, 0].tolist() == [-1, -1, 1]
    assert made[1, :, 3, 5].tolist() == [1, -1, 1], "twice the size, made smaller"
    grey = values_of(
        people(tmp_path, table, images={"photo": {"size": [4, 6], "mode": "L"}}), "photo"
    )
    assert grey.shape == (2, 4, 6)
    broken = pa.table({"photo": [png(0), b"no image"], "y": [0.0, 1.0]})
    with pytest.raises(DataError, match=r"'photo' has no readable image in 1 row, first at row 1"):
        people(tmp_path, broken, images=images)


@pytest.mark.processes
def test_a_cnn_reads_encoded_images(tmp_path: Path) -> None:
    photos = [png(40 * (i % 6), (8, 8)) for i in range(24)]
    table = pa.table({"photo": photos, "y": [float(i % 6) for i in range(24)]})
    pq.write_table(table, tmp_path / "rows.parquet")
    result = pipeline.run(
        {
            "name": "photos",
            "data": {"train": str(tmp_path / "rows.parquet"), "target": "y",
                     "images": {"photo": {"size": [8, 8]}}},
            "model": {"name": "cnn", "channels": [4], "hidden": 8}, "loss": "mse",
            "optimizer": {"name": "adam", "lr": 0.01},
            "training": {"epochs": 30, "batch_size": 8}, "storage": str(tmp_path / "runs"),
        }
    )  # fmt: skip
    assert result.losses[0] is not None
    assert result.losses[-1] is not None
    assert result.losses[-1] < result.losses[0] / 2
    said = result.model.predict(pd.DataFrame({"photo": photos[:6]}))["y"]
    assert said.is_monotonic_increasing
