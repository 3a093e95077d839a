"""Arrays of a file that are not read yet, seen as what they will be."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

from rl_mlx.convert.weights import FloatType

Array = npt.NDArray[Any]
FLOATS: Mapping[str, FloatType] = MappingProxyType(
    {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
)
"""Types as safetensors names them."""


@dataclass(frozen=True)
class Lazy:
    """An array of a file that is not read yet. ``dtype`` is as safetensors names it."""

    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], Array]
    parts: tuple[Lazy, ...] = ()
    """Of an array that is stacked from others, these: some of it can be read without the rest."""
    take: Callable[[int, int], Array] | None = None
    """Some rows of an array that is made when it is read, where that is less work than all."""

    def rows(self, start: int, stop: int) -> Array:
        """Rows ``[stop - start, last axis]``, where all axes but the last count as one."""
        if self.take is not None:
            return self.take(start, stop)
        if not self.parts:
            width = self.shape[-1] if self.shape else 1
            return self.read().reshape(-1, width)[start:stop]
        each = math.prod(self.parts[0].shape[:-1])
        touched = range(start // each, -(-stop // each))
        found = [
            self.parts[i].rows(max(start - i * each, 0), min(stop - i * each, each))
            for i in touched
        ]
        return found[0] if len(found) == 1 else np.concatenate(found)

    def seen(self, shape: tuple[int, ...], view: Callable[[Array], Array], dtype: str = "") -> Lazy:
        """The same array through ``view``, which makes it of ``shape``."""
        return Lazy(shape, dtype or self.dtype, lambda: view(self.read()))

    def cut(self, axis: int, start: int, stop: int | None, step: int = 1) -> Lazy:
        """A slice along ``axis``, which counts from the last one (-1)."""
        count = len(range(*slice(start, stop, step).indices(self.shape[axis])))
        shape = list(self.shape)
        shape[axis] = count
        index = (..., slice(start, stop, step), *[slice(None)] * (-1 - axis))
        return self.seen(tuple(shape), lambda a: a[index])

    def taken(self, rows: npt.NDArray[np.intp]) -> Lazy:
        """These rows of a matrix, which may be packed."""
        return self.seen((len(rows), *self.shape[1:]), lambda a: a[rows])

    def transposed(self) -> Lazy:
        """The last two axes the other way round."""
        *lead, rows, columns = self.shape
        return self.seen((*lead, columns, rows), lambda a: a.swapaxes(-1, -2))


Arrays = dict[str, Lazy]
