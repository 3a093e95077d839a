"""ggml's own encoders, by ctypes, from the shared library that llama.cpp's binding brings.

Of its API only ``ggml_quantize_chunk`` and what describes its types is used. The library is opened
when it is first needed, once a process.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import platform
import sys
from ctypes import POINTER, c_bool, c_float, c_int, c_int64, c_size_t, c_void_p
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from rl_mlx.convert.gguf.types import GGMLType
from rl_mlx.errors import BackendUnavailable

F32 = npt.NDArray[np.float32]
_INSTALL = "install llama.cpp's binding: pip install 'rl-mlx[llamacpp]'"
# name -> (result, *arguments)
_PROTOTYPES = {
    "ggml_quantize_chunk": (
        c_size_t, c_int, POINTER(c_float), c_void_p, c_int64, c_int64, c_int64, POINTER(c_float)
    ),
    "ggml_quantize_requires_imatrix": (c_bool, c_int),
    "ggml_validate_row_data": (c_bool, c_int, c_void_p, c_size_t),
    "ggml_blck_size": (c_int64, c_int),
    "ggml_type_size": (c_size_t, c_int),
}  # fmt: skip
_WHEEL_NEEDS = {"avx2", "fma", "f16c", "bmi2"}


def quantize(values: F32, kind: GGMLType, importance: F32 | None = None) -> npt.NDArray[np.uint8]:
    """Encode float32 ``[rows, columns]`` as blocks, uint8 ``[rows, row_bytes]``.

    ``importance`` is float32 ``[columns]``: how much an error in each column matters. ``values``
    must be finite, and ``columns`` whole blocks. Other threads run meanwhile. Raises
    ``BackendUnavailable`` where there is no library, or one that has the type otherwise, and
    ``OverflowError`` where a scale overflows float16.
    """
    api = _library()
    block = (api.ggml_blck_size(kind), api.ggml_type_size(kind))
    if block != (kind.block_size, kind.block_bytes):
        raise BackendUnavailable(f"llama.cpp's binding has another {kind.name}; {_INSTALL}")
    assert importance is not None or not api.ggml_quantize_requires_imatrix(kind)
    rows, columns = values.shape
    assert columns % kind.block_size == 0
    source = np.ascontiguousarray(values, np.float32)
    raw = np.empty((rows, columns // kind.block_size * kind.block_bytes), np.uint8)
    weights = None
    if importance is not None:
        weights = np.ascontiguousarray(importance, np.float32)
        assert weights.shape == (columns,)
    done = api.ggml_quantize_chunk(
        kind, _floats(source), raw.ctypes.data, 0, rows, columns, _floats(weights)
    )
    assert done == raw.nbytes
    if not api.ggml_validate_row_data(kind, raw.ctypes.data, raw.nbytes):
        raise OverflowError(f"a scale of {kind.name} overflows float16")
    return raw


def _floats(array: F32 | None) -> Any:
    return None if array is None else array.ctypes.data_as(POINTER(c_float))


@functools.cache
def _library() -> ctypes.CDLL:
    spec = importlib.util.find_spec("xllamacpp")
    if spec is None or spec.origin is None:
        raise BackendUnavailable(f"these types are encoded by llama.cpp's code; {_INSTALL}")
    _check_processor()
    folder = Path(spec.origin).parent
    path = next((p for p in folder.glob("xllamacpp*") if p.suffix in {".so", ".dylib"}), None)
    if path is None:
        raise BackendUnavailable(f"llama.cpp's binding in {folder} has no library; {_INSTALL}")
    try:
        library = ctypes.CDLL(str(path))
        for name, (result, *arguments) in _PROTOTYPES.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
    except (OSError, AttributeError) as error:
        raise BackendUnavailable(f"llama.cpp's library cannot be used: {error}") from error
    return library


def _check_processor() -> None:
    """An instruction that the CPU lacks would kill the process."""
    if sys.platform != "linux" or platform.machine().lower() not in {"x86_64", "amd64"}:
        return
    line = next((x for x in _cpuinfo().splitlines() if x.startswith("flags")), "")
    missing = _WHEEL_NEEDS - set(line.split())
    if line and missing:
        raise BackendUnavailable(
            f"llama.cpp's wheel needs {', '.join(sorted(missing)).upper()}, which this CPU lacks; "
            "build it here: pip install --no-binary xllamacpp xllamacpp"
        )


def _cpuinfo() -> str:
    path = Path("/proc/cpuinfo")
    return path.read_text("utf-8", "replace") if path.exists() else ""
