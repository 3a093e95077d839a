"""Block types against gguf-py, ggml and hand-made bytes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rl_mlx.convert.gguf.blocks import BLOCKS, Lattice, Plain, block
from rl_mlx.convert.gguf.types import GGMLType
from rl_mlx.errors import FormatError, UnsupportedModel

U8 = npt.NDArray[np.uint8]

ALL = sorted(BLOCKS)
LATTICES = [t for t in ALL if isinstance(BLOCKS[t], Lattice)]
# gguf-py names these but cannot decode them; Q2_0 is newer than it.
NOT_IN_GGUF_PY = {GGMLType.Q1_0, GGMLType.Q2_0}
IN_GGUF_PY = [t for t in LATTICES if t not in NOT_IN_GGUF_PY]

FILES = [
    *("IQ4_XS", "Q2_K", "Q3_K_M", "Q4_0", "Q4_1", "Q4_K_M"),
    *("Q5_0", "Q5_1", "Q5_K_M", "Q6_K", "Q8_0", "TQ2_0"),
]


def by_gguf_py(raw: U8, ggml_type: GGMLType) -> np.ndarray:
    with np.errstate(all="ignore"):
        return gguf.dequantize(raw, gguf.GGMLQuantizationType(int(ggml_type)))


def same(got: np.ndarray, expected: np.ndarray) -> bool:
    return got.dtype == np.float32 and np.array_equal(got, expected, equal_nan=True)


def test_every_type_that_a_file_can_hold_is_known() -> None:
    inside_ggml_only = {"Q8_1", "Q8_K"}
    named = {t.name for t in gguf.GGMLQuantizationType} - inside_ggml_only
    assert named <= {t.name for t in BLOCKS}


@pytest.mark.parametrize("ggml_type", ALL, ids=lambda t: t.name)
def test_sizes_are_gguf_py_s(ggml_type: GGMLType) -> None:
    kind = block(ggml_type)
    assert kind.type is ggml_type
    sizes = {t.name: size for t, size in gguf.GGML_QUANT_SIZES.items()} | {"Q2_0": (64, 18)}
    assert (kind.block_size, kind.type_size) == sizes[ggml_type.name]


@pytest.mark.parametrize(
    "ggml_type", [*IN_GGUF_PY, GGMLType.F32, GGMLType.F16, GGMLType.BF16], ids=lambda t: t.name
)
def test_any_bytes_decode_as_gguf_py_does(ggml_type: GGMLType) -> None:
    rng = np.random.default_rng(int(ggml_type))
    raw = rng.integers(0, 256, (3, 5, 40 * ggml_type.block_bytes), np.uint8)
    assert same(block(ggml_type).decode(raw), by_gguf_py(raw, ggml_type))


@pytest.mark.parametrize("ggml_type", IN_GGUF_PY, ids=lambda t: t.name)
def test_every_float16_scale_decodes_as_gguf_py_does(
    ggml_type: GGMLType, with_halves: Callable[..., U8]
) -> None:
    step = 1 if ggml_type.block_size == 32 else 13  # of all signs, subnormals, infinities, NaN
    patterns = np.arange(0, 1 << 16, step, dtype=np.uint16)
    raw = with_halves(ggml_type, patterns.view(np.float16))
    assert same(block(ggml_type).decode(raw), by_gguf_py(raw, ggml_type))


@pytest.mark.parametrize("octet", [0x00, 0x7F, 0x80, 0xFF, 0x55])
@pytest.mark.parametrize("ggml_type", IN_GGUF_PY, ids=lambda t: t.name)
def test_extreme_codes_decode_as_gguf_py_does(
    ggml_type: GGMLType, octet: int, with_halves: Callable[..., U8]
) -> None:
    halves = np.array([6e-8, -6e-8, 6.1e-5, 65504, -65504, 1, np.inf, -np.inf, np.nan], np.float16)
    raw = with_halves(ggml_type, halves, octet)
    assert same(block(ggml_type).decode(raw), by_gguf_py(raw, ggml_type))


@pytest.mark.parametrize("ggml_type", LATTICES, ids=lambda t: t.name)
def test_ggml_itself_agrees(ggml_type: GGMLType, sound_rows: Callable[..., U8], ggml: Any) -> None:
    blocks = sound_rows(ggml_type, 200, blocks=1)
    assert same(block(ggml_type).decode(blocks), ggml.dequantize(blocks, ggml_type))


@pytest.mark.parametrize(
    "ggml_type", [t for t in ALL if isinstance(BLOCKS[t], Plain)], ids=lambda t: t.name
)
def test_plain_numbers_are_views(ggml_type: GGMLType) -> None:
    kind = block(ggml_type)
    assert isinstance(kind, Plain)
    raw = np.random.default_rng(0).integers(0, 64, (2, 3, 5 * kind.type_size), np.uint8)
    array = kind.view(raw)
    assert array.shape == (2, 3, 5)
    assert np.shares_memory(array, raw)
    dtypes = {"F": "<f", "I": "<i"}
    if ggml_type is not GGMLType.BF16:
        expected = np.frombuffer(raw.tobytes(), f"{dtypes[ggml_type.name[0]]}{kind.type_size}")
        assert np.array_equal(array.ravel(), expected)
        assert same(kind.decode(raw).ravel(), expected.astype(np.float32))


def half(value: float) -> bytes:
    return np.float16(value).tobytes()


def test_q4_0_by_hand() -> None:
    octets = half(0.5) + bytes(range(16))  # low nibbles 0-15, high ones 0
    expected = [0.5 * (q - 8) for q in range(16)] + [-4.0] * 16
    assert block(GGMLType.Q4_0).decode(np.frombuffer(octets, np.uint8)).tolist() == expected


def test_q4_1_by_hand() -> None:
    octets = half(2) + half(-3) + bytes([0xF1] * 16)
    expected = [2.0 * 1 - 3] * 16 + [2.0 * 15 - 3] * 16
    assert block(GGMLType.Q4_1).decode(np.frombuffer(octets, np.uint8)).tolist() == expected


def test_q5_0_by_hand() -> None:
    fifth = (0b1001).to_bytes(4, "little")  # of the first and the fourth weight
    octets = half(1) + fifth + bytes([0x20] * 16)
    expected = [0.0, -16, -16, 0] + [-16.0] * 12 + [-14.0] * 16
    assert block(GGMLType.Q5_0).decode(np.frombuffer(octets, np.uint8)).tolist() == expected


def test_q5_1_by_hand() -> None:
    fifth = (1 << 31).to_bytes(4, "little")  # of the last weight
    octets = half(0.25) + half(1) + fifth + bytes([0x40] * 16)
    expected = [1.0] * 16 + [2.0] * 15 + [6.0]
    assert block(GGMLType.Q5_1).decode(np.frombuffer(octets, np.uint8)).tolist() == expected


def test_q8_0_by_hand() -> None:
    octets = half(-0.5) + bytes(range(112, 144))
    expected = [-0.5 * (q if q < 128 else q - 256) for q in range(112, 144)]
    assert block(GGMLType.Q8_0).decode(np.frombuffer(octets, np.uint8)).tolist() == expected


def test_q4_k_by_hand() -> None:
    first = [63 | 0b10 << 6, 1, 0, 0]  # sc 0-3; the upper two bits of sc 4-7
    second = [2 | 0b01 << 6, 0, 0, 62]  # m 0-3; the upper two bits of m 4-7
    third = [0x21, 0, 0, 0]  # the lower four bits of sc and m 4-7
    octets = half(0.5) + half(0.25) + bytes(first + second + third) + bytes([0xA5] * 128)
    sc, m = [63, 1, 0, 0, 33, 0, 0, 0], [2, 0, 0, 62, 18, 0, 0, 0]
    expected = [0.5 * sc[g] * (10 if g % 2 else 5) - 0.25 * m[g] for g in range(8)]
    got = block(GGMLType.Q4_K).decode(np.frombuffer(octets, np.uint8))
    assert got.reshape(8, 32).tolist() == [[value] * 32 for value in expected]


def test_mxfp4_by_hand() -> None:
    octets = bytes([127]) + bytes(n | (n << 4) for n in range(16))  # scale 1
    numbers = [0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6]  # FP4 E2M1
    assert block(GGMLType.MXFP4).decode(np.frombuffer(octets, np.uint8)).tolist() == numbers * 2


@given(
    ggml_type=st.sampled_from(ALL),
    lead=st.lists(st.integers(0, 3), max_size=3),
    blocks=st.integers(0, 3),
)
def test_rows_are_decoded_one_by_one(ggml_type: GGMLType, lead: list[int], blocks: int) -> None:
    kind = block(ggml_type)
    rng = np.random.default_rng(0)
    raw = rng.integers(0, 128, (*lead, blocks * kind.type_size), np.uint8)
    values = kind.decode(raw)
    assert values.shape == (*lead, blocks * kind.block_size)
    for index in np.ndindex(*lead):
        assert same(values[index], kind.decode(raw[index]))


@pytest.mark.parametrize("ggml_type", [t for t in ALL if t.block_bytes > 1], ids=lambda t: t.name)
def test_a_row_that_is_not_whole_blocks_is_refused(ggml_type: GGMLType) -> None:
    raw = np.zeros((2, 3 * ggml_type.block_bytes - 1), np.uint8)
    with pytest.raises(FormatError, match=f"{ggml_type.name} blocks"):
        block(ggml_type).decode(raw)


@pytest.mark.parametrize("ggml_type", [GGMLType.Q8_1, GGMLType.Q8_K])
def test_types_of_activations_are_refused(ggml_type: GGMLType) -> None:
    with pytest.raises(UnsupportedModel, match=ggml_type.name):
        block(ggml_type)


@pytest.mark.parametrize("ggml_type", LATTICES, ids=lambda t: t.name)
def test_codes_take_the_levels_that_are_told(
    ggml_type: GGMLType, sound_rows: Callable[..., U8]
) -> None:
    kind = BLOCKS[ggml_type]
    assert isinstance(kind, Lattice)
    codes = kind.codes(sound_rows(ggml_type, 400, blocks=1))
    assert np.unique(codes.q).tolist() == list(kind.levels)
    assert codes.scale.dtype == codes.biases().dtype == np.float32
    assert codes.scale.shape == (400, kind.block_size // kind.group)


@pytest.mark.shared
@pytest.mark.parametrize("name", FILES)
def test_real_files_decode_as_gguf_py_does(shared: Path, name: str) -> None:
    tensors = gguf.GGUFReader(shared / "quants" / f"qwen3-{name}.gguf").tensors
    assert tensors
    for tensor in tensors:
        raw = np.asarray(tensor.data).view(np.uint8)
        ggml_type = GGMLType(int(tensor.tensor_type))
        expected = gguf.dequantize(tensor.data, tensor.tensor_type)
        assert same(block(ggml_type).decode(raw), expected), tensor.name
