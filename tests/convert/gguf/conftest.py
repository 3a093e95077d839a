"""Blocks to test with, and ggml's own arithmetic to test against."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from rl_mlx.convert.gguf.types import GGMLType

U8 = npt.NDArray[np.uint8]
F32 = npt.NDArray[np.float32]

# Byte offsets of the float16 fields of a block (IQ1_M's one is spread over its last bytes).
HALVES: dict[GGMLType, tuple[int, ...]] = {
    GGMLType.Q4_0: (0,),
    GGMLType.Q4_1: (0, 2),
    GGMLType.Q5_0: (0,),
    GGMLType.Q5_1: (0, 2),
    GGMLType.Q8_0: (0,),
    GGMLType.Q1_0: (0,),
    GGMLType.Q2_0: (0,),
    GGMLType.Q2_K: (80, 82),
    GGMLType.Q3_K: (108,),
    GGMLType.Q4_K: (0, 2),
    GGMLType.Q5_K: (0, 2),
    GGMLType.Q6_K: (208,),
    GGMLType.IQ1_S: (0,),
    GGMLType.IQ2_XXS: (0,),
    GGMLType.IQ2_XS: (0,),
    GGMLType.IQ2_S: (0,),
    GGMLType.IQ3_XXS: (0,),
    GGMLType.IQ3_S: (0,),
    GGMLType.IQ4_NL: (0,),
    GGMLType.IQ4_XS: (0,),
    GGMLType.TQ1_0: (52,),
    GGMLType.TQ2_0: (64,),
}


def set_halves(blocks: U8, ggml_type: GGMLType, values: npt.NDArray[np.float16]) -> None:
    """Write float16 ``[n]`` into every float16 field of ``blocks`` ``[n, type_size]``."""
    octets = values[:, None].view(np.uint8)
    for at in HALVES.get(ggml_type, ()):
        blocks[:, at : at + 2] = octets
    if ggml_type is GGMLType.IQ1_M:
        for part, shift in enumerate((0, 4, 8, 12)):
            nibble = ((values.view(np.uint16) >> shift) & 15).astype(np.uint8) << 4
            blocks[:, 49 + 2 * part] = (blocks[:, 49 + 2 * part] & 15) | nibble


@pytest.fixture(scope="session")
def with_halves() -> Callable[..., U8]:
    """Blocks of a type, one for each given float16, which is in all its float16 fields.

    The other bytes are random, or all the given one.
    """

    def make(ggml_type: GGMLType, values: npt.NDArray[np.float16], octet: int | None = None) -> U8:
        rng = np.random.default_rng(int(ggml_type))
        low, high = (0, 256) if octet is None else (octet, octet + 1)
        blocks = rng.integers(low, high, (len(values), ggml_type.block_bytes), np.uint8)
        set_halves(blocks, ggml_type, values)
        return blocks

    return make


@pytest.fixture(scope="session")
def sound_rows(with_halves: Callable[..., U8]) -> Callable[..., U8]:
    """Rows of random blocks whose scales are ordinary numbers, uint8 ``[*lead, row_bytes]``."""

    def make(ggml_type: GGMLType, *lead: int, blocks: int = 2) -> U8:
        rng = np.random.default_rng(1)
        count = int(np.prod(lead)) * blocks
        made = with_halves(ggml_type, rng.normal(0, 0.02, count).astype(np.float16))
        if ggml_type is GGMLType.MXFP4:
            made[:, 0] = rng.integers(100, 140, count)
        if ggml_type is GGMLType.NVFP4:
            made[:, :4] = rng.integers(0, 0x7F, (count, 4))
        if ggml_type in (GGMLType.F32, GGMLType.F16, GGMLType.BF16, GGMLType.F64):
            made[:, -1] = 0x30
        return made.reshape(*lead, blocks * ggml_type.block_bytes)

    return make


class Ggml:
    """ggml's reference functions, out of the llama.cpp binding's library."""

    def __init__(self, path: Path) -> None:
        self._library = ctypes.CDLL(str(path))
        self._quantize = self._library.ggml_quantize_chunk
        self._quantize.restype = ctypes.c_size_t
        integer, pointer, long = ctypes.c_int, ctypes.c_void_p, ctypes.c_int64
        self._quantize.argtypes = [integer, pointer, pointer, long, long, long, pointer]

    def dequantize(self, blocks: U8, ggml_type: GGMLType) -> F32:
        """Decode contiguous blocks to float32 ``[n, block_size]``."""
        name = ggml_type.name
        name = name.replace("K", "k").lower().replace("_k", "_K")
        function = getattr(self._library, f"dequantize_row_{name}")
        function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
        out = np.empty((len(blocks), ggml_type.block_size), np.float32)
        function(blocks.ctypes.data, out.ctypes.data, out.size)
        return out

    def quantize(self, weights: F32, ggml_type: GGMLType) -> U8:
        """Encode float32 ``[rows, columns]`` into uint8 ``[rows, row_bytes]``."""
        rows, columns = weights.shape
        row_bytes = columns // ggml_type.block_size * ggml_type.block_bytes
        out = np.empty((rows, row_bytes), np.uint8)
        importance = np.ones(columns, np.float32)
        written = self._quantize(
            int(ggml_type),
            np.ascontiguousarray(weights).ctypes.data,
            out.ctypes.data,
            0,
            rows,
            columns,
            importance.ctypes.data,
        )
        assert written == out.size
        return out


@pytest.fixture(scope="session")
def ggml() -> Ggml:
    """ggml's arithmetic; tests are skipped where the llama.cpp binding is not installed."""
    binding = pytest.importorskip("xllamacpp", reason="needs the llama.cpp binding (xllamacpp)")
    libraries = sorted(Path(binding.__file__).parent.glob("xllamacpp*.so"))
    if not libraries:
        pytest.skip("the llama.cpp binding has no shared library that can be opened here")
    return Ggml(libraries[0])


@pytest.fixture
def write_dat() -> Callable[..., None]:
    """Write an importance matrix as llama-imatrix did before GGUF: ``(path, {name: values})``."""

    def write(path, values, calls=1):
        parts = [struct.pack("<i", len(values))]
        for name, array in values.items():
            text = name.encode()
            parts.append(struct.pack("<i", len(text)) + text)
            parts.append(struct.pack("<ii", calls, array.size) + array.astype("<f4").tobytes())
        parts.append(struct.pack("<ii", calls, 4) + b"text")
        path.write_bytes(b"".join(parts))

    return write
