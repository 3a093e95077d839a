"""Read a safetensors file by its header; the tensors stay in the file until asked for.

The format is that of https://huggingface.co/docs/safetensors: a little-endian uint64 length, that
many bytes of JSON, then the tensors without gaps. All that a header can lie about is checked before
a byte of data is touched. (The ``safetensors`` package has no bfloat16 in NumPy, and copies.)
"""

from __future__ import annotations

import json
import math
import mmap
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeGuard

import numpy as np
import numpy.typing as npt

from rl_mlx.errors import FormatError, InvalidRequest, ModelNotFound, UnsupportedModel

MAX_HEADER = 100_000_000
"""Bytes; the limit of the reference implementation."""

_SIZES: Mapping[str, int] = MappingProxyType(
    {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "C64": 8}
    | {"U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1}
    | {"F8_E8M0": 1, "F8_E4M3FNUZ": 1, "F8_E5M2FNUZ": 1}
)  # fmt: skip
_NUMPY: Mapping[str, str] = MappingProxyType(
    {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "I32": "<i4"}
    | {"I16": "<i2", "I8": "<i1", "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "<u1"}
    | {"BOOL": "?", "F8_E4M3": "<u1", "F8_E8M0": "<u1"}
)  # fmt: skip
_MAX_DIMS = 32  # NumPy's limit before version 2; models have 4
_LFS = b"version https://git-lfs"


@dataclass(frozen=True)
class Entry:
    """A tensor: its type as the format names it, its shape, and its bytes' place in the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int


class SafetensorsFile:
    """A safetensors file, mapped into memory. ``tensors`` are in the order of the header."""

    def __init__(self, path: Path, data: mmap.mmap, tensors: Mapping[str, Entry]) -> None:
        """Use ``SafetensorsFile.open``."""
        self.path = path
        self.tensors = MappingProxyType(dict(tensors))
        self._data: mmap.mmap | None = data

    @classmethod
    def open(cls, path: Path) -> SafetensorsFile:
        """Map ``path`` and check its header.

        Raises ``ModelNotFound`` where there is no such file and ``FormatError`` where it is damaged
        or lies.
        """
        try:
            with path.open("rb") as file:
                data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except FileNotFoundError as error:
            raise ModelNotFound(f"{path}: there is no such file") from error
        except (OSError, ValueError) as error:  # an empty file cannot be mapped
            raise FormatError(f"{path}: cannot be read as safetensors: {error}") from error
        return cls(path, data, _entries(path, data))

    def array(self, name: str) -> npt.NDArray[Any]:
        """A read-only view of a tensor; bfloat16 and float8 come as uint16 and uint8 bit patterns.

        Raises ``KeyError`` where there is no such tensor, ``UnsupportedModel`` for a type that
        NumPy lacks and ``InvalidRequest`` once the file is closed.
        """
        if self._data is None:
            raise InvalidRequest(f"{self.path} has been closed; open it again")
        entry = self.tensors[name]
        if entry.dtype not in _NUMPY:
            raise UnsupportedModel(
                f"{self.path}: tensor {name!r} is of type {entry.dtype}, which is not supported; "
                "use a float16, bfloat16 or MLX version of the model"
            )
        octets = np.frombuffer(self._data, np.uint8)[entry.start : entry.start + entry.nbytes]
        return octets.view(_NUMPY[entry.dtype]).reshape(entry.shape)

    def release(self) -> None:
        """Give the pages read so far back to the system; arrays stay valid, and read them again."""
        if self._data is not None and hasattr(mmap, "MADV_DONTNEED"):
            self._data.madvise(mmap.MADV_DONTNEED)

    def close(self) -> None:
        """Let go of the file; it stays mapped for as long as a view of it lives."""
        self._data = None


def _entries(path: Path, data: mmap.mmap) -> dict[str, Entry]:
    header, base = _header(path, data)
    header.pop("__metadata__", None)
    entries = {name: _entry(path, name, fields, base) for name, fields in header.items()}
    end = base
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].nbytes)):
        if entry.start != end:
            relation = "overlaps the one before it" if entry.start < end else "follows a gap"
            raise FormatError(f"{path}: tensor {name!r} {relation}; the file is damaged")
        end += entry.nbytes
    if end != len(data):
        raise FormatError(
            f"{path}: the tensors end at byte {end} and the file at {len(data)}; download it again"
        )
    return entries


def _header(path: Path, data: mmap.mmap) -> tuple[dict[str, Any], int]:
    """The header as JSON, and the byte where the tensors begin."""
    if data[: len(_LFS)] == _LFS:
        raise FormatError(f"{path}: a Git LFS pointer, not the model; run `git lfs pull`")
    size = int.from_bytes(data[:8], "little")
    if len(data) < 8 or size > MAX_HEADER or size > len(data) - 8:
        raise FormatError(
            f"{path}: not a safetensors file, or a damaged one: "
            f"its header cannot be {size} bytes long"
        )
    try:
        header = json.loads(data[8 : 8 + size].decode("utf-8"), object_pairs_hook=_without_twins)
    except (ValueError, RecursionError) as error:
        raise FormatError(
            f"{path}: the header of this safetensors file is broken: {error}"
        ) from error
    if not isinstance(header, dict):
        raise FormatError(f"{path}: the header of this safetensors file is no JSON object")
    return header, 8 + size


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        (twin, _), *_ = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"{twin!r} is there twice")
    return found


def _entry(path: Path, name: str, fields: Any, base: int) -> Entry:
    at = f"{path}: tensor {name!r}"
    if not isinstance(fields, dict):
        raise FormatError(f"{at} is described by {type(fields).__name__}, not by a JSON object")
    dtype, shape, offsets = fields.get("dtype"), fields.get("shape"), fields.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in _SIZES:
        raise FormatError(f"{at} is of the unknown type {dtype!r}")
    if not _are_sizes(shape) or len(shape) > _MAX_DIMS:
        raise FormatError(f"{at} has the shape {shape!r}, which is none")
    if not _are_sizes(offsets) or len(offsets) != 2:
        raise FormatError(f"{at} has the offsets {offsets!r}, which are none")
    start, end = offsets
    nbytes = math.prod(shape) * _SIZES[dtype]
    if end - start != nbytes:
        raise FormatError(
            f"{at} of shape {tuple(shape)} and type {dtype} takes {nbytes} bytes, "
            f"but its offsets say {end - start}"
        )
    return Entry(dtype, tuple(shape), base + start, nbytes)


def _are_sizes(numbers: Any) -> TypeGuard[list[int]]:
    return isinstance(numbers, list) and all(
        isinstance(n, int) and not isinstance(n, bool) and 0 <= n < 1 << 63 for n in numbers
    )
