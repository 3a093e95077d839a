"""Repacking, against MLX's own unpacking and the decoded weights."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import mlx.core as mx
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rl_mlx.convert import kernels
from rl_mlx.convert.bits import pack
from rl_mlx.convert.gguf import repack as repack_module
from rl_mlx.convert.gguf.blocks import BLOCKS, Lattice, block
from rl_mlx.convert.gguf.blocks.base import Nibbles
from rl_mlx.convert.gguf.repack import container, repack
from rl_mlx.convert.gguf.types import GGMLType
from rl_mlx.convert.weights import Dense, FloatType, Packed
from rl_mlx.errors import FormatError, InvalidRequest, UnsupportedModel

U8 = npt.NDArray[np.uint8]
Rows = Callable[..., U8]

LATTICES = sorted(t for t, kind in BLOCKS.items() if isinstance(kind, Lattice))
EXACT = [t for t in LATTICES if container(t, 256).exact]
ROUNDED = [t for t in LATTICES if t not in EXACT]
FILES = [
    *("IQ4_XS", "Q2_K", "Q3_K_M", "Q4_0", "Q4_1", "Q4_K_M"),
    *("Q5_0", "Q5_1", "Q5_K_M", "Q6_K", "Q8_0", "TQ2_0"),
]


@pytest.fixture(params=["compiled", "NumPy"])
def either(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loops of both kinds, where they were compiled."""
    if request.param == "NumPy":
        monkeypatch.setattr(kernels, "library", lambda: None)
    elif kernels.library() is None:
        pytest.skip("no C compiler was there when the package was installed")


def floats(array: npt.NDArray[Any] | None, dtype: FloatType) -> mx.array | None:
    if array is None or array.dtype == np.uint8:
        return None if array is None else mx.array(array)
    return mx.array(array).view(getattr(mx, dtype)).astype(mx.float32)


def by_mlx(packed: Packed) -> np.ndarray:
    """What MLX makes of a container, float32."""
    scales, biases = floats(packed.scales, packed.dtype), floats(packed.biases, packed.dtype)
    weight = mx.array(packed.weight)
    return np.array(
        mx.dequantize(
            weight, scales, biases, packed.group_size, packed.bits, packed.mode, dtype=mx.float32
        )
    )


def repacked(raw: U8, ggml_type: GGMLType, *options: Any) -> Packed:
    packed = repack(raw, ggml_type, *options)
    assert isinstance(packed, Packed)
    return packed


def relative_rms(got: np.ndarray, expected: np.ndarray) -> float:
    return float(np.sqrt(((got - expected) ** 2).mean() / (expected**2).mean()))


def test_containers_of_the_exact_types() -> None:
    made = {t.name: (c := container(t, 256), (c.mode, c.bits, c.group_size))[1] for t in EXACT}
    assert made == {
        "Q4_0": ("affine", 4, 32),
        "Q4_1": ("affine", 4, 32),
        "Q5_0": ("affine", 5, 32),
        "Q5_1": ("affine", 5, 32),
        "Q8_0": ("affine", 8, 32),
        "Q4_K": ("affine", 4, 32),
        "Q5_K": ("affine", 5, 32),
        "IQ1_S": ("affine", 2, 32),
        "IQ3_S": ("affine", 4, 32),
        "IQ4_NL": ("affine", 8, 32),
        "IQ4_XS": ("affine", 8, 32),
        "TQ1_0": ("affine", 2, 128),
        "TQ2_0": ("affine", 2, 128),
        "Q1_0": ("affine", 1, 128),
        "Q2_0": ("affine", 2, 64),
        "MXFP4": ("mxfp4", 4, 32),
        "NVFP4": ("nvfp4", 4, 16),
    }


@pytest.mark.usefixtures("either")
@pytest.mark.parametrize("ggml_type", EXACT, ids=lambda t: t.name)
def test_exact_containers_hold_the_very_values(ggml_type: GGMLType, sound_rows: Rows) -> None:
    raw = sound_rows(ggml_type, 6, 5)
    packed = repacked(raw, ggml_type)
    assert np.array_equal(by_mlx(packed), block(ggml_type).decode(raw))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("ggml_type", LATTICES, ids=lambda t: t.name)
