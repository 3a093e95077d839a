"""A GGUF file, version 3, written from front to back: first the header, then tensors by rows.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO, TypeAlias

import numpy as np
import numpy.typing as npt

from rl_mlx.convert.gguf.types import GGMLType, ValueType

MetadataValue: TypeAlias = bool | int | float | str | Sequence[str] | npt.NDArray[Any]
"""What a key may hold: whole numbers become uint32, or the next type that they fit; arrays keep
their own."""
Fields: TypeAlias = dict[str, MetadataValue]
ALIGNMENT = 32
_NUMBERS: Mapping[type[Any], tuple[ValueType, str]] = {
    bool: (ValueType.BOOL, "<?"),
    float: (ValueType.FLOAT32, "<f"),
}
_ARRAYS: Mapping[str, ValueType] = {
    "u1": ValueType.UINT8,
    "i1": ValueType.INT8,
    "b1": ValueType.BOOL,
    "u4": ValueType.UINT32,
    "i4": ValueType.INT32,
    "f4": ValueType.FLOAT32,
}


@dataclass(frozen=True)
class TensorSpec:
    """A tensor of a file to be: ``shape`` is NumPy's, outermost first."""

    name: str
    shape: tuple[int, ...]
    type: GGMLType

    @property
    def nbytes(self) -> int:
        """Bytes of its data, without padding."""
        return math.prod(self.shape) // self.type.block_size * self.type.block_bytes


def header(metadata: Mapping[str, MetadataValue], tensors: Sequence[TensorSpec]) -> bytes:
    """All that goes before the data of the first tensor, padding included."""
    pairs = [_string(key) + _value(value) for key, value in metadata.items()]
    infos, offset = [], 0
    for tensor in tensors:
        dims = struct.pack(f"<I{len(tensor.shape)}Q", len(tensor.shape), *reversed(tensor.shape))
        infos.append(_string(tensor.name) + dims + struct.pack("<IQ", tensor.type, offset))
        offset += padded(tensor.nbytes)
    start = struct.pack("<4sIQQ", b"GGUF", 3, len(tensors), len(pairs))
    whole = b"".join([start, *pairs, *infos])
    return whole.ljust(padded(len(whole)), b"\0")


def padded(nbytes: int) -> int:
    """``nbytes``, up to the next place where a tensor may begin."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def pad(file: BinaryIO) -> None:
    """Bring ``file`` to the next place where a tensor may begin."""
    at = file.tell()
    file.write(bytes(padded(at) - at))


def _string(text: str) -> bytes:
    data = text.encode("utf-8", "surrogateescape")
    return struct.pack("<Q", len(data)) + data


def _value(value: MetadataValue) -> bytes:
    """The type of a value and its bytes."""
    if isinstance(value, str):
        return struct.pack("<I", ValueType.STRING) + _string(value)
    if type(value) in _NUMBERS:
        kind, form = _NUMBERS[type(value)]
        return struct.pack("<I", kind) + struct.pack(form, value)
    if isinstance(value, int):
        kind, form = _whole(value)
        return struct.pack("<I", kind) + struct.pack(form, value)
    if isinstance(value, np.ndarray):
        element = _ARRAYS[value.dtype.str[1:]]
        little = np.ascontiguousarray(value, value.dtype.newbyteorder("<"))
        return struct.pack("<IIQ", ValueType.ARRAY, element, len(value)) + little.tobytes()
    assert not isinstance(value, (bool, float))
    texts = b"".join(map(_string, value))
    return struct.pack("<IIQ", ValueType.ARRAY, ValueType.STRING, len(value)) + texts


def _whole(value: int) -> tuple[ValueType, str]:
    if 0 <= value < 1 << 32:
        return ValueType.UINT32, "<I"
    if -(1 << 31) <= value < 0:
        return ValueType.INT32, "<i"
    return (ValueType.UINT64, "<Q") if value > 0 else (ValueType.INT64, "<q")
