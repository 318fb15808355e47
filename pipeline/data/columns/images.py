"""Columns of encoded images (PNG, JPEG, ...), stored as they are and decoded for each batch."""

from __future__ import annotations

import io
from collections import Counter
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from pipeline.data.arrow import plain
from pipeline.data.batch import Column
from pipeline.data.columns.base import (
    ColumnError,
    Encoded,
    Field,
    FloatType,
    Lists,
    Profile,
    Statistics,
    refuse_rows,
)
from pipeline.spec.data import Scale


@dataclass(frozen=True)
class Image(Field):
    """Pixels from -1 to 1: float32 [N, H, W], or [N, 3, H, W] of colours."""

    kind: ClassVar[str] = "image"
    is_list: ClassVar[bool] = True

    def dtype(self, float_dtype: FloatType) -> np.dtype[Any]:
        return np.dtype(np.uint8)

    def statistics(self, scale: Scale = "none", unless_binary: bool = False) -> Statistics:
        return ImageStatistics(self)

    def encode(self, column: Any, dtype: np.dtype[Any]) -> Encoded:
        binary = column.cast(pa.large_binary())
        _, offsets, values = binary.buffers()
        ends = np.frombuffer(offsets, np.int64)[binary.offset : binary.offset + len(binary) + 1]
        content = np.frombuffer(values, dtype) if values is not None else np.zeros(0, dtype)
        return Lists(content[ends[0] : ends[-1]], np.diff(ends))

    def gather(
        self, values: NDArray[Any], starts: NDArray[np.int64], lengths: NDArray[np.int64]
    ) -> Column:
        batch = torch.empty(len(starts), *self.shape)
        for row, (start, length) in enumerate(zip(starts, lengths, strict=True)):
            try:
                batch[row] = torch.from_numpy(self.decode(values[start : start + length]))
            except ValueError as error:
                raise ColumnError(str(error), rows=np.arange(len(starts)) == row) from None
        return batch

    def decode(self, content: NDArray[np.uint8]) -> NDArray[np.float32]:
        """One image [*shape]. Raises ValueError for bytes that are not an image."""
        from PIL import Image as Pillow

        is_grey = len(self.shape) == 2
        height, width = self.shape[-2:]
        try:
            with Pillow.open(io.BytesIO(content.tobytes())) as opened:
                image = opened.convert("L" if is_grey else "RGB")
        except (OSError, SyntaxError, Pillow.DecompressionBombError) as error:
            raise ValueError(f"holds an image that cannot be read ({error})") from None
        if image.size != (width, height):
            image = image.resize((width, height), Pillow.Resampling.BILINEAR)
        pixels = np.asarray(image, np.float32) / np.float32(127.5) - np.float32(1)
        return pixels if is_grey else np.ascontiguousarray(pixels.transpose(2, 0, 1))


class ImageStatistics(Statistics):
    """How many images have each size and mode; only headers are read."""

    def __init__(self, field: Image) -> None:
        super().__init__(field)
        self.sizes: Counter[str] = Counter()

    def observe(self, column: Any) -> None:
        from PIL import Image as Pillow

        for row, content in enumerate(plain(column)):
            try:
                with Pillow.open(io.BytesIO(content.as_py())) as image:
                    size = f"{image.height} x {image.width}"
                    mode = image.mode
            except (OSError, SyntaxError, Pillow.DecompressionBombError):
                fix = "expected PNG, JPEG or another format that Pillow reads"
                refuse_rows(np.arange(len(column)) == row, "no readable image", fix)
                continue
            if mode[0] in "IF":
                problem = f"holds an image of mode {mode}; expected 8 bits for each colour"
                raise ColumnError(problem, rows=np.arange(len(column)) == row)
            self.sizes[f"{size} {mode}"] += 1

    def fit(self) -> Field:
        return self.field

    def profile(self) -> Profile:
        return {"count": self.sizes.total(), "sizes": dict(self.sizes.most_common(20))}
