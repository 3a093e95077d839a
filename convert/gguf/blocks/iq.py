"""IQ quants: weights by fours and eights from a codebook, or one by one from an uneven table.

The codebooks are those of the gguf package, read when the first such block is decoded.
"""

# ruff: noqa: N801 - the names are the format's own

from __future__ import annotations

from functools import cache

import numpy as np
import numpy.typing as npt

from rl_mlx.convert.gguf.blocks.base import F32, U8, Codes, Lattice, fields, half
from rl_mlx.convert.gguf.types import GGMLType

U32 = npt.NDArray[np.uint32]


class _Codebook2(Lattice):
    """Magnitudes 8, 25 and 43, eight weights an index."""

    levels = (0, 18, 35, 51, 68, 86)

    @staticmethod
    def spread(name: str, index: npt.NDArray[np.integer], signs: U8, scale: F32) -> Codes:
        """Codes from indices and sign bytes, ``[n, 32]`` each."""
        magnitudes = _grid(name).astype(np.uint8).view(np.uint64)[:, 0]
        negative = np.unpackbits(signs, axis=1, bitorder="little")
        q = magnitudes[index].view(np.uint8) ^ -negative  # two's complement, but for the 1
        q += negative
        q += np.uint8(43)
        return Codes(q, scale, zero=43.0)


class IQ2_XXS(_Codebook2):
    """By 32; float16 d, then for each group four index bytes and a word of signs and scale."""

    type, group = GGMLType.IQ2_XXS, 32

    def codes(self, blocks: U8) -> Codes:
        """Integers from 256 points."""
        words = np.ascontiguousarray(blocks[:, 2:]).view("<u4")
        index = np.ascontiguousarray(words[:, 0::2]).view(np.uint8)
        scale = half(blocks, 0) * _odd(words[:, 1::2]) * np.float32(0.125)
        return self.spread("IQ2_XXS", index, _signs(words[:, 1::2]), scale)


class IQ2_XS(_Codebook2):
    """By 16; float16 d, 32 words of a 9-bit index and 7 bits of signs, 8 bytes of 4-bit scales."""

    type, group = GGMLType.IQ2_XS, 16

    def codes(self, blocks: U8) -> Codes:
        """Integers from 512 points."""
        words = np.ascontiguousarray(blocks[:, 2:66]).view("<u2")
        signs = _even_parity((words >> np.uint16(9)).astype(np.uint8))
        scale = half(blocks, 0) * (2 * _pairs(blocks[:, 66:]) + 1) * np.float32(0.125)
        return self.spread("IQ2_XS", words & np.uint16(511), signs, scale)


class IQ2_S(_Codebook2):
    """By 16; float16 d, 32 index bytes, 32 sign bytes, 8 of upper index bits, 8 of 4-bit scales."""

    type, group = GGMLType.IQ2_S, 16

    def codes(self, blocks: U8) -> Codes:
        """Integers from 1024 points."""
        index = _wider(blocks[:, 2:34], _parts(blocks[:, 66:74], (0, 2, 4, 6), 3))
        scale = half(blocks, 0) * (2 * _pairs(blocks[:, 74:]) + 1) * np.float32(0.125)
        return self.spread("IQ2_S", index, blocks[:, 34:66], scale)


class IQ3_XXS(Lattice):
    """By 32; float16 d, 64 index bytes of four weights each, a word of signs and scale a group."""

    type, group = GGMLType.IQ3_XXS, 32
    levels = (0, 5, 9, 13, 17, 21, 25, 29, 33, 37, 41, 45, 49, 53, 57, 62)

    def codes(self, blocks: U8) -> Codes:
        """Halves of 4, 12, ... 52, 62 from 256 points."""
        words = np.ascontiguousarray(blocks[:, 66:]).view("<u4")
        magnitudes = (_grid("IQ3_XXS") / 2).astype(np.uint8).view(np.uint32)[:, 0]
        negative = np.unpackbits(_signs(words), axis=1, bitorder="little")
        q = magnitudes[blocks[:, 2:66]].view(np.uint8) ^ -negative
        q += negative
        q += np.uint8(31)
        return Codes(q, half(blocks, 0) * _odd(words) * np.float32(0.5), zero=31.0)


