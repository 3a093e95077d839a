"""GGML blocks into MLX's containers, integers to integers: no float copy of a tensor is made.

Which container: a type with evenly spaced levels in groups of 32 weights or more is held as it is,
in the narrowest codes (exact); MXFP4 and NVFP4 in the modes of their names (exact); the others as
``lattice.fit`` does it, at a few percent of the type's own noise power.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from rl_mlx.convert import bits as stream
from rl_mlx.convert import kernels
from rl_mlx.convert.chunks import in_chunks
from rl_mlx.convert.floats import DTYPES, narrow, overflows
from rl_mlx.convert.gguf import lattice
from rl_mlx.convert.gguf.blocks import BlockFloat, Lattice, Plain, block
from rl_mlx.convert.gguf.blocks.base import CHUNK, U8, Nibbles
from rl_mlx.convert.gguf.types import GGMLType
from rl_mlx.convert.weights import Dense, FloatType, Mode, Packed, Tensor
from rl_mlx.errors import FormatError, InvalidRequest

# Where the default width is not the narrowest that holds the type's integers as they are.
_BITS = MappingProxyType(
    {
        GGMLType.Q2_K: 4,
        GGMLType.Q3_K: 5,
        GGMLType.Q6_K: 8,
        GGMLType.IQ1_M: 4,
        GGMLType.IQ2_XXS: 3,
        GGMLType.IQ2_XS: 4,
        GGMLType.IQ2_S: 4,
        GGMLType.IQ3_XXS: 4,
    }
)
_PLAIN: MappingProxyType[GGMLType, FloatType] = MappingProxyType(
    {GGMLType.F32: "float32", GGMLType.F16: "float16", GGMLType.BF16: "bfloat16"}
)


@dataclass(frozen=True)
class Container:
    """How a tensor will be held, known without reading it.

    ``bits`` and ``group_size`` are MLX's; those of a dense number, and 0, where ``kind`` is dense.
    ``exact``: every value is the source's, in float32 and with float32 scales.
    """

    kind: Literal["dense", "packed"]
    bits: int
    group_size: int
    mode: Mode | None
    exact: bool

    def nbytes(self, shape: tuple[int, ...], scales: FloatType = "float32") -> int:
        """Bytes of a tensor of logical ``shape``, with its scales and biases in ``scales``."""
        weights = math.prod(shape)
        size = weights * self.bits // 8
        if self.kind == "packed":
            a_group = 2 * DTYPES[scales].itemsize if self.mode == "affine" else 1
            size += weights // self.group_size * a_group
        return size


def container(ggml_type: GGMLType, columns: int, bits: int | None = None) -> Container:
    """The container that ``repack`` makes of rows of ``columns`` weights.

    ``bits`` asks for another width than the default. Raises ``UnsupportedModel`` for a type that is
    not known, ``FormatError`` where rows are not whole blocks, ``InvalidRequest`` for a width that
    cannot hold the type's levels.
    """
    kind = block(ggml_type)
    if columns % kind.block_size:
        raise FormatError(
            f"rows of {columns} weights are not whole {ggml_type.name} blocks of "
            f"{kind.block_size}; the file is damaged"
        )
    widths = _widths(kind)
    if bits is not None and bits not in widths:
        raise InvalidRequest(
            f"{ggml_type.name} cannot be repacked in {bits} bits; possible: {list(widths)}"
        )
    if isinstance(kind, BlockFloat):
        return Container("packed", 4, kind.group, kind.mode, exact=True)
    if isinstance(kind, Lattice):
        held = next(width for width in widths if kind.levels[-1] < 1 << width)
        bits = bits or _BITS.get(ggml_type, held)
        exact = lattice.exact(kind, bits)
        return Container("packed", bits, lattice.group_size(kind), "affine", exact)
    dense = _PLAIN.get(ggml_type, "float32")
    exact = ggml_type not in (GGMLType.F64, GGMLType.I32, GGMLType.I64)
    return Container("dense", 8 * DTYPES[dense].itemsize, 0, None, exact)


def _widths(kind: object) -> tuple[int, ...]:
    """Code widths that a type can be repacked in."""
    if isinstance(kind, BlockFloat):
        return (4,)
    if isinstance(kind, Lattice):
        return tuple(width for width in stream.WIDTHS if len(kind.levels) <= 1 << width)
    return ()


def repack(
    raw: U8, ggml_type: GGMLType, scales: FloatType = "float32", bits: int | None = None
) -> Tensor:
    """Bring rows of blocks, uint8 ``[..., row_bytes]``, into their ``container``.

    ``scales`` is the float type of scales and biases; a tensor where one of them would overflow it
    keeps them in float32. Plain floats are views of ``raw``. Raises what ``container`` raises.
    """
    kind = block(ggml_type)
    made = container(ggml_type, kind.columns(raw), bits)
    if isinstance(kind, Plain):
        if ggml_type in _PLAIN:
            return Dense(kind.view(raw), _PLAIN[ggml_type])
        return Dense(kind.decode(raw), "float32")
    if isinstance(kind, BlockFloat):
        return _block_float(raw, kind, made, scales)
    assert isinstance(kind, Lattice)
    try:
        return _affine(raw, kind, made, scales)
    except OverflowError:
        return _affine(raw, kind, made, "float32")


def _affine(raw: U8, kind: Lattice, made: Container, dtype: FloatType) -> Packed:
    """Raises ``OverflowError`` where a finite scale or bias is infinite in ``dtype``."""
    blocks = np.ascontiguousarray(raw).reshape(-1, kind.type_size)
    groups = (len(blocks), kind.block_size // made.group_size)
    weight = np.empty((len(blocks), kind.block_size * made.bits // 32), np.uint32)
    scales, biases = np.empty(groups, DTYPES[dtype]), np.empty(groups, DTYPES[dtype])

    def work(chunk: slice) -> None:
        parts = weight[chunk], scales[chunk], biases[chunk]
        if kernels.move(blocks[chunk], kind.type, made.bits, dtype, *parts):
            return
        with np.errstate(all="ignore"):  # a damaged scale makes NaN weights, as ggml has it
            scale, bias = _codes(blocks[chunk], kind, made.bits, weight[chunk])
            for values, out in ((scale, scales), (bias, biases)):
                out[chunk] = narrow(values, dtype)
                if dtype == "float16" and overflows(out[chunk], values):
                    raise OverflowError("scales beyond float16")

    in_chunks(len(blocks), max(1, CHUNK // kind.block_size), work)
    shape = (*raw.shape[:-1], kind.columns(raw))
    return _rows(shape, made, dtype, weight, scales, biases)


def _codes(
    blocks: U8, kind: Lattice, bits: int, out: npt.NDArray[np.uint32]
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Pack the codes of some blocks into ``out``; returns scales and biases."""
    if isinstance(kind, Nibbles) and bits == 4:
        out[:] = kind.pairs(blocks).view(np.uint32)
        scale, zero, bias = kind.scaling(blocks)
        return scale, scale * -np.float32(zero) if bias is None else bias
    codes = lattice.fit(kind.codes(blocks), kind, bits)
    stream.pack(codes.q, bits, out)
    return codes.scale, codes.biases()