def test_shapes_dtypes_and_bytes_are_those_told_beforehand(
    ggml_type: GGMLType, dtype: FloatType, sound_rows: Rows
) -> None:
    packed = repacked(sound_rows(ggml_type, 3, 2, blocks=3), ggml_type, dtype)
    columns = 3 * ggml_type.block_size
    told = container(ggml_type, columns)
    arrays = [a for a in (packed.weight, packed.scales, packed.biases) if a is not None]
    assert packed.shape == (3, 2, columns)
    assert (packed.bits, packed.group_size, packed.mode) == (told.bits, told.group_size, told.mode)
    assert told.nbytes(packed.shape, dtype) == sum(array.nbytes for array in arrays)
    assert all(array.flags.c_contiguous for array in arrays)


@pytest.mark.parametrize(
    "ggml_type", [t for t in EXACT if t.name[0] in "QT" and "K" not in t.name], ids=lambda t: t.name
)
def test_types_with_one_float16_scale_are_exact_with_float16(
    ggml_type: GGMLType, sound_rows: Rows
) -> None:
    raw = sound_rows(ggml_type, 6, 5)
    packed = repacked(raw, ggml_type, "float16")
    assert packed.dtype == "float16"
    assert np.array_equal(by_mlx(packed), block(ggml_type).decode(raw))


@pytest.mark.parametrize(
    ("dtype", "bound"), [("float16", 8e-4), ("bfloat16", 6e-3)], ids=["float16", "bfloat16"]
)
@pytest.mark.parametrize("ggml_type", [GGMLType.Q4_K, GGMLType.Q5_K, GGMLType.IQ4_XS])
def test_narrow_scales_of_the_others_cost_little(
    ggml_type: GGMLType, dtype: FloatType, bound: float, ggml: Any
) -> None:
    weights = np.random.default_rng(0).normal(0, 0.02, (8, 1024)).astype(np.float32)
    raw = ggml.quantize(weights, ggml_type)
    error = relative_rms(by_mlx(repacked(raw, ggml_type, dtype)), block(ggml_type).decode(raw))
    assert 0 < error < bound


@pytest.mark.usefixtures("either")
@pytest.mark.parametrize("ggml_type", ROUNDED, ids=lambda t: t.name)
def test_rounded_containers_add_less_than_a_tenth_of_the_noise(
    ggml_type: GGMLType, ggml: Any
) -> None:
    rows = 2 if ggml_type.name.startswith("IQ") else 16  # ggml takes its time over codebooks
    weights = np.random.default_rng(0).standard_t(8, (rows, 1024)).astype(np.float32) / 50
    raw = ggml.quantize(weights, ggml_type)
    values = block(ggml_type).decode(raw)
    added = ((by_mlx(repacked(raw, ggml_type)) - values) ** 2).mean()
    assert 0 < added < 0.1 * ((values - weights) ** 2).mean()


@pytest.mark.usefixtures("either")
@pytest.mark.parametrize("ggml_type", LATTICES, ids=lambda t: t.name)
def test_every_width_stays_within_a_step(ggml_type: GGMLType, sound_rows: Rows) -> None:
    """Codes are never cut off at an end: no weight moves by more than a step of its container."""
    raw = sound_rows(ggml_type, 50, 4)
    values = block(ggml_type).decode(raw)
    kind = BLOCKS[ggml_type]
    assert isinstance(kind, Lattice)
    for bits in (bits for bits in (1, 2, 3, 4, 5, 6, 8) if len(kind.levels) <= 1 << bits):
        if container(ggml_type, values.shape[-1]).mode != "affine":
            continue
        packed = repacked(raw, ggml_type, "float32", bits)
        off = np.abs(by_mlx(packed) - values).reshape(*packed.scales.shape, -1)
        assert (off <= np.abs(packed.scales)[..., None] * 1.01).all(), bits
        if container(ggml_type, values.shape[-1], bits).exact:
            assert not off.any(), bits


