"""Importance matrices, as ``llama-imatrix`` writes them: GGUF, and the ``.dat`` files before it.

A matrix says for each column of a tensor how strong its inputs were in a calibration text: the mean
of their squares. Layouts: ``tools/imatrix`` and ``common/imatrix-loader`` of llama.cpp.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

from rl_mlx.convert.gguf.reader import GGUFFile
from rl_mlx.errors import FormatError, ModelNotFound

F32 = npt.NDArray[np.float32]
Importance = Mapping[str, F32]
"""GGUF name of a tensor -> float32 ``[experts, columns]``; a plain matrix counts as one expert."""
_SUMS, _COUNTS = ".in_sum2", ".counts"
_MAX_NAME = 1 << 12


def read_imatrix(path: Path) -> Importance:
    """The importance of the columns of each tensor.

    Raises ``ModelNotFound`` where there is no file, and ``FormatError`` where it is none of the two
    forms, is damaged, or holds numbers that cannot be.
    """
    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except FileNotFoundError as error:
        raise ModelNotFound(f"{path}: there is no such importance matrix") from error
    found = _from_gguf(path) if magic == b"GGUF" else _from_dat(path)
    for name, values in found.items():
        if not (np.isfinite(values) & (values >= 0)).all():
            raise FormatError(f"{path}: the importance of {name!r} has values that cannot be")
    if not found:
        raise FormatError(f"{path}: it holds no importance of any tensor")
    return found


def _from_gguf(path: Path) -> dict[str, F32]:
    with GGUFFile.open(path) as file:
        if file.str("general.type", "") != "imatrix":
            raise FormatError(f"{path}: a GGUF file, but of no importance matrix")
        found = {}
        for sums in file.tensors:
            name = sums.removesuffix(_SUMS)
            if name == sums:
                continue
            if name + _COUNTS not in file.tensors:
                raise FormatError(f"{path}: the counts of {name!r} are missing")
            total, counts = _floats(file, sums), _floats(file, name + _COUNTS).reshape(-1, 1)
            total = total.reshape(len(counts), -1)
            # An expert that never was chosen weighs all its columns alike.
            found[name] = np.where(counts > 0, total / np.maximum(counts, 1), np.float32(1))
    return found


def _floats(file: GGUFFile, name: str) -> F32:
    if file.tensors[name].type.name != "F32":
        raise FormatError(f"{file.paths[0]}: {name!r} must be float32")
    return file.raw(name).view(np.float32).copy()


def _from_dat(path: Path) -> dict[str, F32]:
    """Entries of a name, the number of calls, and that many times the mean of squares."""
    data = path.read_bytes()
    found = {}
    try:
        (entries,), at = struct.unpack_from("<i", data), 4
        for _ in range(entries):
            (length,) = struct.unpack_from("<i", data, at)
            if not 0 < length <= _MAX_NAME:
                raise FormatError(f"{path}: no importance matrix of llama.cpp, or a damaged one")
            name = data[at + 4 : at + 4 + length].decode()
            calls, count = struct.unpack_from("<ii", data, at + 4 + length)
            at += 12 + length
            if count < 1 or at + 4 * count > len(data):
                raise FormatError(f"{path}: the file ends within {name!r}; copy it again")
            values = np.frombuffer(data, "<f4", count, at).astype(np.float32)
            at += 4 * count
            found[name] = values[None] / np.float32(max(calls, 1))
    except (struct.error, UnicodeDecodeError) as error:
        raise FormatError(f"{path}: no importance matrix of llama.cpp, or a damaged one") from error
    return found
