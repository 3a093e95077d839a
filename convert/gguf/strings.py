"""Arrays of strings that stay in the file until they are asked for."""

from __future__ import annotations

import struct
from array import array
from collections.abc import Iterator, Sequence
from itertools import pairwise
from mmap import mmap
from typing import overload

import numpy as np
import numpy.typing as npt


class StringArray(Sequence[str]):
    """A read-only sequence of strings, each decoded when it is asked for.

    Bytes that are not UTF-8 come out as lone surrogates (PEP 383), so nothing is lost:
    ``text.encode("utf-8", "surrogateescape")`` gives the bytes of the file.
    """

    __slots__ = ("_data", "_starts")

    def __init__(self, data: mmap, starts: npt.NDArray[np.int64]) -> None:
        """``starts`` [n + 1]: where each string's length field lies, then the end of the last."""
        self._data = data
        self._starts = starts

    def __len__(self) -> int:
        return len(self._starts) - 1

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        i = range(len(self))[index]
        start, end = int(self._starts[i]) + 8, int(self._starts[i + 1])
        return self._data[start:end].decode("utf-8", "surrogateescape")

    def __iter__(self) -> Iterator[str]:
        data = self._data
        for start, end in pairwise(self._starts.tolist()):
            yield data[start + 8 : end].decode("utf-8", "surrogateescape")

    def __repr__(self) -> str:
        return f"<StringArray of {len(self)} strings>"


def walk(data: mmap, start: int, count: int, order: str) -> tuple[npt.NDArray[np.int64], int]:
    """Find ``count`` strings by their lengths alone; ``order`` is ``"<"`` or ``">"``.

    Returns ``starts`` as ``StringArray`` wants it, and how many strings were found: fewer than
    ``count`` where one passes the end. The caller has checked ``count`` against the file's size.
    """
    starts = array("q", [start])
    append = starts.append
    length = struct.Struct(order + "Q").unpack_from
    position, size = start, len(data)
    last = size - 8
    for _ in range(count):
        if position > last:
            break
        position += 8 + length(data, position)[0]
        if position > size:
            break
        append(position)
    return np.frombuffer(starts, np.int64), len(starts) - 1
