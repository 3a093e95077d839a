"""Floats into MLX's quantized containers, the very bits of ``mx.quantize``, and back.

The methods are MLX's (``mlx/backend/cpu/quantized.cpp``) and, for the block-float modes, those of
the OCP Microscaling Formats 1.0. Sums of equal distance go to the smaller magnitude in FP4, as
MLX does it on a CPU. Written in NumPy: this floor does without MLX, and two threads are faster.
"""

from __future__ import annotations

from functools import cache
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from rl_mlx.convert.bits import pack, unpack
from rl_mlx.convert.chunks import in_chunks
from rl_mlx.convert.floats import DTYPES, narrow, widen
from rl_mlx.convert.weights import Dense, FloatType, Mode, Packed, Tensor

F32 = npt.NDArray[np.float32]
U8 = npt.NDArray[np.uint8]

_CHUNK = 1 << 18
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_SUBNORMAL = np.float32(2.0**-6)  # E4M3 below this has a fixed step of 2 ** -9


def quantize(values: F32, bits: int, group_size: int, mode: Mode, dtype: FloatType) -> Packed:
    """Pack float32 ``[..., columns]``, ``columns`` a multiple of ``group_size``, in 2 bits or more.

    ``dtype`` is that of affine scales and biases; codes are found before these are rounded to it,
    as ``mx.quantize`` does for weights of that type. A scale that overflows ``dtype`` is infinite.
    """
    groups = np.ascontiguousarray(values).reshape(-1, group_size)
    codes_per_word = 32 // group_size if group_size < 32 else 1
    weight = np.empty((len(groups), group_size * bits // 32), np.uint32)
    scales = np.empty(len(groups), DTYPES[dtype] if mode == "affine" else np.uint8)
    biases = np.empty_like(scales) if mode == "affine" else None

    def work(chunk: slice) -> None:
        with np.errstate(all="ignore"):  # groups of zeros, infinities and NaNs come out as in MLX
            if mode == "affine":
                assert biases is not None
                q, scale, bias = _affine(groups[chunk], bits)
                scales[chunk], biases[chunk] = narrow(scale, dtype), narrow(bias, dtype)
            else:
                q, scales[chunk] = _block_float(groups[chunk], mode)
            q = q.reshape(-1, group_size * codes_per_word)
            weight[chunk] = pack(q, bits).reshape(-1, weight.shape[1])

    step = max(1, _CHUNK // group_size) // codes_per_word * codes_per_word
    in_chunks(len(groups), max(codes_per_word, step), work)
    *lead, columns = values.shape
    shape = (*lead, columns // group_size)
    return Packed(
        weight.reshape(*lead, columns * bits // 32),
        scales.reshape(shape),
        None if biases is None else biases.reshape(shape),
        bits,
        group_size,
        mode,
        dtype,
    )


def dequantize(tensor: Tensor) -> F32:
    """The values of a tensor as MLX computes with them, in float32."""
    if isinstance(tensor, Dense):
        return widen(tensor.array, tensor.dtype)
    groups = (*tensor.scales.shape, tensor.group_size)
    codes = unpack(tensor.weight, tensor.bits).reshape(groups)
    if tensor.mode == "affine":
        assert tensor.biases is not None
        values = codes.astype(np.float32)
        values *= widen(tensor.scales, tensor.dtype)[..., None]
        values += widen(tensor.biases, tensor.dtype)[..., None]
        return values.reshape(tensor.shape)
    numbers = levels(tensor.mode)[codes]
    numbers *= group_scales(tensor)[..., None]
    return numbers.reshape(tensor.shape)


def levels(mode: Mode) -> F32:
    """The number that each code of a block-float mode stands for, before its group's scale."""
    if mode == "mxfp8":
        return _e4m3().copy()
    positive = np.array(_E2M1, np.float32)
    return np.concatenate([positive, -positive])


def group_scales(tensor: Packed) -> F32:
    """The scales of a packed tensor as float32, whatever their form."""
    if tensor.mode == "affine":
        return widen(tensor.scales, tensor.dtype)
    if tensor.mode == "nvfp4":
        found: F32 = _e4m3()[tensor.scales]
        return found
    powers: F32 = np.ldexp(np.float32(1), tensor.scales.astype(np.int32) - 127)
    return powers


def _affine(groups: F32, bits: int) -> tuple[U8, F32, F32]:
    """Codes ``[n, group]``, scales and biases ``[n]``.

    The edge of larger magnitude is held exactly, and zero has a code of its own.
    """
    low, high = _extremes(groups)
    bins = np.float32((1 << bits) - 1)
    below = np.abs(low) > np.abs(high)
    scale = np.maximum((high - low) / bins, np.float32(1e-7))
    scale = np.where(below, scale, -scale)
    edge = np.where(below, low, high)
    steps = np.rint(edge / scale)
    at_zero = steps == 0
    scale = np.where(at_zero, scale, edge / np.where(at_zero, np.float32(1), steps))
    bias = np.where(at_zero, np.float32(0), edge)
    q = groups - bias[:, None]
    q /= scale[:, None]
    np.rint(q, out=q)
    np.clip(q, np.float32(0), bins, out=q)
    return q.astype(np.uint8), scale, bias


def _extremes(groups: F32) -> tuple[F32, F32]:
    """Least and greatest of each row, by columns: NumPy is slow over short rows."""
    columns = np.ascontiguousarray(groups.T)
    return columns.min(axis=0), columns.max(axis=0)


def _block_float(groups: F32, mode: Mode) -> tuple[U8, U8]:
    """Codes ``[n, group]`` and scale bytes ``[n]``, the largest number at the top of the range."""
    largest = _extremes(np.abs(groups))[1]
    if mode == "nvfp4":
        scale = _to_e4m3(largest / np.float32(6))
        by = _e4m3()[scale]
        by[scale == 0] = np.inf
        return _to_e2m1(groups / by[:, None]), scale
    ratio = largest / np.float32(448 if mode == "mxfp8" else 6)
    mantissa, exponent = np.frexp(ratio)
    exponent += np.where(ratio == 0, 127, 127 - (mantissa == 0.5))
    scale = np.clip(exponent, 0, 254).astype(np.uint8)
    x = np.ldexp(groups, 127 - scale.astype(np.int32)[:, None])
    return (_to_e4m3(x) if mode == "mxfp8" else _to_e2m1(x)), scale


def _to_e2m1(x: F32) -> U8:
    """The nearest FP4 E2M1 number, the smaller of two; zero has no sign and NaN is zero."""
    magnitude = np.abs(x)
    codes = np.zeros(x.shape, np.uint8)
    for lower, upper in pairwise(_E2M1):
        codes += magnitude > np.float32((lower + upper) / 2)
    codes |= ((x < 0) & (codes > 0)).view(np.uint8) << np.uint8(3)
    return codes


def _to_e4m3(x: F32) -> U8:
    """The nearest FP8 E4M3 number, the even of two; 448 is the most."""
    bits = np.ascontiguousarray(x).view(np.uint32)
    magnitude = np.minimum(np.abs(x), np.float32(448))
    wide = magnitude.view(np.uint32)
    odd = (wide >> np.uint32(20)) & np.uint32(1)
    rounded = (wide + np.uint32(0x7FFFF) + odd) >> np.uint32(20)
    rounded -= np.uint32((127 - 7) << 3)
    fixed = np.rint(magnitude * np.float32(512)).astype(np.uint32)
    codes = np.where(magnitude < _SUBNORMAL, fixed, rounded).astype(np.uint8)
    codes[np.isnan(x)] = 126
    codes |= (bits >> np.uint32(24)).astype(np.uint8) & np.uint8(128)
    return codes


@cache
def _e4m3() -> F32:
    """The value of each E4M3 byte: bias 7, three bits of mantissa, no infinity, 0x7F is NaN."""
    code = np.arange(256)
    exponent, mantissa = (code >> 3) & 15, code & 7
    value = np.ldexp(mantissa + 8.0 * (exponent > 0), np.maximum(exponent, 1) - 10)
    value[(code & 127) == 127] = np.nan
    table: F32 = np.where(code < 128, value, -value).astype(np.float32)
    table.flags.writeable = False
    return table
