"""Tensors by rows: the same as the whole, from every kind of file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rl_mlx.convert.lazy import Lazy
from rl_mlx.convert.open import open_weights
from rl_mlx.convert.pieces import joined, source, values
from rl_mlx.convert.quantize import dequantize


def check(path: Path) -> None:
    """Every tensor of a model, in two pieces, is what ``load`` gives."""
    weights = open_weights(path)
    for name in weights.names():
        part = source(weights, name)
        middle = part.rows // 2
        bounds = [(0, middle), (middle, part.rows)] if middle else [(0, part.rows)]
        found = values(joined([part.read(*bound) for bound in bounds]))
        whole = dequantize(weights.load(name, exact=True)).reshape(part.rows, -1)
        np.testing.assert_array_equal(found.reshape(part.rows, -1), whole)
        assert part.weights == whole.size
        assert part.columns == whole.shape[1]
        weights.release()
    weights.close()


@pytest.mark.parametrize("arch", ["llama", "qwen2"])
def test_gguf_files(arch: str, make_gguf: Callable[..., Path], llama_tensors: Any) -> None:
    if arch == "qwen2":
        for i in range(2):
            for name, width in (("q", 64), ("k", 32), ("v", 32)):
                llama_tensors[f"blk.{i}.attn_{name}.bias"] = np.arange(width, dtype=np.float32)
    kind = gguf.GGMLQuantizationType
    types = {"blk.0.attn_q.weight": kind.Q8_0, "blk.1.attn_k.weight": kind.Q4_1}
    check(make_gguf(arch, llama_tensors, types=types | {"token_embd.weight": kind.F16}))


@pytest.mark.shared
@pytest.mark.parametrize("name", ["gemma2", "lfm2", "mixtral", "gpt_oss"])
def test_families_with_ways_of_their_own(name: str, shared: Path) -> None:
    check(shared / "parity" / f"{name}.gguf")


@pytest.mark.shared
@pytest.mark.parametrize("name", ["qwen2", "qwen3_moe"])
def test_folders(name: str, shared: Path) -> None:
    check(shared / "hf" / name)


def test_folders_that_mlx_has_packed(
    make_folder: Callable[..., Path], hf_config: Any, mlx_arrays: Any
) -> None:
    config = hf_config() | {"quantization": {"bits": 6, "group_size": 32}}
    arrays = mlx_arrays(hf_config(), mx.float16)
    name = "model.layers.0.mlp.gate_proj"
    packed = mx.quantize(arrays[f"{name}.weight"], group_size=32, bits=6)
    arrays |= dict(
        zip((f"{name}.{p}" for p in ("weight", "scales", "biases")), packed, strict=True)
    )
    folder = make_folder(config, {"model.safetensors": arrays})
    check(folder)
    part = source(open_weights(folder), f"{name}.weight")
    assert (part.kind, part.packed) == ("6-bit g32 float16", True)
    assert part.nbytes == sum(a.nbytes for a in packed)


@given(st.integers(0, 12), st.integers(0, 12))
def test_stacked_experts_are_read_one_by_one(start: int, stop: int) -> None:
    arrays = np.arange(4 * 3 * 5).reshape(4, 3, 5)
    reads: list[int] = []

    def expert(i: int) -> Lazy:
        def read() -> Any:
            reads.append(i)
            return arrays[i]

        return Lazy((3, 5), "F32", read)

    stack = Lazy((4, 3, 5), "F32", lambda: arrays, tuple(expert(i) for i in range(4)))
    start, stop = min(start, stop), max(start, stop)
    if start == stop:
        return
    np.testing.assert_array_equal(stack.rows(start, stop), arrays.reshape(-1, 5)[start:stop])
    assert reads == list(range(start // 3, -(-stop // 3)))
