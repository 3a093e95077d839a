"""Which MLX container holds a tensor, by a stated rule and at a measured cost.

The cost is noise power: the mean squared difference between the values of the source and those of
the container, scales rounded as they will be. It is set against the noise that the source's own
type has put on the weights it was made from:

- A weight that was rounded to a level of a lattice lies anywhere in that level's cell, so its error
  is uniform there: mean square ``step ** 2 / 12`` for even levels (Bennett 1948), in general
  ``(a ** 3 + b ** 3) / (3 * (a + b))`` for a cell that reaches ``a`` below and ``b`` above.
- Codebook types (IQ1, IQ2, IQ3) use few points of their lattice and err more. No code of ``R`` bits
  a weight leaves a Gaussian source of power ``P`` less noise than ``P * 4 ** -R`` (Shannon 1959),
  and that is taken where it is more.

Encoders that look for the best scale end a little below, and codebooks above: on Gaussian weights
the estimate is 0.5 to 1.4 times the noise that ggml's encoders make (a test says so). Large tensors
are measured on ``SAMPLE`` weights, in rows spread over the whole.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from types import MappingProxyType
from typing import Literal

import numpy as np
import numpy.typing as npt

from rl_mlx.convert.bits import WIDTHS, unpack
from rl_mlx.convert.gguf.blocks import Lattice, block
from rl_mlx.convert.gguf.blocks.base import F32
from rl_mlx.convert.gguf.repack import Container, container
from rl_mlx.convert.gguf.types import GGMLType
from rl_mlx.convert.pieces import Blocks, Holding, Piece, Source, Unfit, hold, joined, values
from rl_mlx.convert.quantize import dequantize, group_scales, levels
from rl_mlx.convert.weights import Dense, FloatType, Packed
from rl_mlx.errors import InvalidRequest

Fidelity = Literal["exact", "faithful", "compact"]
LIMIT = 0.10
"""Of its type's own noise power, what ``faithful`` may add to a tensor."""
GROWTH = 1.05
"""Times its own bytes, what a tensor may take under ``compact``."""
SAMPLE = 1 << 16
"""Weights of a tensor that are measured."""
_RUNS = 16  # places from which the sample's rows are taken
_GROUPS = (128, 64, 32)

# Bits a weight that choose the point of a codebook, signs and shifts included, scales not.
_RATES: Mapping[GGMLType, float] = MappingProxyType(
    {
        GGMLType.IQ1_S: 11 / 8,
        GGMLType.IQ1_M: 12 / 8,
        GGMLType.IQ2_XXS: 15 / 8,
        GGMLType.IQ2_XS: 16 / 8,
        GGMLType.IQ2_S: 18 / 8,
        GGMLType.IQ3_XXS: 23 / 8,
        GGMLType.IQ3_S: 26 / 8,
    }
)


@dataclass(frozen=True)
class Loss:
    """What a container does to a tensor: sums over the weights that were ``measured``.

    ``signal`` of squared values, ``added`` of squared errors, ``own`` of what the source's type has
    added before (None for plain floats); ``peak`` is the greatest error.
    """

    measured: int
    signal: float
    added: float
    own: float | None
    peak: float

    @property
    def rms(self) -> float:
        """Root mean square error relative to that of the values."""
        return math.sqrt(self.added / self.signal) if self.signal else 0.0

    @property
    def ratio(self) -> float | None:
        """Added noise power over own; None where the type is exact to begin with."""
        if self.own is None:
            return None
        return self.added / self.own if self.own else (math.inf if self.added else 0.0)


@dataclass(frozen=True)
class Choice:
    """Containers for a tensor, the one that the rule prefers first, and what that one does to it.

    The next is for where one does not fit: a scale overflows, or one that is to be lossless would
    change a value. The last always fits.
    """

    holdings: tuple[Holding, ...]
    loss: Loss


def choose(source: Source, fidelity: Fidelity, scales: FloatType) -> Choice:
    """The containers for a tensor of GGML blocks by a rule, with scales in ``scales``.

    Raises ``InvalidRequest`` where ``compact`` cannot be kept.
    """
    sample = Sample(source)
    kind = sample.ggml_type
    if fidelity == "exact":
        return sample.choice(_exact(sample, kind, scales))
    if fidelity == "compact":
        return _compact(sample, kind, scales)
    return _faithful(sample, kind, scales)


