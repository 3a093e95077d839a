"""The compiled loops make what NumPy makes, to the last bit, and nobody needs them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from rl_mlx.convert import kernels
from rl_mlx.convert.floats import DTYPES
from rl_mlx.convert.gguf.repack import repack
from rl_mlx.convert.gguf.types import GGMLType
from rl_mlx.convert.weights import FloatType, Packed

built = pytest.mark.skipif(
    kernels.library() is None, reason="no C compiler was there when the package was installed"
)
TYPES = sorted(kernels.BITS)
# Where the float16 numbers of a block begin.
HALVES = {
    GGMLType.Q4_1: (0, 2), GGMLType.Q5_1: (0, 2), GGMLType.Q4_K: (0, 2), GGMLType.Q5_K: (0, 2),
    GGMLType.Q6_K: (208,),
}  # fmt: skip
U8 = npt.NDArray[np.uint8]


def by_numpy(work: Callable[[], Any]) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "library", lambda: None)
        return work()


def same(raw: U8, kind: GGMLType, dtype: FloatType, bits: int | None = None) -> bool:
    """Whether both ways make the same bytes."""
    one, other = repack(raw, kind, dtype, bits), by_numpy(lambda: repack(raw, kind, dtype, bits))
    assert isinstance(one, Packed)
    assert one.biases is not None
    assert one.dtype == other.dtype
    return all(
        getattr(one, part).tobytes() == getattr(other, part).tobytes()
        for part in ("weight", "scales", "biases")
    )


def finite(kind: GGMLType, blocks: U8) -> U8:
    """The blocks with scales that are numbers: the kernel turns the others away."""
    for at in HALVES.get(kind, (0,)):
        high = blocks[:, at + 1]
        high[(high & 0x7C) == 0x7C] &= 0xBF
    return blocks


@st.composite
def rows(draw: st.DrawFn) -> tuple[GGMLType, U8]:
    """Blocks of a type: bytes of chance, and whole fields of one byte, 0 and 255 above all."""
    kind = draw(st.sampled_from(TYPES))
    count = draw(st.integers(1, 4))
    octets = st.one_of(st.integers(0, 255), st.sampled_from([0, 255]))
    fill = draw(octets)
    blocks = draw(
        arrays.arrays(np.uint8, (count, kind.block_bytes), elements=octets, fill=st.just(fill))
    )
    return kind, blocks


@built
@given(made=rows(), dtype=st.sampled_from(["float32", "float16", "bfloat16"]))
@settings(deadline=None)
def test_any_blocks_are_moved_as_by_numpy(made: tuple[GGMLType, U8], dtype: FloatType) -> None:
    kind, blocks = made
    assert same(blocks, kind, dtype)
    assert same(finite(kind, blocks.copy()), kind, dtype)


def move(blocks: U8, kind: GGMLType, bits: int | None = None, dtype: FloatType = "float16") -> bool:
    width, groups = kernels.BITS[kind], (len(blocks), kind.block_size // 32)
    codes = np.empty((len(blocks), kind.block_size * width // 32), np.uint32)
    scales, biases = np.empty(groups, DTYPES[dtype]), np.empty(groups, DTYPES[dtype])
    return kernels.move(blocks, kind, bits or width, dtype, codes, scales, biases)


@built
@pytest.mark.parametrize("kind", TYPES, ids=lambda t: t.name)
def test_many_blocks_are_moved_as_by_numpy(kind: GGMLType) -> None:
    rng = np.random.default_rng(int(kind))
    blocks = finite(kind, rng.integers(0, 256, (3000, kind.block_bytes), np.uint8))
    assert move(blocks, kind, dtype="float32")
    for dtype in ("float32", "float16", "bfloat16"):
        assert same(blocks, kind, dtype)


@built
@pytest.mark.parametrize("scale", [0x7C00, 0xFC00, 0x7C01, 0x7E00, 0xFFFF])
@pytest.mark.parametrize("kind", TYPES, ids=lambda t: t.name)
def test_scales_that_are_no_numbers_are_left_to_numpy(kind: GGMLType, scale: int) -> None:
    for at in HALVES.get(kind, (0,)):
        blocks = finite(kind, np.full((5, kind.block_bytes), 77, np.uint8))
        blocks[3, at : at + 2] = np.array([scale], np.uint16).view(np.uint8)
        assert not move(blocks, kind)
        assert same(blocks, kind, "float16")


@built
def test_the_smaller_of_two_scales_may_be_any_part_of_the_larger() -> None:
    """Every pair of Q6_K's 8-bit scales, signs and zeros included, with every code of six bits."""
    first, second = (part.astype(np.uint8).ravel() for part in np.indices((256, 256)))
    blocks = np.random.default_rng(0).integers(0, 256, (len(first) // 8, 210), np.uint8)
    blocks[:, 192:208] = np.stack([first, second], -1).reshape(-1, 16)
    blocks[:, 208:] = np.array([0.001], np.float16).view(np.uint8)
    assert same(blocks, GGMLType.Q6_K, "float32")


@built
@pytest.mark.parametrize("kind", [GGMLType.Q4_K, GGMLType.Q5_K, GGMLType.Q6_K])
def test_other_widths_are_numpys(kind: GGMLType) -> None:
    blocks = np.full((2, kind.block_bytes), 60, np.uint8)
    assert move(blocks, kind)
    assert not move(blocks, kind, 6)


@built
def test_halves_are_rounded_to_even() -> None:
    """Q4_K's scales are products of a float16 and 6 bits: ties, subnormals, too large ones."""
    halves = np.arange(0x7C00, dtype=np.uint16)
    blocks = np.zeros((len(halves), 144), np.uint8)
    blocks[:, 0:2] = blocks[:, 2:4] = halves.view(np.uint8).reshape(-1, 2)
    blocks[:, 4:16] = np.random.default_rng(0).integers(0, 256, (len(halves), 12), np.uint8)
    fits = halves.view(np.float16) < 65504 / 63
    for some in (blocks[fits], blocks[~fits]):
        assert same(some, GGMLType.Q4_K, "float16")
        assert same(some, GGMLType.Q4_K, "bfloat16")
    assert move(blocks[fits], GGMLType.Q4_K)
    assert not move(blocks, GGMLType.Q4_K)


@pytest.fixture
def anew() -> Iterator[None]:
    """The library is looked for again, then and afterwards."""
    kernels.library.cache_clear()
    yield
    kernels.library.cache_clear()


@pytest.mark.usefixtures("anew")
def test_a_library_of_another_version_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_VERSION", -1)
    assert kernels.library() is None
    raw = np.full((2, 18), 60, np.uint8)
    assert not move(raw, GGMLType.Q4_0)
    assert isinstance(repack(raw, GGMLType.Q4_0), Packed)


@pytest.mark.usefixtures("anew")
def test_a_host_without_the_library_or_with_another_byte_order(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(kernels, "find_spec", lambda _name: None)
    assert kernels.library() is None
    monkeypatch.undo()
    kernels.library.cache_clear()
    monkeypatch.setattr(kernels.sys, "byteorder", "big")
    assert kernels.library() is None
