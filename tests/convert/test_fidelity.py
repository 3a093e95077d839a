"""The rules: what each may do to a tensor, and what it says of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest

from rl_mlx.convert.fidelity import GROWTH, LIMIT, SAMPLE, choose, measure, requantized, rounded
from rl_mlx.convert.gguf.types import GGMLType
from rl_mlx.convert.open import open_weights
from rl_mlx.convert.pieces import Blocks, Holding, Source, Unfit, hold, source, values
from rl_mlx.convert.quantize import dequantize
from rl_mlx.convert.weights import Dense
from rl_mlx.errors import InvalidRequest

QUANTS = "IQ4_XS Q2_K Q3_K_M Q4_0 Q4_1 Q4_K_M Q5_0 Q5_1 Q5_K_M Q6_K Q8_0 TQ2_0".split()  # noqa: SIM905


def _matrices(path: Path) -> list[Source]:
    """One packed tensor of each type in a file."""
    weights = open_weights(path)
    found = {s.kind: s for s in (source(weights, name) for name in weights.names()) if s.packed}
    return list(found.values())


def _whole(part: Source, holding: Holding) -> tuple[np.ndarray, np.ndarray]:
    piece = part.read(0, part.rows)
    return values(piece), dequantize(hold(piece, holding)).reshape(part.rows, -1)


@pytest.mark.shared
@pytest.mark.parametrize("name", QUANTS)
def test_exact_changes_no_value(name: str, shared: Path) -> None:
    for part in _matrices(shared / "quants" / f"qwen3-{name}.gguf"):
        choice = choose(part, "exact", "float16")
        assert (choice.loss.added, choice.loss.peak) == (0, 0)
        for holding in choice.holdings:
            try:
                before, after = _whole(part, holding)
            except Unfit:
                continue
            np.testing.assert_array_equal(before, after)
            break
        else:
            pytest.fail("nothing holds it")


@pytest.mark.shared
@pytest.mark.parametrize("name", QUANTS)
def test_faithful_is_the_smallest_that_keeps_to_the_limit(name: str, shared: Path) -> None:
    for part in _matrices(shared / "quants" / f"qwen3-{name}.gguf"):
        choice = choose(part, "faithful", "float16")
        holding, loss = choice.holdings[0], choice.loss
        assert loss.ratio is not None
        assert loss.ratio <= LIMIT
        before, after = _whole(part, holding)
        error = after - before
        rms = np.sqrt(np.square(error).mean() / np.square(before).mean())
        assert loss.rms == pytest.approx(rms, rel=0.05, abs=1e-9)
        assert loss.peak <= np.abs(error).max()
        for bits in range(2, holding.bits):  # what is narrower cannot hold it, or adds too much
            try:
                narrower = measure(part, Holding("float16", bits, holding.group_size))
            except InvalidRequest:
                continue
            assert narrower.ratio is not None
            assert narrower.ratio > LIMIT


@pytest.mark.shared
@pytest.mark.parametrize("name", QUANTS[:-1])
def test_compact_does_not_grow(name: str, shared: Path) -> None:
    for part in _matrices(shared / "quants" / f"qwen3-{name}.gguf"):
        choice = choose(part, "compact", "float16")
        assert choice.holdings[0].nbytes(part.weights) <= GROWTH * part.nbytes
        assert choice.loss.rms < 0.5


@pytest.mark.shared
def test_compact_says_where_it_cannot(shared: Path) -> None:
    ternary = _matrices(shared / "quants" / "qwen3-TQ2_0.gguf")
    part = next(s for s in ternary if s.kind == "TQ2_0")
    with pytest.raises(InvalidRequest, match=r"TQ2_0.*faithful"):
        choose(part, "compact", "float16")


def _q8(scale: float, rows: int = 4) -> Source:
    raw = np.zeros((rows, 4, 34), np.uint8)
    raw[:, :, 2:] = np.random.default_rng(0).integers(0, 256, (rows, 4, 32))
    raw[:, :, :2] = np.array([scale], np.float16).view(np.uint8)
    raw = raw.reshape(rows, -1)
    kind = GGMLType.Q8_0
    return Source(
        "w", "Q8_0", True, (rows, 128), raw.nbytes, rows, lambda a, b: Blocks(kind, raw[a:b])
    )


@pytest.mark.parametrize("rule", ["exact", "faithful"])
def test_scales_beyond_float16_are_kept_wider(rule: str) -> None:
    part = _q8(1000.0)  # the bias, -128 scales, overflows
    held = []
    for holding in choose(part, rule, "float16").holdings:  # type: ignore[arg-type]
        try:
            held.append((holding, _whole(part, holding)))
        except Unfit:
            continue
    holding, (before, after) = held[0]
    assert (holding.dtype, holding.bits) == ("float32", 8)
    np.testing.assert_array_equal(before, after)


def test_bfloat16_scales_are_measured_too() -> None:
    loss = measure(_q8(0.1), Holding("bfloat16", 8, 32))
    assert 0 < loss.rms < 4e-3
    assert measure(_q8(0.125), Holding("bfloat16", 8, 32)).added == 0


def _dense(array: np.ndarray) -> Source:
    rows = array.reshape(-1, array.shape[-1])
    return Source(
        "w", "F32", False, array.shape, array.nbytes, len(rows),
        lambda a, b: Dense(rows[a:b], "float32"),
    )  # fmt: skip


def test_plain_floats_are_narrowed_only_where_nothing_changes() -> None:
    whole, third = np.array([[1.0, -2.5, 0.0]], np.float32), np.array([[1 / 3]], np.float32)
    first = rounded(_dense(whole), "float16", lossless=True).holdings[0]
    np.testing.assert_array_equal(_whole(_dense(whole), first)[1], whole)
    narrow, own = rounded(_dense(third), "float16", lossless=True).holdings
    with pytest.raises(Unfit):
        _whole(_dense(third), narrow)
    assert own == Holding("float32")
    asked = rounded(_dense(third), "float16", lossless=False)
    assert asked.loss.rms == pytest.approx(abs(1 - float(np.float16(1 / 3)) * 3), rel=1e-3)
    assert asked.loss.ratio is None


def test_floats_that_overflow_are_not_rounded() -> None:
    part = _dense(np.array([[1e9]], np.float32))
    with pytest.raises(Unfit):
        _whole(part, rounded(part, "float16", lossless=False).holdings[0])


def test_a_large_tensor_is_measured_on_a_sample_of_all_of_it() -> None:
    rng = np.random.default_rng(0)
    array = rng.standard_normal((4096, 256)).astype(np.float32) * np.linspace(1, 9, 4096)[:, None]
    part = _dense(array.astype(np.float32))
    holding = Holding("float16", 4, 64, fresh=True)
    loss = requantized(part, holding).loss
    assert loss.measured == SAMPLE
    before, after = _whole(part, holding)
    rms = np.sqrt(np.square(after - before).mean() / np.square(before).mean())
    assert loss.rms == pytest.approx(rms, rel=0.03)


def test_quantizers_of_gguf_py_are_held_exactly(make_gguf: Callable[..., Path]) -> None:
    kinds = {"blk.0.attn_q.weight": gguf.GGMLQuantizationType.Q4_0}
    weights = open_weights(make_gguf(types=kinds))
    part = source(weights, "model.layers.0.self_attn.q_proj.weight")
    choice = choose(part, "faithful", "float16")
    assert choice.holdings[0] == Holding("float16", 4, 32)
    assert choice.loss.ratio == 0
    weights.close()