def unchanged(source: Source) -> Choice:
    """Plain floats, or an array that MLX has packed, as they are."""
    sample = Sample(source)
    return sample.choice([replace(sample.as_it_is, lossless=True)])


def rounded(source: Source, dtype: FloatType, *, lossless: bool) -> Choice:
    """Plain floats in ``dtype``; as they are where one would overflow it, or would change."""
    sample = Sample(source)
    return sample.choice([Holding(dtype, lossless=lossless), sample.as_it_is])


def requantized(source: Source, holding: Holding) -> Choice:
    """``holding``, with float32 scales where one would overflow."""
    return Sample(source).choice([holding, replace(holding, dtype="float32")])


def measure(source: Source, holding: Holding) -> Loss:
    """What ``holding`` does to a tensor."""
    return Sample(source).loss(holding)


def _exact(sample: Sample, kind: GGMLType, scales: FloatType) -> list[Holding]:
    """Packed where no value changes, else dense in the narrowest type that holds them all."""
    made = next((c for c in _repackings(kind, sample.columns) if c.exact), None)
    order: tuple[FloatType, ...] = (scales, "float32")
    packed = [_held(made, dtype, lossless=True) for dtype in order] if made else []
    return packed + [Holding(d, lossless=True) for d in ("float16", "bfloat16", "float32")]


def _faithful(sample: Sample, kind: GGMLType, scales: FloatType) -> Choice:
    """The smallest container that adds no more than ``LIMIT`` of the type's own noise."""
    dtypes: dict[FloatType, None] = dict.fromkeys((scales, "float32"))
    found = [_held(made, d) for made in _repackings(kind, sample.columns) for d in dtypes]
    dense = Holding("float32")
    for holding in sorted(found, key=lambda h: h.nbytes(1024)):
        loss = sample.loss(holding)
        if loss.ratio is not None and loss.ratio <= LIMIT:
            return Choice((holding, replace(holding, dtype="float32"), dense), loss)
    return sample.choice([dense])


def _compact(sample: Sample, kind: GGMLType, scales: FloatType) -> Choice:
    """Of the containers that are hardly larger than the source, the one that adds least noise."""
    weights, room = sample.source.weights, GROWTH * sample.source.nbytes
    found = [_held(made, scales) for made in _repackings(kind, sample.columns)]
    for group in _GROUPS:
        if sample.columns % group == 0:
            fresh = [Holding(scales, bits, group, fresh=True) for bits in WIDTHS if bits > 1]
            found += [h for h in fresh if h.nbytes(weights) <= room][-1:]
    measured = [(h, sample.loss(h)) for h in found if h.nbytes(weights) <= room]
    measured.sort(key=lambda pair: pair[1].added)
    if not measured or math.isinf(measured[0][1].added):
        raise InvalidRequest(
            f"tensor {sample.source.name!r} ({kind.name}) has no MLX container of its own size; "
            "convert with fidelity 'faithful'"
        )
    return Choice(tuple(h for h, _ in measured), measured[0][1])


@cache
def _repackings(kind: GGMLType, columns: int) -> tuple[Container, ...]:
    """The containers that blocks of a type can be moved to, the narrowest first."""
    found = []
    for bits in WIDTHS:
        try:
            found.append(container(kind, columns, bits))
        except InvalidRequest:  # too narrow for the type's levels
            continue
    return tuple(found)


def _held(made: Container, dtype: FloatType, *, lossless: bool = False) -> Holding:
    assert made.mode is not None
    return Holding(dtype, made.bits, made.group_size, made.mode, lossless=lossless)