class IQ3_S(Lattice):
    """By 32; float16 d, 64 index bytes, 8 of ninth bits, 32 of signs, 4 of 4-bit scales."""

    type, group, levels = GGMLType.IQ3_S, 32, tuple(range(16))

    def codes(self, blocks: U8) -> Codes:
        """Odd numbers up to 15 from 512 points: evenly spaced, with their signs."""
        ninth = np.unpackbits(blocks[:, 66:74], axis=1, bitorder="little")
        magnitudes = (_grid("IQ3_S") // 2).astype(np.uint8).view(np.uint32)[:, 0]
        negative = np.unpackbits(blocks[:, 74:106], axis=1, bitorder="little")
        q = magnitudes[_wider(blocks[:, 2:66], ninth)].view(np.uint8) ^ -negative
        q += np.uint8(8)
        scale = half(blocks, 0) * (4 * _pairs(blocks[:, 106:]) + 2)
        return Codes(q, scale, zero=7.5)


class IQ1_S(Lattice):
    """By 32; float16 d, 32 index bytes, for each group a word of upper bits, scale and shift."""

    type, group, levels = GGMLType.IQ1_S, 32, (0, 1, 2)

    def codes(self, blocks: U8) -> Codes:
        """-1, 0 and 1 from 2048 points, an eighth up or down."""
        words = np.ascontiguousarray(blocks[:, 34:]).view("<u2")
        index = _wider(blocks[:, 2:34], _parts(words, (0, 3, 6, 9), 7))
        points = (_grid("IQ1_S") + 1).astype(np.uint8).view(np.uint64)[:, 0]
        scale = half(blocks, 0) * (2 * ((words >> np.uint16(12)) & np.uint16(7)) + 1)
        zero = np.where(words & np.uint16(0x8000), np.float32(1.125), np.float32(0.875))
        return Codes(points[index].view(np.uint8), scale, zero)


class IQ1_M(Lattice):
    """By 16; 32 index bytes, 16 of upper bits and shifts, 8 of 3-bit scales and parts of d."""

    type, group, levels = GGMLType.IQ1_M, 16, (0, 1, 4, 5, 8, 9)

    def codes(self, blocks: U8) -> Codes:
        """-1, 0 and 1 from 2048 points, every eight an eighth up or down, in steps of a quarter."""
        words = np.ascontiguousarray(blocks[:, 48:]).view("<u2")
        parts = (words & np.uint16(0xF000)) >> np.array([12, 8, 4, 0], np.uint16)
        whole = np.bitwise_or.reduce(parts, axis=1, keepdims=True).view(np.float16)
        scale = whole.astype(np.float32) * (2 * _parts(words, (0, 3, 6, 9), 7) + 1)
        upper = _parts(blocks[:, 32:48], (0, 4), 15)
        index = _wider(blocks[:, :32], upper & np.uint8(7))
        points = (4 * (_grid("IQ1_M") + 1)).astype(np.uint8).view(np.uint64)[:, 0]
        q = points[index].view(np.uint8).reshape(len(blocks), 32, 8)
        q += (upper < 8).view(np.uint8)[..., None]
        return Codes(q.reshape(len(blocks), 256), scale * np.float32(0.25), zero=4.5)


class _Uneven(Lattice):
    """Sixteen uneven levels, one byte each about 128."""

    @property
    def levels(self) -> tuple[int, ...]:  # type: ignore[override]
        """The gguf package's table."""
        return _uneven()


class IQ4_NL(_Uneven):
    """By 32; float16 d, then nibbles as in Q4_0."""

    type, group = GGMLType.IQ4_NL, 32

    def codes(self, blocks: U8) -> Codes:
        """Table entries."""
        table = np.array(self.levels, np.uint8)
        return Codes(table[fields(blocks[:, 2:], 4, 16)], half(blocks, 0), zero=128.0)


class IQ4_XS(_Uneven):
    """By 32 of 256; float16 d, upper and lower bits of 6-bit scales, 128 bytes of nibbles."""

    type, group = GGMLType.IQ4_XS, 32

    def codes(self, blocks: U8) -> Codes:
        """Table entries."""
        upper = np.ascontiguousarray(blocks[:, 2:4]).view("<u2")
        scale = ((upper >> np.arange(0, 16, 2, dtype=np.uint16)) & np.uint16(3)).astype(np.uint8)
        scale = (scale << np.uint8(4)) | _pairs(blocks[:, 4:8])
        table = np.array(self.levels, np.uint8)
        q = table[fields(blocks[:, 8:], 4, 16)]
        return Codes(q, half(blocks, 0) * (scale.astype(np.float32) - 32), zero=128.0)


@cache
def _grid(name: str) -> F32:
    """The codebook of a type, float32 ``[points, weights]``."""
    from gguf import quants  # noqa: PLC0415 - tables of a megabyte that few models need

    quant = getattr(quants, name)
    quant.init_grid()
    grid: F32 = quant.grid.reshape(quant.grid_shape)
    return grid


@cache
def _uneven() -> tuple[int, ...]:
    from gguf import quants  # noqa: PLC0415 - as above

    return tuple(value + 128 for value in quants.IQ4_NL.kvalues)


def _odd(words: U32) -> F32:
    """``2 * s + 1``, s the upper four bits of each word."""
    return (2 * (words >> np.uint32(28)) + 1).astype(np.float32)


def _signs(words: U32) -> U8:
    """Four sign bytes from the lower 28 bits of each word, uint8 ``[n, 4 * k]``."""
    return _even_parity(_parts(words, (0, 7, 14, 21), 0x7F))


def _even_parity(seven: U8) -> U8:
    """Seven sign bits and an eighth that makes the number of minuses even."""
    parity = seven ^ (seven >> np.uint8(4))
    parity ^= parity >> np.uint8(2)
    parity ^= parity >> np.uint8(1)
    return seven | (parity << np.uint8(7))


def _pairs(octets: U8) -> U8:
    """Nibbles of each byte, the lower first, uint8 ``[n, 2 * k]``."""
    return _parts(octets, (0, 4), 15)


def _parts(words: npt.NDArray[np.unsignedinteger], shifts: tuple[int, ...], mask: int) -> U8:
    """Fields of at most 8 bits of each word in turn, ``[n, k]`` into ``[n, k * len(shifts)]``."""
    parts = words[..., None] >> np.array(shifts, words.dtype)
    parts &= words.dtype.type(mask)
    return parts.astype(np.uint8).reshape(len(words), -1)


def _wider(low: U8, high: U8) -> npt.NDArray[np.uint16]:
    """Indices of a lower byte and upper bits."""
    return low | (high.astype(np.uint16) << np.uint16(8))
