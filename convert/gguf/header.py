"""The header of one GGUF file: metadata and tensor infos, each size checked before it is believed.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The file may be damaged or
hostile: nothing is allocated that its length does not pay for, and names are quoted shortened.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from mmap import mmap
from pathlib import Path
from types import MappingProxyType
from typing import Any, Union

import numpy as np
import numpy.typing as npt

from rl_mlx.convert.gguf.guess import guess
from rl_mlx.convert.gguf.strings import StringArray, walk
from rl_mlx.convert.gguf.types import RETIRED, GGMLType, ValueType
from rl_mlx.errors import FormatError, RlMlxError, UnsupportedModel

Value = Union[bool, int, float, str, npt.NDArray[Any], StringArray, "tuple[Value, ...]"]
"""A metadata value; an array of arrays is a tuple."""

AGAIN = "the file is damaged or its download incomplete: download it again"
MAX_DIMS = 4
MAX_DEPTH = 4
MAX_ALIGNMENT = 1 << 20
_MIN_PAIR = 8 + 4 + 1
_MIN_TENSOR = 8 + 4 + 4 + 8
# The same letters name these types to struct and to NumPy.
_LETTERS = {
    ValueType.UINT8: "B",
    ValueType.INT8: "b",
    ValueType.UINT16: "H",
    ValueType.INT16: "h",
    ValueType.UINT32: "I",
    ValueType.INT32: "i",
    ValueType.FLOAT32: "f",
    ValueType.BOOL: "?",
    ValueType.UINT64: "Q",
    ValueType.INT64: "q",
    ValueType.FLOAT64: "d",
}


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies: ``offset`` bytes into the file number ``part`` (from 0) of its model.

    ``shape`` is NumPy's, outermost first (GGUF has it the other way round).
    """

    name: str
    shape: tuple[int, ...]
    type: GGMLType
    nbytes: int
    offset: int
    part: int = 0

    @property
    def row_bytes(self) -> int:
        """Bytes of one row, which is the last dimension."""
        return self.nbytes // math.prod(self.shape[:-1])


@dataclass(frozen=True)
class Header:
    """One file's header and its bytes. ``order`` is ``"<"`` or ``">"``."""

    path: Path
    data: mmap
    version: int
    order: str
    metadata: Mapping[str, Value]
    tensors: tuple[TensorInfo, ...]


def quote(name: str) -> str:
    """A name out of the file, on one line and not longer than a message bears."""
    return repr(name if len(name) <= 64 else name[:61] + "...")


