"""Columns of records and frames as Arrow arrays, made by Arrow's own kernels: nothing here is done value by value."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

TYPES = {1: pa.uint8(), 2: pa.uint16(), 4: pa.uint32(), 8: pa.uint64()}


class Table:
    """Records of one size, of which any field is a column."""

    def __init__(self, data: memoryview, size: int) -> None:
        self._buffer = pa.py_buffer(data)
        self._size = size
        self.count = len(data) // size
        self._steps: dict[int, Any] = {}

    def column(self, at: int, width: int) -> Any:
        """The field of `width` bytes at an offset, as unsigned numbers."""
        kind, step = TYPES[width], self._size // width
        flat = pa.Array.from_buffers(kind, self.count * step, [None, self._buffer])
        if step not in self._steps:
            self._steps[step] = pa.array(range(0, self.count * step, step), pa.int64())
        return flat.slice(at // width).take(self._steps[step])


def has(mask: Any, bit: int) -> Any:
    """Where a bit of a mask is set."""
    return pc.not_equal(pc.bit_wise_and(mask, pa.scalar(bit, mask.type)), pa.scalar(0, mask.type))


def where(test: Any, column: Any) -> Any:
    """The column, and null where the test is false."""
    return pc.if_else(test, column, pa.scalar(None, column.type))


def without(column: Any, none: int) -> Any:
    """The column, and null where it has the value that stands for none."""
    return where(pc.not_equal(column, pa.scalar(none, column.type)), column)


def named(numbers: Any, names: Sequence[str]) -> Any:
    """Names of small numbers; `names` has one for each number there may be. The dictionary has those that occur."""
    values = pc.unique(numbers).drop_null().sort()
    return renamed(numbers, [names[n] for n in values.to_pylist()], values)


def renamed(keys: Any, names: Sequence[str | None], values: Any) -> Any:
    """Names of numbers of which there are few different ones: `values` (without null) are those, `names` what they are called."""
    texts = pa.array(names, pa.string()).dictionary_encode()  # a name may stand for several numbers, or be none
    places = pc.index_in(keys, value_set=values)
    return pa.DictionaryArray.from_arrays(texts.indices.take(places), texts.dictionary)
