"""Columns of tokens: lists of class numbers or words, and text that a tokenizer cuts."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.data.arrow import flat
from pipeline.data.batch import Column
from pipeline.data.columns.base import Encoded, Field, Lists, Profile, Statistics
from pipeline.data.columns.categories import (
    ClassNumberStatistics,
    Distinct,
    class_numbers,
    codes_in_vocabulary,
)
from pipeline.data.columns.numbers import padded
from pipeline.errors import DataError
from pipeline.spec.data import Scale


@dataclass(frozen=True)
class Tokens(Field):
    """Lists of tokens: ragged int64."""

    num_classes: int = 0
    """Tokens that there are, or class numbers, counted from 0."""
    vocabulary: tuple[Any, ...] | None = None
    """The words, where tokens are text; None for class numbers."""
    ignored: int | None = None
    """A raw class number that marks items to skip; encoded as IGNORED, it is not a class."""

    kind: ClassVar[str] = "tokens"
    is_list: ClassVar[bool] = True

    @property
    def num_codes(self) -> int:
        """How many tokens there are, the unknown one included."""
        return self.num_classes

    def statistics(self, scale: Scale = "none", unless_binary: bool = False) -> Statistics:
        if self.vocabulary is None:
            return ClassNumberStatistics(self, self.ignored)
        return WordStatistics(self)

    def encode(self, column: Any, dtype: np.dtype[Any]) -> Encoded:
        values, offsets = flat(column)
        if self.vocabulary is None:
            codes = class_numbers(values, self.num_classes, self.ignored)
        else:
            codes = codes_in_vocabulary(self, values, self.ignored)
        return Lists(codes.astype(dtype), np.diff(offsets))

    def gather(
        self, values: NDArray[Any], starts: NDArray[np.int64], lengths: NDArray[np.int64]
    ) -> Column:
        return padded(values, starts, lengths, np.dtype(np.int64))

    @property
    def empty_type(self) -> pa.DataType:
        return pa.list_(pa.array(self.vocabulary or [0]).type)


@dataclass(frozen=True)
class Text(Tokens):
    """Text that a tokenizer makes tokens of: ragged int64."""

    tokenizer: str = ""
    """Content of its `tokenizer.json`."""

    @classmethod
    def from_file(cls, name: str, arrow_type: str, path: Path) -> Text:
        """The column whose tokenizer is in a file. Raises DataError if that is none."""
        where = f"data.tokenizers.{name}: {path}"
        try:
            content = path.read_text(encoding="utf-8")
            vocabulary = tokenizer_of(content).get_vocab()
        except OSError as error:
            raise DataError(f"{where} cannot be read: {error.strerror}") from None
        except ValueError as error:
            raise DataError(f"{where} is not a tokenizer.json: {error}") from None
        num_tokens = max(vocabulary.values(), default=0) + 1
        return cls(name, arrow_type, num_classes=num_tokens, tokenizer=content)

    def statistics(self, scale: Scale = "none", unless_binary: bool = False) -> Statistics:
        return Field.statistics(self)

    def encode(self, column: Any, dtype: np.dtype[Any]) -> Encoded:
        encodings = tokenizer_of(self.tokenizer).encode_batch(column.to_pylist())
        lengths = np.array([len(encoding.ids) for encoding in encodings], np.int64)
        tokens = [token for encoding in encodings for token in encoding.ids]
        return Lists(np.array(tokens, dtype), lengths)


class WordStatistics(Statistics):
    """The words of tokens that are text."""

    field: Tokens

    def __init__(self, field: Tokens) -> None:
        super().__init__(field)
        self.distinct = Distinct()

    def observe(self, column: Any) -> None:
        self.distinct.add(flat(column)[0])

    def fit(self) -> Field:
        words = self.distinct.sorted_without(self.field.ignored)
        num_classes = len(words) + (0 if self.field.is_target else 1)
        return replace(self.field, vocabulary=words, num_classes=num_classes)

    def profile(self) -> Profile:
        return self.distinct.profile()


@lru_cache(maxsize=4)
def tokenizer_of(content: str) -> Any:
    """The tokenizer that a `tokenizer.json` describes. Raises ValueError if it is none."""
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise DataError("data.tokenizers: needs a package: pip install tokenizers") from None
    try:
        tokenizer = Tokenizer.from_str(content)
    except Exception as error:  # its own errors are bare Exceptions
        raise ValueError(str(error)) from None
    tokenizer.no_padding()
    return tokenizer
