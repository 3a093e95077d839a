"""What a conversion did to each tensor, and to all: for people, machines and the folder."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rl_mlx.convert.fidelity import Loss
from rl_mlx.convert.pieces import Holding, Source


@dataclass(frozen=True)
class TensorReport:
    """One tensor. ``source`` and ``container`` name what it was and is, sizes are bytes.

    ``rms`` is the error relative to the root mean square of the values, ``max_error`` the greatest
    difference, ``noise_ratio`` the added noise power over that of the source's own type (None for
    plain floats). They are of ``measured`` weights.
    """

    name: str
    shape: tuple[int, ...]
    source: str
    container: str
    source_bytes: int
    bytes: int
    rms: float
    max_error: float
    noise_ratio: float | None
    measured: int

    @property
    def weights(self) -> int:
        """How many numbers the tensor holds."""
        return math.prod(self.shape)

    @property
    def bits_before(self) -> float:
        """Bits a weight in the source."""
        return 8 * self.source_bytes / max(self.weights, 1)

    @property
    def bits_after(self) -> float:
        """Bits a weight now, scales and biases included."""
        return 8 * self.bytes / max(self.weights, 1)


class Totals:
    """Sums over the tensors of a report."""

    tensors: tuple[TensorReport, ...]

    @property
    def weights(self) -> int:
        """Parameters."""
        return sum(t.weights for t in self.tensors)

    @property
    def source_bytes(self) -> int:
        """Of all tensors before."""
        return sum(t.source_bytes for t in self.tensors)

    @property
    def bytes(self) -> int:
        """Of all tensors now."""
        return sum(t.bytes for t in self.tensors)

    @property
    def bits_before(self) -> float:
        """Bits a weight in the source."""
        return 8 * self.source_bytes / max(self.weights, 1)

    @property
    def bits_after(self) -> float:
        """Bits a weight now."""
        return 8 * self.bytes / max(self.weights, 1)


@dataclass(frozen=True)
class Report(Totals):
    """A whole conversion. ``rms``, ``max_error`` and ``noise_ratio`` are as a tensor's, over all.

    ``noise_ratio`` counts the tensors that have noise of their own. ``seconds`` is wall time.
    """

    source: str
    destination: str
    sha256: str
    fidelity: str
    scales: str
    quant: str | None
    tensors: tuple[TensorReport, ...]
    rms: float
    max_error: float
    noise_ratio: float | None
    seconds: float
    notes: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """All of it in JSON's types."""
        told = asdict(self)
        told["tensors"] = [
            asdict(t) | {"bits_before": t.bits_before, "bits_after": t.bits_after}
            for t in self.tensors
        ]
        totals = ("weights", "source_bytes", "bytes", "bits_before", "bits_after")
        return told | {name: getattr(self, name) for name in totals}

    def rows(self) -> list[tuple[str, ...]]:
        """The table: a line of heads, one a tensor, and one for all."""
        lines = [_cells(t.name, t.source, t.container, t) for t in self.tensors]
        return [_HEADS, *lines, _cells("all", "", "", self)]


_HEADS = ("tensor", "from", "to", "bits", "now", "rms error", "max error", "noise")


def _cells(name: str, source: str, container: str, part: TensorReport | Report) -> tuple[str, ...]:
    return (
        name,
        source,
        container,
        f"{part.bits_before:.2f}",
        f"{part.bits_after:.2f}",
        f"{part.rms:.1e}" if part.rms else "0",
        f"{part.max_error:.1e}" if part.max_error else "0",
        _percent(part.noise_ratio),
    )


def _percent(ratio: float | None) -> str:
    if ratio is None:
        return ""
    return f"{100 * ratio:.2g}%" if ratio < 1 else f"{ratio:.3g}x"


def tensor_report(source: Source, holding: Holding, loss: Loss) -> TensorReport:
    """The line of a tensor that was held in ``holding``."""
    return TensorReport(
        name=source.name,
        shape=source.shape,
        source=source.kind,
        container=holding.label,
        source_bytes=source.nbytes,
        bytes=holding.nbytes(source.weights),
        rms=loss.rms,
        max_error=loss.peak,
        noise_ratio=loss.ratio,
        measured=loss.measured,
    )


def totals(losses: Sequence[tuple[int, Loss]]) -> tuple[float, float, float | None]:
    """``rms``, ``max_error`` and ``noise_ratio`` over tensors of so many weights each."""
    scaled = [(weights / max(loss.measured, 1), loss) for weights, loss in losses]
    signal = math.fsum(s * loss.signal for s, loss in scaled)
    added = math.fsum(s * loss.added for s, loss in scaled)
    noisy = [(s, loss) for s, loss in scaled if loss.own is not None]
    own = math.fsum(s * (loss.own or 0.0) for s, loss in noisy)
    rms = math.sqrt(added / signal) if signal else 0.0
    peak = max((loss.peak for _, loss in losses), default=0.0)
    return rms, peak, _added(noisy) / own if own else None


def _added(losses: Iterable[tuple[float, Loss]]) -> float:
    return math.fsum(s * loss.added for s, loss in losses)
