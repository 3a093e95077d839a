"""The error of every tensor of a model against another one, from their files alone."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from rl_mlx.convert.open import open_weights
from rl_mlx.convert.pieces import Source, source, values
from rl_mlx.convert.weights import Weights
from rl_mlx.errors import InvalidRequest
from rl_mlx.lab.measurement import Measurement, Record
from rl_mlx.lab.plots import axes, style
from rl_mlx.store import resolve

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_SLICE = 1 << 20  # weights that are in memory at once
_LAYER = re.compile(r"\.(\d+)\.(?:.*\.)?([^.]+)\.weight$")


@dataclass(frozen=True)
class TensorError:
    """One matrix. ``rms`` is the root mean square error over that of the reference's values,
    ``snr`` the same in decibels (infinite where nothing differs).

    ``channel_rms`` are the ten worst output channels (rows), relative to the tensor's own root mean
    square, and ``channels`` their indices. ``layer`` is None for embeddings and head.
    """

    name: str
    layer: int | None
    role: str
    shape: tuple[int, ...]
    kind: str
    bits: float
    rms: float
    snr: float
    channels: tuple[int, ...]
    channel_rms: tuple[float, ...]


@dataclass(frozen=True)
class TensorErrors(Measurement):
    """All matrices that both models have."""

    model: str
    reference: str
    tensors: tuple[TensorError, ...]

    def records(self) -> list[Record]:
        """A row for each matrix, with its worst channel."""
        hidden = {"channels", "channel_rms", "shape"}
        return [
            {k: v for k, v in asdict(t).items() if k not in hidden}
            | {"worst_channel": t.channels[0], "worst_channel_rms": t.channel_rms[0]}
            for t in self.tensors
        ]

    def layers(self) -> dict[int, float]:
        """Relative RMS error of each layer's matrices together, weighted by their size."""
        sums: dict[int, list[tuple[float, int]]] = {}
        for t in self.tensors:
            if t.layer is not None:
                sums.setdefault(t.layer, []).append((t.rms**2, math.prod(t.shape)))
        return {
            layer: math.sqrt(sum(e * n for e, n in found) / sum(n for _, n in found))
            for layer, found in sorted(sums.items())
        }

    def plot(self, ax: Axes | None = None) -> Axes:
        """Error against depth, a line for each role."""
        worst = max(self.tensors, key=lambda t: t.rms)
        title = f"{self.model}: {worst.name.removesuffix('.weight')} errs most, {worst.rms:.2g}"
        ax = axes(ax, title, "layer", "RMS error / RMS of the weights")
        inside = [t for t in self.tensors if t.layer is not None]
        for i, role in enumerate(dict.fromkeys(t.role for t in inside)):
            line = [(t.layer or 0, t.rms) for t in inside if t.role == role]
            ax.plot([x for x, _ in line], [y for _, y in line], label=role, **style(i))
        ax.set_xticks(sorted({t.layer or 0 for t in inside}))
        ax.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
        return ax


def tensor_errors(model: str | Path, reference: str | Path) -> TensorErrors:
    """Compare two files or folders of the same model, in whatever formats, a slice at a time.

    Raises ``InvalidRequest`` where they share no matrix or shapes differ, and what opening raises.
    """
    first, second = resolve(str(model)), resolve(str(reference))
    with closing(open_weights(first.path)) as made, closing(open_weights(second.path)) as true:
        shared = [n for n in made.names() if n in set(true.names()) and len(made.shape(n)) > 1]
        if not shared:
            raise InvalidRequest(f"{first.name} and {second.name} have no matrix in common")
        return TensorErrors(
            first.name, second.name, tuple(_error(made, true, name) for name in shared)
        )


def place(name: str) -> tuple[int | None, str]:
    """Layer and role of a tensor by its canonical name: ``(3, "q_proj")``; no layer outside."""
    match = _LAYER.search(name)
    return (int(match[1]), match[2]) if match else (None, name.split(".")[-2])


def _error(made: Weights, true: Weights, name: str) -> TensorError:
    got, want = source(made, name), source(true, name)
    if got.shape != want.shape:
        raise InvalidRequest(f"{name} is {list(got.shape)} and {list(want.shape)}: other models")
    power, errors = 0.0, []
    for a, b in _slices(got, want):
        power += float(np.square(b, dtype=np.float64).sum())
        errors.append(np.square(a - b, dtype=np.float64).sum(axis=1))
    rows = np.concatenate(errors)
    made.release()
    true.release()
    rms = math.sqrt(rows.sum() / power) if power else 0.0
    worst = np.argsort(-rows)[:10]
    scale = math.sqrt(power / len(rows)) or 1.0
    layer, role = place(name)
    return TensorError(
        name=name,
        layer=layer,
        role=role,
        shape=got.shape,
        kind=got.kind,
        bits=8 * got.nbytes / got.weights,
        rms=rms,
        snr=-20 * math.log10(rms) if rms else math.inf,
        channels=tuple(map(int, worst)),
        channel_rms=tuple(float(math.sqrt(rows[i]) / scale) for i in worst),
    )


def _slices(
    got: Source, want: Source
) -> Iterator[tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]]:
    step = max(1, _SLICE // got.columns)
    for start in range(0, got.rows, step):
        stop = min(start + step, got.rows)
        yield values(got.read(start, stop)), values(want.read(start, stop))
