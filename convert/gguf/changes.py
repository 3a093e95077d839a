"""By what more than its name a tensor of a GGUF file differs from the canonical one."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

F32 = npt.NDArray[np.float32]
Order = npt.NDArray[np.intp]


@dataclass(frozen=True, eq=False)
class Change:
    """What a file does to a tensor.

    In each run of ``run`` rows of the file (``len(rows)`` where it is not given), row ``rows[i]``
    is row ``i`` of the canonical tensor; all axes but the last count as rows, and of a vector the
    only one. Rows are whole, so packed ones are moved without being decoded. ``columns`` says the
    same of runs of columns, as many as it is long. ``value`` makes canonical numbers of those in
    the file, float32 in the shape they have there, and ``back`` those of the file again, element by
    element. ``shape`` is the one in the file, where it is another.
    """

    rows: Order | None = None
    run: int | None = None
    columns: Order | None = None
    value: Callable[[F32], F32] | None = None
    back: Callable[[F32], F32] | None = None
    shape: tuple[int, ...] | None = None
    source: str | None = None
    """The tensor of the file that it is a part of, where that is not the one of its name."""

    @property
    def unit(self) -> int:
        """Rows of the file among which rows are moved."""
        if self.rows is None:
            return 1
        return self.run or len(self.rows)

    def places(self, start: int, stop: int) -> Order:
        """The rows of the file that the canonical rows ``start .. stop - 1`` are."""
        at = np.arange(start, stop)
        if self.rows is None:
            return at
        return at // len(self.rows) * self.unit + self.rows[at % len(self.rows)]

    def undone(self, rows: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Whole runs of canonical rows, in the order of the file."""
        if self.rows is None:
            return rows
        back = np.argsort(self.rows)
        return rows.reshape(-1, len(back), *rows.shape[1:])[:, back].reshape(rows.shape)


_ROTATED = re.compile(r"model\.layers\.\d+\.self_attn\.[qk]_proj\.(?:weight|bias)")


def interleaved(config: Mapping[str, Any], name: str) -> Change | None:
    """Q and K as llama.cpp has them where it rotates pairs of neighbours and the model halves."""
    return Change(rows=half_split(config["head_dim"])) if _ROTATED.fullmatch(name) else None


def norms_from_one(_config: Mapping[str, Any], name: str) -> Change | None:
    """Weights of norms with the 1 in them that the model adds to each."""
    if not name.endswith("norm.weight"):
        return None
    return Change(value=lambda a: a - np.float32(1), back=lambda a: a + np.float32(1))


def half_split(dims: int) -> Order:
    """Rows of a head from interleaved pairs (0, 1), (2, 3) ... to (0, dims / 2) ..."""
    return np.arange(dims).reshape(-1, 2).T.reshape(-1)


def moved(array: npt.NDArray[Any], order: Order) -> npt.NDArray[Any]:
    """Runs along the last axis, as many as ``order`` is long, in that order."""
    *lead, last = array.shape
    runs = array.reshape(*lead, len(order), last // len(order))
    return runs[..., order, :].reshape(array.shape)