@pytest.mark.usefixtures("either")
def test_a_scale_beyond_float16_keeps_the_tensor_in_float32(with_halves: Rows) -> None:
    halves = np.array([0.5, 60000], np.float16)  # the bias is 8 times the scale
    raw = with_halves(GGMLType.Q4_0, halves).reshape(1, -1)
    packed = repacked(raw, GGMLType.Q4_0, "float16")
    assert packed.dtype == "float32"
    assert packed.scales.dtype == np.float32
    assert np.array_equal(by_mlx(packed), block(GGMLType.Q4_0).decode(raw))
    assert repacked(raw[:, :18], GGMLType.Q4_0, "float16").dtype == "float16"


@pytest.mark.usefixtures("either")
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_an_infinite_scale_is_no_reason_to_fail(dtype: FloatType, with_halves: Rows) -> None:
    raw = with_halves(GGMLType.Q6_K, np.array([np.inf, np.nan, 0], np.float16)).reshape(1, -1)
    packed = repacked(raw, GGMLType.Q6_K, dtype)
    values = by_mlx(packed)[0].reshape(3, 256)
    assert not np.isfinite(values[:2]).any()
    assert not values[2].any()


@pytest.mark.parametrize("ggml_type", LATTICES, ids=lambda t: t.name)
def test_blocks_of_zeros_stay_zeros(ggml_type: GGMLType, with_halves: Rows) -> None:
    raw = with_halves(ggml_type, np.zeros(4, np.float16))
    if ggml_type in (GGMLType.MXFP4, GGMLType.NVFP4):
        raw[:] = 0
    assert not by_mlx(repacked(raw, ggml_type)).any()


@pytest.mark.parametrize(
    ("ggml_type", "dtype"),
    [(GGMLType.F32, "float32"), (GGMLType.F16, "float16"), (GGMLType.BF16, "bfloat16")],
)
def test_floats_are_views(ggml_type: GGMLType, dtype: FloatType) -> None:
    raw = np.random.default_rng(0).integers(0, 64, (2, 3, 7 * ggml_type.block_bytes), np.uint8)
    raw.flags.writeable = False
    dense = repack(raw, ggml_type)
    assert isinstance(dense, Dense)
    assert dense.dtype == dtype
    assert dense.shape == (2, 3, 7)
    assert np.shares_memory(dense.array, raw)
    told = container(ggml_type, 7)
    assert told.exact
    assert told.nbytes(dense.shape) == dense.array.nbytes


@pytest.mark.parametrize(
    ("ggml_type", "exact"),
    [("F64", False), ("I8", True), ("I16", True), ("I32", False), ("I64", False)],
)
def test_other_numbers_become_float32(ggml_type: str, exact: bool) -> None:
    numbers = np.array([[0, 1, -2, 100]])
    kind = GGMLType[ggml_type]
    stored = numbers.astype(f"<{'f' if ggml_type == 'F64' else 'i'}{kind.block_bytes}")
    dense = repack(stored.view(np.uint8), kind)
    assert isinstance(dense, Dense)
    assert dense.array.dtype == np.float32
    assert np.array_equal(dense.array, numbers)
    assert container(kind, 4).exact is exact


@pytest.mark.parametrize(
    "ggml_type", ["Q1_0", "Q2_0", "TQ2_0", "Q5_0", "Q4_K", "Q6_K", "MXFP4", "NVFP4"]
)
def test_mlx_multiplies_with_the_container(ggml_type: str, sound_rows: Rows) -> None:
    raw = sound_rows(GGMLType[ggml_type], 64, blocks=4)
    packed = repacked(raw, GGMLType[ggml_type])
    values = by_mlx(packed)
    x = np.random.default_rng(0).normal(0, 1, (3, values.shape[1])).astype(np.float32)
    weight, scales = mx.array(packed.weight), floats(packed.scales, packed.dtype)
    product = mx.quantized_matmul(
        mx.array(x),
        weight,
        scales,
        floats(packed.biases, packed.dtype),
        group_size=packed.group_size,
        bits=packed.bits,
        mode=packed.mode,
    )
    assert relative_rms(np.array(product), x @ values.T) < 1e-5


@given(
    ggml_type=st.sampled_from(LATTICES),
    lead=st.lists(st.integers(0, 3), max_size=3),
    blocks=st.integers(0, 3),
)
def test_rows_are_repacked_one_by_one(ggml_type: GGMLType, lead: list[int], blocks: int) -> None:
    rng = np.random.default_rng(0)
    raw = rng.integers(0, 100, (*lead, blocks * ggml_type.block_bytes), np.uint8)
    whole = repacked(raw, ggml_type)
    assert whole.shape == (*lead, blocks * ggml_type.block_size)
    for index in np.ndindex(*lead):
        one = repacked(raw[index], ggml_type)
        assert np.array_equal(whole.weight[index], one.weight)
        assert np.array_equal(whole.scales[index], one.scales, equal_nan=True)


