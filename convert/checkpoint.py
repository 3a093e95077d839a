"""An MLX folder, as ``mlx_lm.load`` reads it: written tensor by tensor.

The safetensors header goes before the data but is known after it, so room for it is kept and filled
up with spaces, as the format allows.
"""

from __future__ import annotations

import errno
import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

from rl_mlx.convert.families import FAMILIES
from rl_mlx.convert.floats import DTYPES
from rl_mlx.convert.pieces import Holding
from rl_mlx.convert.weights import Dense, Tensor

SHARD_BYTES = 5_000_000_000
"""Of a file; a larger tensor has a file to itself."""
_FLOATS: Mapping[str, str] = MappingProxyType(
    {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
)
_FLUSH = 32 << 20  # bytes after which the disk is set to work, while others are computed
_ENTRY = 160  # bytes of JSON that a tensor's type, shape and place take at most, for 4 axes


@dataclass(frozen=True)
class _Part:
    """An array of a tensor: its place in the file, from the first byte after the header."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int


class ShardWriter:
    """The weights of a folder, in files of at most ``limit`` bytes.

    A tensor is begun, and written in pieces, in any order and by any thread. Begun again, under
    another ``Holding``, it takes the place of the first try.
    """

    def __init__(self, folder: Path, names: Sequence[str], limit: int = SHARD_BYTES) -> None:
        self.total = 0
        self._folder = folder
        self._limit = limit
        room = sum(3 * (len(json.dumps(name)) + _ENTRY) for name in names) + 64
        self._room = -(-room // 8) * 8
        self._shards: list[list[_Part]] = []
        self._file: int | None = None
        self._current: list[_Part] = []
        self._disk = ThreadPoolExecutor(1, "disk")
        self._flushes: list[Future[None]] = []
        self._unflushed = 0

    def begin(self, name: str, shape: tuple[int, ...], holding: Holding) -> None:
        """Make room for a tensor; what was written of one with the same name is forgotten."""
        self._drop(name)
        sizes = _arrays(name, shape, holding)
        nbytes = sum(size for *_, size in sizes)
        end = self._end()
        if self._file is None or (end and end + nbytes > self._limit):
            self._next()
            end = 0
        self._current = []
        for array, dtype, dims, size in sizes:
            self._current.append(_Part(array, dtype, dims, end, size))
            end += size
        self._shards[-1] += self._current
        _reserve(self._file, 8 + self._room + end - nbytes, nbytes)

    def write(self, piece: Tensor, start: int, rows: int) -> None:
        """Rows from ``start`` on of the ``rows`` of the tensor that was begun."""
        assert self._file is not None
        arrays = [piece.array] if isinstance(piece, Dense) else [piece.weight, piece.scales]
        if not isinstance(piece, Dense) and piece.biases is not None:
            arrays.append(piece.biases)
        for part, array in zip(self._current, arrays, strict=True):
            before = part.nbytes // rows * start
            assert before + array.nbytes <= part.nbytes
            _write_at(self._file, array, 8 + self._room + part.start + before)
        self._unflushed += sum(array.nbytes for array in arrays)  # near enough, of all threads
        if self._unflushed >= _FLUSH:
            self._unflushed = 0
            self._flushes.append(self._disk.submit(os.fsync, self._file))

    def finish(self, parameters: int) -> list[str]:
        """Write headers and index; returns the names of the files."""
        self._close()
        count = len(self._shards)
        places: dict[str, str] = {}
        names = []
        for i, parts in enumerate(self._shards):
            name = f"model-{i + 1:05}-of-{count:05}.safetensors" if count > 1 else _WHOLE
            self._path(i).rename(self._folder / name)
            places |= {part.name: name for part in parts}
            self.total += sum(part.nbytes for part in parts)
            names.append(name)
        index = {
            "metadata": {"total_size": self.total, "total_parameters": parameters},
            "weight_map": dict(sorted(places.items())),
        }
        write_json(self._folder / "model.safetensors.index.json", index)
        return names

    def abandon(self) -> None:
        """Let go of the file that is being written."""
        self._disk.shutdown(cancel_futures=True)
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _drop(self, name: str) -> None:
        if self._current and self._current[0].name == name:
            del self._shards[-1][-len(self._current) :]
            self._current = []

    def _end(self) -> int:
        """The byte after the last tensor of the open file."""
        parts = self._shards[-1] if self._shards else []
        return parts[-1].start + parts[-1].nbytes if parts else 0

    def _next(self) -> None:
        self._close()
        self._shards.append([])
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL
        self._file = os.open(self._path(len(self._shards) - 1), flags, 0o666)

    def _path(self, shard: int) -> Path:
        return self._folder / f"shard-{shard}"

    def _close(self) -> None:
        """Put the header before the data of the open file."""
        if self._file is None:
            return
        header: dict[str, Any] = {"__metadata__": {"format": "mlx"}}
        for part in self._shards[-1]:
            header[part.name] = {
                "dtype": part.dtype,
                "shape": part.shape,
                "data_offsets": [part.start, part.start + part.nbytes],
            }
        text = json.dumps(header, separators=(",", ":")).encode()
        assert len(text) <= self._room
        octets = self._room.to_bytes(8, "little") + text.ljust(self._room)
        _write_at(self._file, np.frombuffer(octets, np.uint8), 0)
        os.ftruncate(self._file, 8 + self._room + self._end())
        for flush in self._flushes:
            flush.result()
        self._flushes = []
        os.close(self._file)
        self._file = None


_WHOLE = "model.safetensors"


def _arrays(
    name: str, shape: tuple[int, ...], holding: Holding
) -> list[tuple[str, str, tuple[int, ...], int]]:
    """Name, type, shape and bytes of the arrays that hold a tensor."""
    size = DTYPES[holding.dtype].itemsize
    count = int(np.prod(shape, dtype=np.int64))
    if not holding.bits:
        return [(name, _FLOATS[holding.dtype], shape, count * size)]
    *lead, columns = shape
    module = name.removesuffix(".weight")
    groups = (*lead, columns // holding.group_size)
    words = (*lead, columns * holding.bits // 32)
    found = [(name, "U32", words, count * holding.bits // 8)]
    affine = holding.mode == "affine"
    for part in ("scales", "biases") if affine else ("scales",):
        kind, each = (_FLOATS[holding.dtype], size) if affine else ("U8", 1)
        found.append((f"{module}.{part}", kind, groups, count // holding.group_size * each))
    return found


def _reserve(file: int | None, offset: int, size: int) -> None:
    """Take room on the disk where that is known: a full one is seen now, and writing is cheaper."""
    if file is None or not size or not hasattr(os, "posix_fallocate"):
        return
    try:
        os.posix_fallocate(file, offset, size)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):  # of file systems that cannot
            raise


def _write_at(file: int, array: npt.NDArray[Any], offset: int) -> None:
    view = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
    while view:  # a call writes at most 2 GB
        done = os.pwrite(file, view[: 1 << 30], offset)
        view, offset = view[done:], offset + done


def mlx_config(
    config: Mapping[str, Any], holdings: Mapping[str, tuple[Holding, int]]
) -> dict[str, Any]:
    """``config`` with how each module is held, as mlx-lm wants it.

    ``holdings`` has the holding of each tensor, and its number of weights. ``quantization`` names
    the commonest container; modules in another have an entry of their own there.
    """
    told = {k: v for k, v in config.items() if k not in ("quantization", "quantization_config")}
    family = FAMILIES.get(str(told.get("model_type")))
    if family is not None and family.mlx_type is not None:
        told["model_type"] = family.mlx_type
    floats: Counter[str] = Counter()
    containers: Counter[Holding] = Counter()
    for holding, weights in holdings.values():
        floats[holding.dtype] += weights if holding.mode == "affine" else 0
        if holding.bits:
            containers[_bare(holding)] += weights
    told["dtype"] = told["torch_dtype"] = floats.most_common(1)[0][0]
    if containers:
        usual = containers.most_common(1)[0][0]
        others = {
            name.removesuffix(".weight"): _words(holding)
            for name, (holding, _) in holdings.items()
            if holding.bits and _bare(holding) != usual
        }
        # Twice, as mlx-lm writes it: the hub looks for the second name.
        told["quantization"] = told["quantization_config"] = _words(usual) | others
    return told


def _bare(holding: Holding) -> Holding:
    return Holding("float32", holding.bits, holding.group_size, holding.mode)


def _words(holding: Holding) -> dict[str, Any]:
    return {"group_size": holding.group_size, "bits": holding.bits, "mode": holding.mode}


def write_json(path: Path, value: Any) -> None:
    """Indented, as people and ``git diff`` want it."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", "utf-8")