def read_header(path: Path, data: mmap) -> Header:
    """Parse the header of ``data``, the bytes of ``path``.

    Raises ``FormatError`` where they are damaged or something else, and ``UnsupportedModel`` for a
    version or tensor type that we lack.
    """
    cursor, version = _begin(path, data)
    tensor_count, pair_count = cursor.number("Q", "tensor count"), cursor.number("Q", "key count")
    if tensor_count * _MIN_TENSOR + pair_count * _MIN_PAIR > cursor.left:
        raise cursor.error(
            f"{tensor_count} tensors and {pair_count} keys cannot be in {len(data)} bytes; {AGAIN}"
        )
    metadata: dict[str, Value] = {}
    for i in range(pair_count):
        key = cursor.name(f"key {i + 1} of {pair_count}")
        if key in metadata:
            raise cursor.error(f"key {quote(key)} is there twice; {AGAIN}")
        metadata[key] = cursor.value(cursor.value_type(quote(key)), f"the value of {quote(key)}")
    alignment = _alignment(cursor, metadata.get("general.alignment", 32))
    infos = [_tensor(cursor, i, tensor_count) for i in range(tensor_count)]
    base = -(-cursor.position // alignment) * alignment
    tensors = tuple(TensorInfo(n, s, t, b, base + o) for n, s, t, b, o in infos)
    _check_layout(cursor, tensors, alignment)
    return Header(path, data, version, cursor.order, MappingProxyType(metadata), tensors)


def _begin(path: Path, data: mmap) -> tuple[_Cursor, int]:
    head = data[:512]
    cursor = _Cursor(path, data, "<", 4)
    if not head.startswith(b"GGUF"):
        what, fix = guess(head, len(data))
        raise cursor.error(f"this is {what}; {fix}")
    little = cursor.number("I", "version")
    big = int.from_bytes(head[4:8], "big")
    version = min(little, big)
    if version in (2, 3):
        return _Cursor(path, data, "<" if version == little else ">", 8), version
    if version == 1:
        fix = "convert the model again with a current llama.cpp, or download a newer file"
        raise UnsupportedModel(f"{path}: GGUF version 1 was given up in 2023; {fix}")
    if 3 < version < 256:
        fix = "update rl-mlx, or use an older file"
        raise UnsupportedModel(f"{path}: GGUF version {version} is newer than 3; {fix}")
    raise cursor.error(f"{version} is no GGUF version; {AGAIN}")


def _alignment(cursor: _Cursor, value: Value) -> int:
    if type(value) is int and 0 < value <= MAX_ALIGNMENT and not value & (value - 1):
        return value
    found = value if type(value) is int else f"a {type(value).__name__}"
    raise cursor.error(
        f"general.alignment must be a power of two up to {MAX_ALIGNMENT}, not {found}; {AGAIN}"
    )


def _tensor(
    cursor: _Cursor, index: int, count: int
) -> tuple[str, tuple[int, ...], GGMLType, int, int]:
    """Name, shape, type, bytes and offset in the data section of the next tensor."""
    name = cursor.name(f"the name of tensor {index + 1} of {count}")
    what = f"tensor {quote(name)}"
    dims = cursor.number("I", what)
    if dims > MAX_DIMS:
        raise cursor.error(f"{what} has {dims} dimensions, more than {MAX_DIMS}; {AGAIN}")
    shape = tuple(cursor.number("Q", what) for _ in range(dims))[::-1]
    number = cursor.number("I", what)
    offset = cursor.number("Q", what)
    if 0 in shape:
        raise cursor.error(f"{what} has a dimension of 0: {list(shape)}; {AGAIN}")
    try:
        kind = GGMLType(number)
    except ValueError:
        raise _unknown_type(cursor, what, number) from None
    row = shape[-1] if shape else 1
    if row % kind.block_size:
        raise cursor.error(f"{what} has rows of {row}, not of whole {kind.name} blocks; {AGAIN}")
    return name, shape, kind, math.prod(shape) // kind.block_size * kind.block_bytes, offset


def _unknown_type(cursor: _Cursor, what: str, number: int) -> RlMlxError:
    if number in RETIRED:
        why = f"{number} ({RETIRED[number]}), which ggml has removed"
    else:
        why = f"{number}, which is unknown here (a newer llama.cpp's, or a fork's)"
    return UnsupportedModel(
        f"{cursor.path}: {what} has type {why}; use another quantization of the model"
    )


def _check_layout(cursor: _Cursor, tensors: tuple[TensorInfo, ...], alignment: int) -> None:
    """Every tensor has its own aligned bytes inside the file, under a name of its own."""
    seen: set[str] = set()
    size = len(cursor.data)
    end, before = 0, ""
    for tensor in sorted(tensors, key=lambda t: t.offset):
        if tensor.name in seen:
            raise cursor.error(f"tensor {quote(tensor.name)} is there twice; {AGAIN}")
        seen.add(tensor.name)
        if tensor.offset % alignment:
            raise cursor.error(
                f"tensor {quote(tensor.name)} is not aligned to {alignment} bytes; {AGAIN}"
            )
        if tensor.offset < end:
            raise cursor.error(f"tensors {before} and {quote(tensor.name)} overlap; {AGAIN}")
        end, before = tensor.offset + tensor.nbytes, quote(tensor.name)
    if end > size:
        raise cursor.error(
            f"truncated: tensor {before} ends at byte {end} and the file at {size}, "
            f"{end - size} bytes are missing; {AGAIN}"
        )


class _Cursor:
    """A place in the file's bytes, from which checked things are read."""

    def __init__(self, path: Path, data: mmap, order: str, position: int) -> None:
        self.path, self.data, self.order, self.position = path, data, order, position

    @property
    def left(self) -> int:
        return len(self.data) - self.position

    def error(self, what: str) -> FormatError:
        return FormatError(f"{self.path}: {what}")

    def take(self, size: int, what: str) -> int:
        """Move ``size`` bytes on and return where they begin."""
        if size > self.left:
            raise self.error(
                f"{what} passes the end of the file by {size - self.left} bytes; {AGAIN}"
            )
        self.position += size
        return self.position - size

    def number(self, letter: str, what: str) -> Any:
        layout = self.order + letter
        return struct.unpack_from(layout, self.data, self.take(struct.calcsize(layout), what))[0]

    def blob(self, what: str) -> bytes:
        start = self.take(self.number("Q", what), what)
        return self.data[start : self.position]

    def name(self, what: str) -> str:
        try:
            return self.blob(what).decode("utf-8")
        except UnicodeDecodeError:
            raise self.error(f"{what} is not UTF-8; {AGAIN}") from None

    def value_type(self, what: str) -> ValueType:
        number = self.number("I", f"the type of {what}")
        try:
            return ValueType(number)
        except ValueError:
            raise self.error(f"{what} has unknown value type {number}; {AGAIN}") from None

    def value(self, kind: ValueType, what: str, depth: int = 0) -> Value:
        if kind is ValueType.STRING:
            return self.blob(what).decode("utf-8", "surrogateescape")
        if kind is not ValueType.ARRAY:
            return self.number(_LETTERS[kind], what)  # type: ignore[no-any-return]
        if depth == MAX_DEPTH:
            raise self.error(f"{what} has arrays nested deeper than {MAX_DEPTH}; {AGAIN}")
        element, count = self.value_type(what), self.number("Q", what)
        if element is ValueType.STRING:
            return self.strings(count, what)
        if element is ValueType.ARRAY:
            if count * 12 > self.left:
                raise self.error(f"{what} cannot have {count} arrays in {self.left} bytes; {AGAIN}")
            return tuple(self.value(element, what, depth + 1) for _ in range(count))
        return self.numbers(element, count, what)

    def numbers(self, element: ValueType, count: int, what: str) -> npt.NDArray[Any]:
        dtype = np.dtype(self.order + _LETTERS[element])
        start = self.take(count * dtype.itemsize, what)
        if element is ValueType.BOOL:  # any byte but 0 is true; NumPy's own bools must be 0 or 1
            return np.frombuffer(self.data, np.uint8, count, start) != 0  # type: ignore[no-any-return]
        array: npt.NDArray[Any] = np.frombuffer(self.data, dtype, count, start)
        return array.astype(dtype.newbyteorder("="), copy=False)

    def strings(self, count: int, what: str) -> StringArray:
        if count * 8 > self.left:
            raise self.error(f"{what} cannot have {count} strings in {self.left} bytes; {AGAIN}")
        starts, found = walk(self.data, self.position, count, self.order)
        if found < count:
            raise self.error(
                f"{what}: string {found + 1} of {count} passes the end of the file; {AGAIN}"
            )
        self.position = int(starts[-1])
        return StringArray(self.data, starts)
