"""From a block type's integers to those of an MLX group: fewer levels, one scale for two groups.

MLX's groups have at least 32 weights and its codes are evenly spaced. Types with a scale for every
16 weights, and types whose levels are a table, are not held exactly in few bits. What that costs is
measured elsewhere; here it is kept small.
"""

from __future__ import annotations

from functools import cache

import numpy as np

from rl_mlx.convert.gguf.blocks import Codes, Lattice
from rl_mlx.convert.gguf.blocks.base import F32, U8

GROUPS = (32, 64, 128)
"""What MLX's affine mode knows."""
_ONE = 1 << 16  # of numbers with a fraction


def group_size(kind: Lattice) -> int:
    """The group of the MLX container for a type's lattice: its own where MLX knows it."""
    return min(max(kind.group, GROUPS[0]), GROUPS[-1])


def exact(kind: Lattice, bits: int) -> bool:
    """Whether ``bits`` hold the lattice as it is."""
    return kind.group >= GROUPS[0] and kind.levels[-1] < 1 << bits


def fit(codes: Codes, kind: Lattice, bits: int) -> Codes:
    """Codes below ``2**bits`` in groups that MLX knows, the same values where ``exact`` says so.

    ``bits`` must leave room for every level of the type. Levels that are not evenly spaced are
    moved to an evenly spaced set near them; pairs of groups of 16 come under one scale.
    """
    assert len(kind.levels) <= 1 << bits
    top = kind.levels[-1]
    if top >= 1 << bits:
        codes, top = _even(codes, kind.levels, bits)
    if kind.group < GROUPS[0]:
        return _merge(codes, top, bits)
    return _split(codes, kind.group // group_size(kind))


def _split(codes: Codes, parts: int) -> Codes:
    """Groups of more weights than MLX knows become ``parts`` groups of the same scale."""
    if parts == 1:
        return codes
    scale = np.repeat(codes.scale, parts, axis=1)
    return Codes(codes.q, scale, codes.zero, codes.bias)


def _even(codes: Codes, levels: tuple[int, ...], bits: int) -> tuple[Codes, int]:
    """Codes of evenly spaced levels, and the highest of them."""
    assert isinstance(codes.zero, float)
    table, step, shift = _evenly(levels, bits)
    zero = round((codes.zero - shift) / step, 6)
    scale = codes.scale * np.float32(step)
    return Codes(table[codes.q], scale, zero, codes.bias), int(table[levels[-1]])


@cache
def _evenly(levels: tuple[int, ...], bits: int) -> tuple[U8, float, float]:
    """A table from integers to codes, and the line ``step * code + shift`` nearest to the levels.

    Of all numbers of steps the least is taken whose squared error is near the best one's: few steps
    leave room for a second scale.
    """
    points = np.array(levels, np.float64)
    lines = []
    for top in range(len(levels) - 1, 1 << bits):
        code = np.rint((points - points[0]) * (top / (points[-1] - points[0])))
        step, shift = np.polyfit(code, points, 1)
        lines.append((float(((step * code + shift - points) ** 2).sum()), code, step, shift))
    near = 1.1 * min(error for error, *_ in lines)
    _, code, step, shift = next(line for line in lines if line[0] <= near)
    table = np.zeros(256, np.uint8)
    table[list(levels)] = code
    table.flags.writeable = False
    return table, float(step), float(shift)


def _merge(codes: Codes, top: int, bits: int) -> Codes:
    """Bring each two neighbouring groups, of codes 0 to ``top``, under one scale."""
    if codes.bias is None and isinstance(codes.zero, float):
        return _around_zero(codes, codes.zero, top, bits)
    return _over_range(codes, top, bits)


def _around_zero(codes: Codes, zero: float, top: int, bits: int) -> Codes:
    """The larger scale is cut in whole parts: its group stays as it is, the other is rounded.

    The other's codes are multiplied in integers with 16 bits of fraction.
    """
    last = (1 << bits) - 1
    reach = max(zero, top - zero)
    parts = (last + 1) // (2 * reach)
    middle = (last + 1) // 2 if zero.is_integer() else last / 2
    scale = codes.scale.reshape(len(codes.scale), -1, 2)
    first, second = scale[..., 0], scale[..., 1]
    is_second = np.abs(second) > np.abs(first)
    step: F32 = np.where(is_second, second, first)
    step /= np.float32(parts)
    gain: F32 = np.where(is_second, first, second)
    gain /= np.where(step == 0, np.float32(1), step)
    gain *= np.float32(_ONE)
    np.rint(gain, out=gain)
    shift = np.float32(_ONE * (middle + 0.5)) - gain * np.float32(zero)
    by, plus = (part.astype(np.int32).astype(np.uint32).reshape(-1, 1) for part in (gain, shift))
    q = codes.q * np.uint8(parts)
    q += np.uint8(middle - parts * zero + 0.5)
    others = np.arange(is_second.size) * 2 + (~is_second).ravel()
    groups = np.dtype((np.void, codes.q.shape[1] // scale[0].size))  # moved as one thing each
    rounded = codes.q.view(groups).ravel().take(others).view(np.uint8).astype(np.uint32)
    rounded = rounded.reshape(len(others), -1)
    rounded *= by
    rounded += plus
    # Under the opposite sign the far end of the levels can lie one code too far.
    np.minimum(rounded, np.uint32(_ONE * (last + 1) - 1), out=rounded)
    rounded >>= np.uint32(_ONE.bit_length() - 1)
    q.view(groups).reshape(-1)[others] = rounded.astype(np.uint8).view(groups).ravel()
    return Codes(q, step, middle)


def _over_range(codes: Codes, top: int, bits: int) -> Codes:
    """Codes are spread evenly over the range that the two groups together can span."""
    last = np.float32((1 << bits) - 1)
    count, groups = codes.scale.shape
    scale = codes.scale.reshape(count, -1, 2)
    start = codes.biases().reshape(count, -1, 2)  # the value of code 0; `end` is that of code `top`
    end = start + scale * np.float32(top)
    lows, highs = np.minimum(start, end), np.maximum(start, end)
    low = np.minimum(lows[..., 0], lows[..., 1])
    step = np.maximum(highs[..., 0], highs[..., 1])
    step -= low
    step /= last
    divisor = np.where(step > 0, step, np.float32(1))[..., None]
    q = codes.q.astype(np.float32).reshape(count, groups, -1)
    q *= (scale / divisor).reshape(count, groups, 1)
    q += ((start - low[..., None]) / divisor + np.float32(0.5)).reshape(count, groups, 1)
    np.minimum(q, last, out=q)
    return Codes(q.astype(np.uint8).reshape(codes.q.shape), step, bias=low)
