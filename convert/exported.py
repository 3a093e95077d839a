"""What an export did to each tensor, and to all: for people and machines."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from rl_mlx.convert.gguf.blocks import block
from rl_mlx.convert.gguf.writer import TensorSpec
from rl_mlx.convert.pieces import Source
from rl_mlx.convert.report import TensorReport, Totals

_HEADS = ("tensor", "from", "to", "bits", "now", "rms error", "max error")


@dataclass(frozen=True)
class ExportReport(Totals):
    """A whole export. Tensors have GGUF's names, their errors are as a ``TensorReport``'s.

    ``file_bytes`` is the size of the file, ``seconds`` wall time.
    """

    source: str
    destination: str
    quant: str | None
    tensors: tuple[TensorReport, ...]
    file_bytes: int
    seconds: float
    notes: tuple[str, ...] = ()

    @property
    def path(self) -> Path:
        """The file."""
        return Path(self.destination)

    @property
    def is_exact(self) -> bool:
        """Whether no weight that was measured has changed."""
        return all(t.max_error == 0 for t in self.tensors)

    def as_dict(self) -> dict[str, Any]:
        """All of it in JSON's types."""
        told = asdict(self)
        totals = ("weights", "source_bytes", "bytes", "bits_before", "bits_after", "is_exact")
        return told | {name: getattr(self, name) for name in totals}

    def rows(self) -> list[tuple[str, ...]]:
        """The table: a line of heads, one a tensor, and one for all."""
        lines = [
            (
                t.name,
                t.source,
                t.container,
                f"{t.bits_before:.2f}",
                f"{t.bits_after:.2f}",
                f"{t.rms:.1e}" if t.rms else "0",
                f"{t.max_error:.1e}" if t.max_error else "0",
            )
            for t in self.tensors
        ]
        bits = (f"{self.bits_before:.2f}", f"{self.bits_after:.2f}")
        return [_HEADS, *lines, ("all", "", "", *bits, "", "")]


def measured(
    source: Source,
    spec: TensorSpec,
    values: npt.NDArray[np.float32],
    raw: npt.NDArray[np.uint8],
) -> TensorReport:
    """The line of a tensor, of which ``values`` [rows, columns] are held as ``raw``."""
    back = block(spec.type).decode(raw).reshape(-1).astype(np.float64)
    flat = values.reshape(-1).astype(np.float64)
    known = np.isfinite(flat)
    flat, errors = flat[known], back[known] - flat[known]
    # No dot products: BLAS would wake its threads for them, which takes longer than the sums.
    signal, added = (float((x * x).sum()) for x in (flat, errors))
    return TensorReport(
        name=spec.name,
        shape=spec.shape,
        source=source.kind,
        container=spec.type.name,
        source_bytes=source.nbytes,
        bytes=spec.nbytes,
        rms=math.sqrt(added / signal) if signal else 0.0,
        max_error=float(np.abs(errors).max(initial=0)),
        noise_ratio=None,
        measured=int(flat.size),
    )