@pytest.mark.parametrize("ggml_type", LATTICES, ids=lambda t: t.name)
def test_chunks_and_threads_change_nothing(
    ggml_type: GGMLType, sound_rows: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = sound_rows(ggml_type, 7, blocks=9)
    whole = repacked(raw, ggml_type)
    monkeypatch.setattr(repack_module, "CHUNK", 5 * ggml_type.block_size)
    cut = repacked(raw, ggml_type)
    assert np.array_equal(whole.weight, cut.weight)
    assert np.array_equal(whole.scales, cut.scales)


@pytest.mark.parametrize("ggml_type", [GGMLType.Q4_K, GGMLType.Q6_K, GGMLType.MXFP4])
def test_repacking_needs_its_output_and_a_few_chunks(ggml_type: GGMLType) -> None:
    rows = 32 * repack_module.CHUNK // 1024  # 32 chunks
    raw = np.zeros((rows, 1024 // ggml_type.block_size * ggml_type.block_bytes), np.uint8)
    size = container(ggml_type, 1024).nbytes((rows, 1024))
    tracemalloc.start()
    try:
        repack(raw, ggml_type)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < size + 4 * 16 * repack_module.CHUNK  # four threads, 16 bytes a weight
    assert peak < 4 * rows * 1024  # less than one float32 copy


@pytest.mark.parametrize("ggml_type", [GGMLType.Q4_0, GGMLType.Q4_1, GGMLType.Q4_K])
@pytest.mark.parametrize("count", [1, 2, 7])
def test_nibbles_change_places_as_if_unpacked(ggml_type: GGMLType, count: int) -> None:
    kind = block(ggml_type)
    assert isinstance(kind, Nibbles)
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 60, (count, kind.type_size), np.uint8)
    blocks.flags.writeable = False  # as those of a file are
    expected = pack(kind.codes(blocks).q, 4)
    assert np.array_equal(kind.pairs(blocks).view(np.uint32), expected)


def test_refusals_say_what_to_do() -> None:
    with pytest.raises(FormatError, match="rows of 48 weights are not whole Q4_0 blocks of 32"):
        container(GGMLType.Q4_0, 48)
    with pytest.raises(UnsupportedModel, match="Q8_1"):
        container(GGMLType.Q8_1, 32)
    with pytest.raises(InvalidRequest, match=r"Q6_K cannot be repacked in 4 bits.*\[6, 8\]"):
        container(GGMLType.Q6_K, 256, 4)
    with pytest.raises(InvalidRequest, match="F16 cannot be repacked in 8 bits"):
        repack(np.zeros((1, 64), np.uint8), GGMLType.F16, "float16", 8)
    with pytest.raises(InvalidRequest, match="MXFP4"):
        container(GGMLType.MXFP4, 32, 8)
    with pytest.raises(FormatError, match="Q4_0 blocks"):
        repack(np.zeros((1, 19), np.uint8), GGMLType.Q4_0)


@pytest.mark.shared
@pytest.mark.parametrize("name", FILES)
def test_real_files(shared: Path, name: str) -> None:
    for tensor in gguf.GGUFReader(shared / "quants" / f"qwen3-{name}.gguf").tensors:
        ggml_type = GGMLType(int(tensor.tensor_type))
        tensor_made = repack(np.asarray(tensor.data).view(np.uint8), ggml_type)
        expected = gguf.dequantize(tensor.data, tensor.tensor_type)
        if isinstance(tensor_made, Dense):
            assert np.array_equal(tensor_made.array.astype(np.float32), expected)
            continue
        error = relative_rms(by_mlx(tensor_made), expected)
        bound = {GGMLType.Q6_K: 0.006, GGMLType.Q3_K: 0.04, GGMLType.Q2_K: 0.08}
        assert error <= bound.get(ggml_type, 0), (tensor.name, ggml_type.name)