class Sample:
    """Rows of a tensor, their values and their own noise, to be measured in any container."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.columns = source.columns
        runs = _runs(source.rows, source.columns)
        self._piece = joined([source.read(start, stop) for start, stop in runs])
        self._values, self._own = _decoded(self._piece)
        self._signal = _power(self._values)

    @property
    def ggml_type(self) -> GGMLType:
        """The type of a tensor of GGML blocks."""
        assert isinstance(self._piece, Blocks)
        return self._piece.type

    @property
    def as_it_is(self) -> Holding:
        """The container that an array of a folder, or a plain float of a GGUF file, has already."""
        piece = self._piece
        if isinstance(piece, Packed):
            return Holding(piece.dtype, piece.bits, piece.group_size, piece.mode)
        assert isinstance(piece, Dense)
        return Holding(piece.dtype)

    def choice(self, holdings: Sequence[Holding]) -> Choice:
        """``holdings`` as they are, each once; the first is measured."""
        order = tuple(dict.fromkeys(holdings))
        return Choice(order, self.loss(order[0]))

    def loss(self, holding: Holding) -> Loss:
        """What ``holding`` does to the sample; infinitely much where it does not fit.

        A lossless one is taken at its word, for it is checked on every weight when it is made.
        """
        count, wide = self._values.size, self._values
        if holding.lossless:
            share = self.source.weights / count
            own = None if self._own is None else share * self._own
            return Loss(self.source.weights, share * self._signal, 0.0, own, 0.0)
        try:
            error = dequantize(hold(self._piece, holding)).reshape(wide.shape) - wide
        except Unfit:
            return Loss(count, self._signal, math.inf, self._own, math.inf)
        return Loss(count, self._signal, _power(error), self._own, _peak(error))


def _runs(rows: int, columns: int) -> list[tuple[int, int]]:
    """Ranges of rows, ``SAMPLE`` weights in all, evenly over the tensor; all of a small one."""
    wanted = max(1, SAMPLE // max(columns, 1))
    if wanted >= rows:
        return [(0, rows)]
    runs = min(_RUNS, wanted)
    each = wanted // runs
    starts = np.linspace(0, rows - each, runs).astype(int)
    return [(int(start), int(start) + each) for start in starts]


def own_noise(piece: Piece) -> float | None:
    """The noise power that rounding to their type has put on these rows, summed; see the module.

    None for plain floats, which are taken for what was trained.
    """
    return _decoded(piece)[1]


def _decoded(piece: Piece) -> tuple[F32, float | None]:
    """The values of some rows, float32 ``[rows, columns]``, and their own noise."""
    if isinstance(piece, Dense):
        return values(piece), None
    if isinstance(piece, Packed):
        return values(piece), _packed_noise(piece)
    kind = block(piece.type)
    assert isinstance(kind, Lattice)
    with np.errstate(all="ignore"):  # damaged scales are no numbers, and not counted
        codes = kind.codes(np.ascontiguousarray(piece.raw).reshape(-1, kind.type_size))
        wide = codes.values().reshape(len(piece.raw), -1)
    cells = _cells(kind.levels)
    noise = _power(codes.scale) * kind.group * float(cells[kind.levels[0]])
    if np.ptp(cells[list(kind.levels)]):
        each = cells[codes.q].reshape(*codes.scale.shape, -1).sum(axis=-1)
        noise = _power(codes.scale * np.sqrt(each))
    rate = _RATES.get(piece.type)
    return wide, noise if rate is None else max(noise, _power(wide) * 4**-rate)


def _packed_noise(tensor: Packed) -> float:
    scales = group_scales(tensor)
    if tensor.mode == "affine":
        return _power(scales) * tensor.group_size / 12
    numbers = levels(tensor.mode)
    codes = unpack(tensor.weight, tensor.bits).reshape(*scales.shape, -1)
    known = np.unique(numbers[np.isfinite(numbers)])
    table = _noise_in_cells(known)[np.searchsorted(known, np.nan_to_num(numbers))]
    return float((table[codes].sum(axis=-1) * scales.astype(np.float64) ** 2).sum())


@cache
def _cells(level: tuple[int, ...]) -> npt.NDArray[np.float64]:
    """The mean squared error in the cell of each of 256 codes, of which ``level`` are in use."""
    table = np.zeros(256)
    table[list(level)] = _noise_in_cells(np.array(level, np.float64))
    table.flags.writeable = False
    return table


def _noise_in_cells(points: npt.NDArray[np.floating]) -> npt.NDArray[np.float64]:
    """Mean squared error in the cell of each ascending level; the outer ones are even."""
    reach = np.diff(points.astype(np.float64)) / 2
    below, above = np.concatenate([reach[:1], reach]), np.concatenate([reach, reach[-1:]])
    noise: npt.NDArray[np.float64] = (below**3 + above**3) / (3 * (below + above))
    return noise


def _power(array: npt.NDArray[np.floating]) -> float:
    """The sum of squares of what is finite."""
    power = float(np.square(array, dtype=np.float64).sum())  # no dot product: BLAS has threads
    return power if math.isfinite(power) else _power(array[np.isfinite(array)])


def _peak(array: npt.NDArray[np.floating]) -> float:
    """The greatest magnitude of what is finite."""
    peak = max(float(array.max(initial=0)), -float(array.min(initial=0)))
    return peak if math.isfinite(peak) else _peak(array[np.isfinite(array)])
