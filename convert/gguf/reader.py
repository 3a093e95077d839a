"""Open a GGUF model, in one file or many: the header is parsed, the tensors stay in the file."""

from __future__ import annotations

import builtins
import mmap
import re
import stat
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any, Literal, NoReturn

import numpy as np
import numpy.typing as npt

from rl_mlx.convert.gguf.header import AGAIN, Header, TensorInfo, Value, quote, read_header
from rl_mlx.convert.gguf.strings import StringArray
from rl_mlx.convert.gguf.types import GGMLType, ValueType
from rl_mlx.errors import FormatError, InvalidRequest, ModelNotFound, UnsupportedModel

__all__ = ["GGMLType", "GGUFFile", "StringArray", "TensorInfo", "Value", "ValueType"]

_PART_NAME = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf", re.DOTALL)


class GGUFFile:
    """A GGUF model opened by its header alone; a context manager.

    ``metadata`` (the first part's) maps to Python scalars, ``str``, NumPy arrays that are views of
    the file, ``StringArray`` for arrays of strings, and tuples for arrays of arrays. Bytes of a
    value that are not UTF-8 become lone surrogates (PEP 383); keys and tensor names must be UTF-8.
    ``tensors`` are in file order, part after part; bytes after the last one are ignored, as
    llama.cpp does.
    """

    def __init__(self, parts: tuple[Header, ...]) -> None:
        """Join the headers of all parts; ``GGUFFile.open`` finds and reads them."""
        self.paths = tuple(part.path for part in parts)
        self.version: builtins.int = parts[0].version
        self.byte_order: Literal["little", "big"] = "little" if parts[0].order == "<" else "big"
        self.metadata: Mapping[builtins.str, Value] = parts[0].metadata
        tensors: dict[builtins.str, TensorInfo] = {}
        for i, part in enumerate(parts):
            for tensor in part.tensors:
                if tensor.name in tensors:
                    raise FormatError(
                        f"{part.path}: tensor {quote(tensor.name)} is in another part too; {AGAIN}"
                    )
                tensors[tensor.name] = replace(tensor, part=i)
        self.tensors: Mapping[builtins.str, TensorInfo] = MappingProxyType(tensors)
        self._parts = parts
        self._bytes = tuple(np.frombuffer(part.data, np.uint8) for part in parts)

    @classmethod
    def open(cls, path: Path | builtins.str) -> GGUFFile:
        """Open the model that ``path`` is, or is any part of.

        Raises ``ModelNotFound`` where a file is missing, ``FormatError`` where one is damaged or
        not GGUF, and ``UnsupportedModel`` for a version or tensor type that we lack.
        """
        return cls(_read_parts(Path(path)))

    def release(self) -> None:
        """Give the pages read so far back to the system; arrays stay valid, and read them again."""
        for part in self._parts:
            if isinstance(part.data, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
                part.data.madvise(mmap.MADV_DONTNEED)

    def close(self) -> None:
        """Let go of the tensors; arrays already taken stay valid, and keep the file mapped."""
        self._parts = ()
        self._bytes = ()

    def __enter__(self) -> GGUFFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def raw(self, name: builtins.str) -> npt.NDArray[np.uint8]:
        """The bytes of a tensor, ``[*shape[:-1], row_bytes]``, read-only and little-endian.

        It is a view of the file, but a copy where a big-endian file's plain numbers were swapped.
        Raises ``FormatError`` where there is no such tensor, and ``UnsupportedModel`` for quantized
        ones of a big-endian file.
        """
        if name not in self.tensors:
            raise FormatError(f"{self.paths[0]}: there is no tensor {quote(name)}")
        if not self._parts:
            raise InvalidRequest(f"{self.paths[0]} has been closed; open it again")
        info = self.tensors[name]
        raw = self._bytes[info.part][info.offset : info.offset + info.nbytes]
        if self._parts[info.part].order == ">":
            raw = self._swapped(info, raw)
        return raw.reshape(*info.shape[:-1], -1)

    def _swapped(self, info: TensorInfo, raw: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        if info.type.block_size > 1:
            raise UnsupportedModel(
                f"{self.paths[info.part]}: tensor {quote(info.name)} is big-endian "
                f"{info.type.name}; run gguf-convert-endian on the file, or use a little-endian one"
            )
        swapped = raw.reshape(-1, info.type.block_bytes)[:, ::-1].reshape(-1)
        swapped.flags.writeable = False
        return swapped

    def get(self, key: builtins.str, default: Any = None) -> Any:
        """The metadata value of ``key``, else ``default``."""
        return self.metadata.get(key, default)

    def str(self, key: builtins.str, default: builtins.str | None = None) -> builtins.str:
        """A string.

        This and the accessors below raise ``FormatError`` for a value of another type, and for an
        absent one where no default is given.
        """
        value = self._get(key, default)
        return value if isinstance(value, str) else self._wrong(key, "a string", value)

    def bool(self, key: builtins.str, default: builtins.bool | None = None) -> builtins.bool:
        """A truth value."""
        value = self._get(key, default)
        return value if isinstance(value, bool) else self._wrong(key, "true or false", value)

    def int(self, key: builtins.str, default: builtins.int | None = None) -> builtins.int:
        """A whole number."""
        value = self._get(key, default)
        return value if type(value) is int else self._wrong(key, "a whole number", value)

    def float(self, key: builtins.str, default: builtins.float | None = None) -> builtins.float:
        """A number, whole ones included."""
        value = self._get(key, default)
        return float(value) if type(value) in (int, float) else self._wrong(key, "a number", value)

    def array(self, key: builtins.str, default: npt.NDArray[Any] | None = None) -> npt.NDArray[Any]:
        """An array of numbers or truth values, one-dimensional."""
        value = self._get(key, default)
        return value if isinstance(value, np.ndarray) else self._wrong(key, "numbers", value)

    def strings(self, key: builtins.str) -> StringArray:
        """An array of strings."""
        value = self._get(key, None)
        return value if isinstance(value, StringArray) else self._wrong(key, "strings", value)

    def _get(self, key: builtins.str, default: Any) -> Any:
        value = self.metadata.get(key, default)
        if value is None:
            raise FormatError(
                f"{self.paths[0]}: there is no metadata key {quote(key)}; "
                "use another version of the model"
            )
        return value

    def _wrong(self, key: builtins.str, expected: builtins.str, value: Any) -> NoReturn:
        found = type(value).__name__
        raise FormatError(
            f"{self.paths[0]}: metadata key {quote(key)} must be {expected}, not {found}; "
            "use another version of the model"
        )


def _read_parts(path: Path) -> tuple[Header, ...]:
    """The header of the one file, or those of all parts in order, checked against each other."""
    given = _read(path)
    count = _split_number(given, "split.count", 1)
    if count <= 1:
        return (given,)
    paths = _part_paths(path, count)
    parts = tuple(given if other == path else _read(other) for other in paths)
    for i, part in enumerate(parts):
        for key, expected in (("split.count", count), ("split.no", i)):
            if (number := _split_number(part, key, -1)) != expected:
                raise FormatError(
                    f"{part.path}: {key} is {number} where its name says {expected}; "
                    "give the parts the names they had"
                )
    found = sum(len(part.tensors) for part in parts)
    expected = _split_number(parts[0], "split.tensors.count", found)
    if found != expected:
        raise FormatError(f"{path}: its parts have {found} tensors, not {expected}; {AGAIN}")
    return parts


def _part_paths(path: Path, count: int) -> list[Path]:
    """The paths of all parts, by the name of one of them."""
    match = _PART_NAME.fullmatch(path.name)
    if not match or int(match[3]) != count:
        raise FormatError(
            f"{path}: one of {count} parts, so its name must end in -0000N-of-{count:05}.gguf; "
            "give the parts the names they had, in one folder"
        )
    paths = [path.with_name(f"{match[1]}-{i:05}-of-{count:05}.gguf") for i in range(1, count + 1)]
    missing = [other.name for other in paths if not other.exists()]
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise ModelNotFound(
            f"{path}: of its {count} parts {', '.join(missing[:3])}{more} are missing; "
            "download them into the same folder"
        )
    return paths


def _split_number(header: Header, key: str, default: int) -> int:
    value = header.metadata.get(key, default)
    if type(value) is not int:
        found = type(value).__name__
        raise FormatError(f"{header.path}: {key} must be a whole number, not {found}; {AGAIN}")
    return value


def _read(path: Path) -> Header:
    try:
        status = path.stat()
        if stat.S_ISDIR(status.st_mode):
            raise FormatError(f"{path}: this is a folder; give a GGUF file in it")
        if not stat.S_ISREG(status.st_mode):
            raise FormatError(f"{path}: this is a device or a pipe; give a GGUF file")
        if not status.st_size:
            raise FormatError(f"{path}: the file is empty; download it again")
        with path.open("rb") as file:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (FileNotFoundError, NotADirectoryError):
        raise ModelNotFound(f"{path}: there is no such file; check the path") from None
    except (OSError, ValueError) as error:  # a NUL in the path is a ValueError
        reason = getattr(error, "strerror", error)
        raise FormatError(f"{path}: cannot be read ({reason}); check its permissions") from error
    return read_header(path, data)
