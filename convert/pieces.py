"""A tensor read a few rows at a time, and what becomes of those rows in an MLX container."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import numpy.typing as npt

from rl_mlx.convert.floats import DTYPES, narrow, widen
from rl_mlx.convert.folder import FolderWeights
from rl_mlx.convert.gguf.blocks import Plain, block
from rl_mlx.convert.gguf.repack import repack
from rl_mlx.convert.gguf.types import GGMLType
from rl_mlx.convert.gguf.weights import GGUFWeights
from rl_mlx.convert.quantize import dequantize, quantize
from rl_mlx.convert.weights import Dense, FloatType, Mode, Packed, Tensor, Weights

F32 = npt.NDArray[np.float32]


class Unfit(Exception):
    """A container does not hold these rows as it was asked to: the next one is tried."""


@dataclass(frozen=True)
class Blocks:
    """Rows of GGML blocks, uint8 ``[rows, row_bytes]``."""

    type: GGMLType
    raw: npt.NDArray[np.uint8]


Piece = Blocks | Dense | Packed
"""Some rows of a tensor, two-dimensional: those before the last axis are one."""


@dataclass(frozen=True)
class Source:
    """A tensor as it lies in its file. ``read(start, stop)`` gives rows of it.

    ``kind`` names its type; ``nbytes`` is what it takes there. ``packed``: not plain floats.
    """

    name: str
    kind: str
    packed: bool
    shape: tuple[int, ...]
    nbytes: int
    rows: int
    read: Callable[[int, int], Piece]

    @property
    def weights(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.shape)

    @property
    def columns(self) -> int:
        """Weights in a row."""
        return self.weights // self.rows if self.rows else 0


@dataclass(frozen=True)
class Holding:
    """How a tensor will be held: dense in ``dtype`` where ``bits`` is 0, else packed.

    ``dtype`` of a packed one is that of its scales and biases. ``fresh`` decodes the source and
    quantizes it anew; else integers are moved as they are. ``lossless`` makes any change of a value
    ``Unfit``.
    """

    dtype: FloatType
    bits: int = 0
    group_size: int = 0
    mode: Mode = "affine"
    fresh: bool = False
    lossless: bool = False

    def nbytes(self, weights: int) -> int:
        """Bytes that this many weights take, scales and biases included."""
        size = DTYPES[self.dtype].itemsize
        if not self.bits:
            return weights * size
        return weights * self.bits // 8 + weights // self.group_size * self.group_bytes

    @property
    def group_bytes(self) -> int:
        """Bytes of the scale and bias of a group."""
        return 2 * DTYPES[self.dtype].itemsize if self.mode == "affine" else 1

    @property
    def label(self) -> str:
        """For people: ``4-bit g32 float16``, ``mxfp4``, ``bfloat16``."""
        if not self.bits:
            return self.dtype
        if self.mode == "affine":
            return f"{self.bits}-bit g{self.group_size} {self.dtype}"
        return self.mode


def source(weights: Weights, name: str) -> Source:
    """The tensor ``name`` of a GGUF file or a folder, to be read by rows."""
    shape = weights.shape(name)
    count = math.prod(shape)
    if isinstance(weights, GGUFWeights) and len(shape) > 1 and weights.is_decoded(name):
        rows = count // shape[-1]
        return Source(name, "F32", False, shape, 4 * count, rows, _decoded_rows(weights, name))  # noqa: FBT003
    if isinstance(weights, GGUFWeights):
        kind, read = weights.type(name), _gguf_rows(weights, name)
        nbytes = count // kind.block_size * kind.block_bytes
        packed = not isinstance(block(kind), Plain)
        return Source(name, kind.name, packed, shape, nbytes, count // shape[-1], read)
    assert isinstance(weights, FolderWeights)
    packing = weights.packing(name)
    if packing is None:
        held = Holding(weights.dtype(name) or "float32")
    else:
        held = Holding(weights.scale_type(name), *packing)
    read = partial(weights.rows, name)
    rows = count // shape[-1] if shape else 1
    return Source(name, held.label, packing is not None, shape, held.nbytes(count), rows, read)


def _decoded_rows(weights: GGUFWeights, name: str) -> Callable[[int, int], Piece]:
    """How rows of a tensor are read that are no rows of its GGUF file: out of all its numbers."""

    def read(start: int, stop: int) -> Piece:
        whole = dequantize(weights.load(name))
        return Dense(whole.reshape(-1, whole.shape[-1])[start:stop], "float32")

    return read


def _gguf_rows(weights: GGUFWeights, name: str) -> Callable[[int, int], Piece]:
    """How rows of a tensor of a GGUF file are read."""
    kind = weights.type(name)
    if len(weights.shape(name)) == 1:

        def vector(_start: int, _stop: int) -> Piece:
            tensor = weights.load(name)
            assert isinstance(tensor, Dense)
            return Dense(tensor.array.reshape(1, -1), tensor.dtype)

        return vector

    def matrix(start: int, stop: int) -> Piece:
        raw = weights.rows(name, start, stop)
        if not isinstance(block(kind), Plain):
            return Blocks(kind, raw)
        tensor = repack(raw, kind)
        assert isinstance(tensor, Dense)
        return tensor

    return matrix


def joined(pieces: Sequence[Piece]) -> Piece:
    """Pieces of one tensor as one piece."""
    first = pieces[0]
    if len(pieces) == 1:
        return first
    if isinstance(first, Blocks):
        return replace(first, raw=np.concatenate([p.raw for p in pieces if isinstance(p, Blocks)]))
    if isinstance(first, Dense):
        return replace(
            first, array=np.concatenate([p.array for p in pieces if isinstance(p, Dense)])
        )
    packed = [p for p in pieces if isinstance(p, Packed)]
    biases = [p.biases for p in packed if p.biases is not None]
    return replace(
        first,
        weight=np.concatenate([p.weight for p in packed]),
        scales=np.concatenate([p.scales for p in packed]),
        biases=np.concatenate(biases) if biases else None,
    )


def values(piece: Piece) -> F32:
    """The numbers of some rows, float32 ``[rows, columns]``."""
    return block(piece.type).decode(piece.raw) if isinstance(piece, Blocks) else dequantize(piece)


def hold(piece: Piece, holding: Holding) -> Tensor:
    """Some rows in their container.

    Raises ``Unfit`` where a finite number overflows the container's float type, and, where
    ``holding`` is to be lossless, for any change.
    """
    if not holding.bits:
        return _dense(piece, holding)
    if holding.fresh:
        packed = quantize(
            values(piece), holding.bits, holding.group_size, holding.mode, holding.dtype
        )
        if holding.mode == "affine" and not np.isfinite(widen(packed.scales, packed.dtype)).all():
            raise Unfit
        return packed
    if isinstance(piece, Blocks):
        return _repacked(piece, holding)
    return piece


def _dense(piece: Piece, holding: Holding) -> Dense:
    if isinstance(piece, Dense) and piece.dtype == holding.dtype:
        return piece
    wide = values(piece)
    with np.errstate(over="ignore", under="ignore"):
        array = narrow(wide, holding.dtype)
    back = widen(array, holding.dtype)
    if holding.lossless and not _same(back, wide):
        raise Unfit
    if not (np.isfinite(back) | ~np.isfinite(wide)).all():
        raise Unfit
    return Dense(array, holding.dtype)


def _repacked(piece: Blocks, holding: Holding) -> Tensor:
    if not holding.lossless or holding.dtype == "float32":
        tensor = repack(piece.raw, piece.type, holding.dtype, holding.bits)
        assert isinstance(tensor, Packed)
        if tensor.dtype != holding.dtype:
            raise Unfit
        return tensor
    wide = repack(piece.raw, piece.type, "float32", holding.bits)
    assert isinstance(wide, Packed)
    if wide.biases is None:
        return wide
    narrowed = []
    for floats in (wide.scales, wide.biases):
        with np.errstate(over="ignore", under="ignore"):
            narrowed.append(narrow(floats, holding.dtype))
        if not _same(widen(narrowed[-1], holding.dtype), floats):
            raise Unfit
    return replace(wide, scales=narrowed[0], biases=narrowed[1], dtype=holding.dtype)


def _same(a: F32, b: F32) -> bool:
    return bool(((a == b) | (np.isnan(a) & np.isnan(b))).all())
