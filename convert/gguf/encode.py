"""MLX's containers into GGML blocks, integers to integers: the inverse of ``repack``.

A packed tensor is ``scale * q + bias`` by groups of 32, 64 or 128. A GGML type of 32 weights a
block holds it to the last bit where its float16 holds the scales and biases, and, for types without
a bias of their own, where the bias is a whole number of scales that its codes leave room for.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import numpy.typing as npt

from rl_mlx.convert.bits import unpack
from rl_mlx.convert.floats import narrow, widen
from rl_mlx.convert.gguf.types import GGMLType
from rl_mlx.convert.quantize import dequantize
from rl_mlx.convert.weights import Dense, FloatType, Packed, Tensor

F32 = npt.NDArray[np.float32]
U8 = npt.NDArray[np.uint8]
T = GGMLType

PLAIN: MappingProxyType[GGMLType, FloatType] = MappingProxyType(
    {T.F32: "float32", T.F16: "float16", T.BF16: "bfloat16"}
)
DENSE: MappingProxyType[FloatType, GGMLType] = MappingProxyType(
    {dtype: kind for kind, dtype in PLAIN.items()}
)
# Types whose value is d * (q - zero): the zero and the number of codes. Smallest blocks first.
_SYMMETRIC: MappingProxyType[GGMLType, tuple[int, int]] = MappingProxyType(
    {T.TQ2_0: (1, 4), T.Q4_0: (8, 16), T.Q5_0: (16, 32), T.Q8_0: (128, 256)}
)
_WITH_BIAS = MappingProxyType({T.Q4_1: 16, T.Q5_1: 32})
EXACT = (T.Q1_0, T.TQ2_0, T.Q4_0, T.Q4_1, T.Q5_0, T.Q5_1, T.Q8_0)
"""Types that affine containers go to, from few to many bits a weight."""


@dataclass(frozen=True)
class Survey:
    """What the types must hold, gathered over a packed tensor.

    ``fits``: float16 has all scales and biases as they are; ``finite``: it has them rounded.
    ``shifts``: least and greatest number of scales that a bias is below zero, None where one is
    no whole number of them. ``runs``: how many weights share a scale at the least, up to 256.
    ``peak``: the greatest value there can be; ``signs``: codes are one bit, zero between them.
    """

    fits: bool = True
    finite: bool = True
    shifts: tuple[int, int] | None = (1 << 30, -(1 << 30))
    runs: int = 256
    peak: float = 0.0
    signs: bool = True

    def __add__(self, other: Survey) -> Survey:
        """Of both parts of a tensor."""
        shifts = None
        if self.shifts is not None and other.shifts is not None:
            shifts = min(self.shifts[0], other.shifts[0]), max(self.shifts[1], other.shifts[1])
        return Survey(
            self.fits and other.fits,
            self.finite and other.finite,
            shifts,
            min(self.runs, other.runs),
            max(self.peak, other.peak),
            self.signs and other.signs,
        )


def survey(piece: Packed) -> Survey:
    """What rows ``[rows, columns]`` in an affine container ask for."""
    scale, bias = _settled(piece)
    wide_scale, wide_bias = scale.astype(np.float64), bias.astype(np.float64)
    free = (scale == 0) & (bias == 0)
    with np.errstate(all="ignore"):
        half = [x.astype(np.float16).astype(np.float32) for x in (scale, bias)]
        steps = np.rint(-wide_bias / wide_scale)
        whole = np.isfinite(steps) & (-steps * wide_scale == wide_bias) & (abs(steps) < 1 << 20)
    steps = steps[whole & ~free]
    shifts: tuple[int, int] | None = Survey.shifts
    if not (whole | free).all():
        shifts = None
    elif steps.size:
        shifts = int(steps.min()), int(steps.max())
    top = (1 << piece.bits) - 1
    finite = all(np.isfinite(h[np.isfinite(x)]).all() for h, x in zip(half, (scale, bias)))
    return Survey(
        fits=bool((half[0] == scale).all() and (half[1] == bias).all()),
        finite=bool(finite),
        shifts=shifts,
        runs=_runs(piece, scale, bias),
        peak=float(np.maximum(abs(wide_bias), abs(wide_bias + top * wide_scale)).max(initial=0)),
        signs=bool(piece.bits == 1 and (wide_bias == -wide_scale / 2).all()),
    )


def surveys(pieces: Iterable[Packed]) -> Survey:
    """What a whole tensor asks for."""
    return sum((survey(piece) for piece in pieces), Survey())


def holds(kind: GGMLType, found: Survey, bits: int, columns: int) -> bool:
    """Whether blocks of ``kind`` hold an affine tensor, but for the rounding to float16.

    ``found.fits`` says whether there is any.
    """
    if columns % kind.block_size or not found.finite:
        return False
    if kind == T.Q1_0:
        return found.signs and found.runs >= 128
    if kind in _WITH_BIAS:
        return 1 << bits <= _WITH_BIAS[kind]
    if kind not in _SYMMETRIC or found.shifts is None:
        return False
    zero, codes = _SYMMETRIC[kind]
    least, greatest = found.shifts
    whole_block = kind != T.TQ2_0 or (found.runs >= 256 and found.shifts == (1, 1))
    return whole_block and greatest <= zero and (1 << bits) - 1 - least + zero < codes


def encode(piece: Tensor, kind: GGMLType) -> U8:
    """Rows ``[rows, columns]`` as blocks, uint8 ``[rows, row_bytes]``.

    The type must be one that ``holds`` them; a plain type takes any. A finite number that overflows
    float16 becomes infinite.
    """
    if kind in PLAIN:
        dtype = PLAIN[kind]
        if isinstance(piece, Dense) and piece.dtype == dtype:
            return np.ascontiguousarray(piece.array).view(np.uint8)
        with np.errstate(over="ignore"):
            return np.ascontiguousarray(narrow(dequantize(piece), dtype)).view(np.uint8)
    assert isinstance(piece, Packed)
    if kind in (T.MXFP4, T.NVFP4):
        return _block_float(piece, kind)
    rows = len(piece.weight)
    codes = unpack(piece.weight, piece.bits).reshape(-1, kind.block_size)
    scale, bias = _settled(piece)
    blocks = np.empty((len(codes), kind.block_bytes), np.uint8)
    per_block = [_per_block(values, piece.group_size, kind.block_size) for values in (scale, bias)]
    _FILL[kind](blocks, codes, *per_block)
    return blocks.reshape(rows, -1)


def _settled(piece: Packed) -> tuple[F32, F32]:
    """Scales and biases as float32 ``[rows, groups]``.

    A group of equal weights needs no scale: where float16 lacks its own, it is given none. MLX has
    such scales (1e-7) in groups of zeros.
    """
    assert piece.biases is not None
    scale, bias = widen(piece.scales, piece.dtype), widen(piece.biases, piece.dtype)
    with np.errstate(over="ignore"):
        odd = scale.astype(np.float16).astype(np.float32) != scale
    if odd.any():
        codes = unpack(piece.weight, piece.bits).reshape(*scale.shape, -1)
        odd &= (codes == codes[..., :1]).all(-1)
        bias = np.where(odd, scale * codes[..., 0] + bias, bias)
        scale = np.where(odd, np.float32(0), scale)
    return scale, bias


def _runs(piece: Packed, scale: F32, bias: F32) -> int:
    """How many weights, of each 256, share scale and bias."""
    runs = piece.group_size
    while runs < 256:
        each = 2 * runs // piece.group_size
        if scale.shape[-1] % each:
            break
        parts = [x.reshape(-1, each) for x in (scale, bias)]
        if not all((part == part[:, :1]).all() for part in parts):
            break
        runs *= 2
    return runs


def _per_block(values: F32, group: int, block: int) -> F32:
    """One number a block, ``[blocks, 1]``."""
    if group >= block:
        return np.repeat(values.reshape(-1, 1), group // block, axis=0)
    return values.reshape(-1, block // group)[:, :1]


def _half(values: F32) -> U8:
    with np.errstate(over="ignore"):
        return np.ascontiguousarray(values, "<f2").view(np.uint8)


def _shifted(codes: U8, scale: F32, bias: F32, zero: int) -> U8:
    """Codes of the same values where code ``zero`` stands for nothing."""
    with np.errstate(all="ignore"):
        below = np.where(scale == 0, zero, np.rint(-bias.astype(np.float64) / scale))
    move = zero - below.astype(np.int16)
    return codes + move.astype(np.uint8)  # modulo 256, and the sum is in range


def _nibbles(codes: U8, run: int = 32) -> U8:
    """Of every ``run`` codes the first half in the low nibbles, the second in the high ones."""
    halves = codes.reshape(-1, 2, run // 2)
    return (halves[:, 0] | (halves[:, 1] << np.uint8(4))).reshape(len(codes), -1)


def _fifths(codes: U8) -> U8:
    return np.packbits(codes >> np.uint8(4), axis=1, bitorder="little")


def _q4_0(blocks: U8, codes: U8, scale: F32, bias: F32) -> None:
    blocks[:, :2] = _half(scale)
    blocks[:, 2:] = _nibbles(_shifted(codes, scale, bias, 8))


def _q4_1(blocks: U8, codes: U8, scale: F32, bias: F32) -> None:
    blocks[:, :2], blocks[:, 2:4] = _half(scale), _half(bias)
    blocks[:, 4:] = _nibbles(codes)


def _q5_0(blocks: U8, codes: U8, scale: F32, bias: F32) -> None:
    codes = _shifted(codes, scale, bias, 16)
    blocks[:, :2], blocks[:, 2:6] = _half(scale), _fifths(codes)
    blocks[:, 6:] = _nibbles(codes & np.uint8(15))


def _q5_1(blocks: U8, codes: U8, scale: F32, bias: F32) -> None:
    blocks[:, :2], blocks[:, 2:4], blocks[:, 4:8] = _half(scale), _half(bias), _fifths(codes)
    blocks[:, 8:] = _nibbles(codes & np.uint8(15))


def _q8_0(blocks: U8, codes: U8, scale: F32, bias: F32) -> None:
    blocks[:, :2] = _half(scale)
    blocks[:, 2:] = _shifted(codes, scale, bias, 128) ^ np.uint8(128)


def _q1_0(blocks: U8, codes: U8, scale: F32, _: F32) -> None:
    blocks[:, :2] = _half(scale / np.float32(2))
    blocks[:, 2:] = np.packbits(codes, axis=1, bitorder="little")


def _tq2_0(blocks: U8, codes: U8, scale: F32, _: F32) -> None:
    quarters = codes.reshape(-1, 2, 4, 32)
    packed = sum(quarters[:, :, i] << np.uint8(2 * i) for i in range(4))
    blocks[:, :64] = np.asarray(packed, np.uint8).reshape(len(codes), -1)
    blocks[:, 64:] = _half(scale)


_FILL = MappingProxyType(
    {T.Q1_0: _q1_0, T.TQ2_0: _tq2_0, T.Q4_0: _q4_0, T.Q4_1: _q4_1, T.Q5_0: _q5_0, T.Q5_1: _q5_1}
    | {T.Q8_0: _q8_0}
)


def _block_float(piece: Packed, kind: GGMLType) -> U8:
    """FP4 numbers and their scale bytes: only the nibbles move."""
    numbers = unpack(piece.weight, 4).reshape(-1, kind.block_size)
    scales = piece.scales.reshape(len(numbers), -1)
    blocks = np.empty((len(numbers), kind.block_bytes), np.uint8)
    at = scales.shape[1]
    blocks[:, :at] = scales
    blocks[:, at:] = _nibbles(numbers, piece.group_size)
    return blocks.reshape(len(piece.weight), -1)
