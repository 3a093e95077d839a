"""What a GGML block type is: sizes, decoding, and the integers behind the values."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from rl_mlx.convert.chunks import in_chunks
from rl_mlx.convert.gguf.types import GGMLType
from rl_mlx.errors import FormatError

U8 = npt.NDArray[np.uint8]
F32 = npt.NDArray[np.float32]

CHUNK = 1 << 20
"""Weights worked on at a time. Smaller chunks fit the caches better, but between NumPy's loops the
GIL is held: at an eighth of this, two threads are no faster than one."""


class Block(ABC):
    """A tensor type of GGUF: how blocks of ``block_size`` weights lie in ``type_size`` bytes.

    Instances have no state; ``blocks.block`` gives the one of a type. Layouts are those of ggml's
    ``ggml-common.h``, values those of its ``dequantize_row_*``, in float32.
    """

    type: ClassVar[GGMLType]

    @property
    def block_size(self) -> int:
        """Weights in a block."""
        return self.type.block_size

    @property
    def type_size(self) -> int:
        """Bytes of a block."""
        return self.type.block_bytes

    def columns(self, raw: U8) -> int:
        """Weights in a row of uint8 ``[..., row_bytes]``; ``FormatError`` if it is not blocks."""
        count: int = raw.shape[-1] // self.type_size
        if raw.shape[-1] % self.type_size:
            raise FormatError(
                f"a row of {raw.shape[-1]} bytes is not whole {self.type.name} blocks of "
                f"{self.type_size} bytes; the file is damaged"
            )
        return count * self.block_size

    def decode(self, raw: U8) -> F32:
        """Decode rows of blocks, uint8 ``[..., row_bytes]``, into float32 ``[..., columns]``."""
        columns = self.columns(raw)
        blocks = np.ascontiguousarray(raw).reshape(-1, self.type_size)
        values = np.empty((len(blocks), self.block_size), np.float32)

        def work(chunk: slice) -> None:
            with np.errstate(all="ignore"):  # infinite and NaN scales decode to what they say
                values[chunk] = self.decode_blocks(blocks[chunk])

        in_chunks(len(blocks), max(1, CHUNK // self.block_size), work)
        return values.reshape(*raw.shape[:-1], columns)

    @abstractmethod
    def decode_blocks(self, blocks: U8) -> F32:
        """Decode uint8 ``[n, type_size]`` into float32 ``[n, block_size]``."""


class Plain(Block):
    """Numbers as the machine knows them, one a block."""

    dtype: ClassVar[np.dtype[Any]]
    """Little-endian, as in the file."""

    def view(self, raw: U8) -> npt.NDArray[Any]:
        """Rows of bytes ``[..., row_bytes]`` as what they are, ``[..., columns]``; no copy."""
        self.columns(raw)
        return raw.view(self.dtype)

    def decode_blocks(self, blocks: U8) -> F32:
        """Round to float32 where the type is wider."""
        return blocks.view(self.dtype).astype(np.float32)


@dataclass(frozen=True)
class Codes:
    """Blocks as integers on a lattice: ``value = scale * (q - zero) + bias``, group by group.

    ``q`` is uint8 ``[n, block_size]``; ``scale`` and ``bias`` are float32 ``[n, groups]``, as is
    ``zero`` where it is not one number; no type has both a zero and a bias. Products fit float32
    for every type: neither the order of operations nor a fused multiply-add changes a value.
    """

    q: U8
    scale: F32
    zero: float | F32 = 0.0
    bias: F32 | None = None

    def values(self) -> F32:
        """The decoded weights, float32 ``[n, block_size]``."""
        count, groups = self.scale.shape
        values = self.q.astype(np.float32).reshape(count, groups, -1)
        zero = self.zero[..., None] if isinstance(self.zero, np.ndarray) else np.float32(self.zero)
        values -= zero
        values *= self.scale[..., None]
        if self.bias is not None:
            values += self.bias[..., None]
        return values.reshape(self.q.shape)

    def biases(self) -> F32:
        """The bias of ``value = scale * q + bias``, float32 ``[n, groups]``."""
        return self.scale * -np.float32(self.zero) if self.bias is None else self.bias


class Lattice(Block):
    """Small integers times a scale, plus a bias, that ``group`` weights share."""

    group: ClassVar[int]
    levels: ClassVar[tuple[int, ...]]
    """The values that ``q`` takes, ascending."""

    @abstractmethod
    def codes(self, blocks: U8) -> Codes:
        """Split uint8 ``[n, type_size]`` into integers, scales and biases."""

    def decode_blocks(self, blocks: U8) -> F32:
        """The lattice's formula, in float32."""
        return self.codes(blocks).values()


class Nibbles(Lattice):
    """A lattice whose integers lie in nibbles from byte ``start`` of a block on, as they are.

    Of every ``run`` bytes the low nibbles come first.
    """

    start: ClassVar[int]
    run: ClassVar[int]

    @abstractmethod
    def scaling(self, blocks: U8) -> tuple[F32, float, F32 | None]:
        """``scale``, ``zero`` and ``bias`` of uint8 ``[n, type_size]``, as in ``Codes``."""

    def codes(self, blocks: U8) -> Codes:
        """Nibbles as they are."""
        return Codes(fields(blocks[:, self.start :], 4, self.run), *self.scaling(blocks))

    def pairs(self, blocks: U8) -> U8:
        """The integers two to a byte, the first in the low nibble, ``[n, block_size / 2]``."""
        lanes = blocks[:, self.start :].copy().view(np.uint64)
        # Of each two bytes the inner nibbles change places: then one has the low, one the high.
        inner = lanes >> np.uint64(4)
        inner ^= lanes
        inner &= np.uint64(0x00F000F000F000F0)
        lanes ^= inner
        inner <<= np.uint64(4)
        lanes ^= inner
        both = lanes.view(np.uint16).reshape(-1)
        runs = np.empty((both.size * 2 // self.run, 2), f"V{self.run // 2}")
        runs[:, 0] = both.astype(np.uint8).view(runs.dtype)
        both >>= np.uint16(8)
        runs[:, 1] = both.astype(np.uint8).view(runs.dtype)
        return runs.view(np.uint8).reshape(len(blocks), -1)


def half(blocks: U8, at: int) -> F32:
    """The float16 at byte ``at`` of each block, as float32 ``[n, 1]``."""
    return blocks[:, at : at + 2].view("<f2").astype(np.float32)


def fields(octets: U8, bits: int, run: int, at: int = 0) -> U8:
    """Cut bytes into fields in ggml's order, uint8 ``[n, k]`` into ``[n, k * 8 / bits]``.

    Of every ``run`` bytes (a multiple of 8) the lowest fields come first, then the next higher.
    Each begins at bit ``at`` of its byte, the other bits are 0.
    """
    lanes = np.ascontiguousarray(octets).view(np.uint64)
    mask = np.uint64(0x0101010101010101 * ((1 << bits) - 1) << at)
    runs = np.empty((octets.size // run, 8 // bits), f"V{run}")
    for field in range(8 // bits):
        down = field * bits - at
        part = lanes >> np.uint64(down) if down > 0 else lanes << np.uint64(-down)
        part &= mask
        # A run at a time is copied: NumPy's loops over a few numbers cost more than the numbers.
        runs[:, field] = part.view(f"V{run}").reshape(-1)
    return runs.view(np.uint8).reshape(len(octets), -1)