def _block_float(raw: U8, kind: BlockFloat, made: Container, dtype: FloatType) -> Packed:
    blocks = np.ascontiguousarray(raw).reshape(-1, kind.type_size)
    weight = np.empty((len(blocks), kind.block_size // 8), np.uint32)
    scales = np.empty((len(blocks), kind.block_size // made.group_size), np.uint8)

    def work(chunk: slice) -> None:
        stream.pack(kind.numbers(blocks[chunk]), made.bits, weight[chunk])
        scales[chunk] = kind.scales(blocks[chunk])

    in_chunks(len(blocks), max(1, CHUNK // kind.block_size), work)
    shape = (*raw.shape[:-1], kind.columns(raw))
    return _rows(shape, made, dtype, weight, scales, None)


def _rows(
    shape: tuple[int, ...],
    made: Container,
    dtype: FloatType,
    weight: npt.NDArray[np.uint32],
    scales: npt.NDArray[Any],
    biases: npt.NDArray[Any] | None,
) -> Packed:
    """The blocks' parts as rows of a tensor of logical ``shape``."""
    assert made.mode is not None
    groups = (*shape[:-1], shape[-1] // made.group_size)
    return Packed(
        weight.reshape(*shape[:-1], shape[-1] * made.bits // 32),
        scales.reshape(groups),
        None if biases is None else biases.reshape(groups),
        made.bits,
        made.group_size,
        made.mode,
        dtype,
    )
