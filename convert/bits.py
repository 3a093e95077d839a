"""MLX's packed integers: a row is one LSB-first, little-endian bit stream of codes.

Eight codes fill whole bytes and thirty-two fill whole uint32 words at every width, so rows of whole
groups are packed independently, and a tensor can be packed as one flat run of groups.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

WIDTHS = (1, 2, 3, 4, 5, 6, 8)


def pack(
    codes: npt.NDArray[np.uint8], bits: int, out: npt.NDArray[np.uint32] | None = None
) -> npt.NDArray[np.uint32]:
    """Pack uint8 ``[..., n]``, each below ``2**bits``, into uint32 ``[..., n * bits / 32]``.

    ``n`` is a multiple of 32; ``out`` (contiguous) takes the words if given. Neighbouring codes are
    joined in lanes of twice the size until those of a lane fill whole bytes; the rest is dropped.
    """
    assert bits in WIDTHS
    assert codes.shape[-1] % 32 == 0
    shape = (*codes.shape[:-1], codes.shape[-1] * bits // 32)
    words = np.empty(shape, np.uint32) if out is None else out
    assert words.shape == shape
    assert words.flags.c_contiguous
    lanes: npt.NDArray[Any] = np.ascontiguousarray(codes).reshape(-1)
    width = bits
    while width % 8 or 8 < width < 8 * bits:
        lanes = _join(lanes, width)
        width *= 2
    octets = words.reshape(-1).view(np.uint8)
    if width == 8:
        np.copyto(octets, lanes, casting="unsafe")
    else:  # one copy of `bits` bytes a lane is far cheaper than as many copies of a byte
        held = lanes.view(np.uint8).reshape(-1, 8)[:, :bits].view(f"V{bits}")
        np.copyto(octets.view(f"V{bits}"), held[:, 0])
    return words


def _join(lanes: npt.NDArray[Any], width: int) -> npt.NDArray[Any]:
    """Bring two neighbouring lanes of ``width`` bits used together in one of twice the size."""
    half = 8 * lanes.itemsize
    wide: npt.NDArray[Any] = lanes.view(f"<u{2 * lanes.itemsize}")
    word = wide.dtype.type
    upper: npt.NDArray[Any] = wide >> word(half - width)
    if 2 * width <= half:  # the lower lane's codes are shifted out altogether
        upper |= wide
        if 2 * width != 8:  # a byte is cut off by the cast to come
            upper &= word((1 << 2 * width) - 1)
        return upper
    upper &= word(((1 << width) - 1) << width)
    upper |= wide & word((1 << width) - 1)
    return upper


def unpack(words: npt.NDArray[np.uint32], bits: int) -> npt.NDArray[np.uint8]:
    """The inverse of ``pack``: uint32 ``[..., m]`` into uint8 codes ``[..., m * 32 / bits]``."""
    assert bits in WIDTHS
    assert words.shape[-1] % bits == 0
    shape = (*words.shape[:-1], words.shape[-1] * 32 // bits)
    octets = np.ascontiguousarray(words, dtype="<u4").view(np.uint8)
    if bits == 8:
        return octets.reshape(shape)
    if bits == 4:
        pairs = np.empty((octets.size, 2), np.uint8)
        np.bitwise_and(octets.reshape(-1), np.uint8(15), out=pairs[:, 0])
        np.right_shift(octets.reshape(-1), np.uint8(4), out=pairs[:, 1])
        return pairs.reshape(shape)
    lanes = np.zeros((octets.size // bits, 8), np.uint8)  # eight codes each
    lanes[:, :bits] = octets.reshape(-1, bits)
    shifts = np.arange(0, 8 * bits, bits, dtype=np.uint64)
    codes = (lanes.view("<u8") >> shifts).astype(np.uint8)
    codes &= np.uint8((1 << bits) - 1)
    return codes.reshape(shape)
