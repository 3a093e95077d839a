"""Errors of tensors, against NumPy on what gguf-py decodes."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest

from rl_mlx.errors import InvalidRequest
from rl_mlx.lab import TensorErrors, tensor_errors


def write(path: Path, weights: dict[str, np.ndarray], kind: gguf.GGMLQuantizationType) -> None:
    """A llama of one layer, its matrices of one type."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(128)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_layer_norm_rms_eps(1e-5)
    for name, array in weights.items():
        writer.add_tensor(f"{name}.weight", gguf.quants.quantize(array, kind), raw_dtype=kind)
    for name in ("blk.0.attn_norm", "blk.0.ffn_norm", "output_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(64, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A model in F32 and in Q4_0, and its weights."""
    folder = tmp_path_factory.mktemp("pair")
    rng = np.random.default_rng(0)
    names = ["attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"]
    names = [f"blk.0.{name}" for name in names]
    weights = {n: rng.normal(size=(64, 64)).astype(np.float32) for n in [*names, "token_embd"]}
    weights["blk.0.ffn_down"][5] *= 10  # a channel that errs most
    types = gguf.GGMLQuantizationType
    write(folder / "f32.gguf", weights, types.F32)
    write(folder / "q4.gguf", weights, types.Q4_0)
    return folder, weights


def test_errors_are_those_of_numpy(files):
    folder, weights = files
    found = tensor_errors(folder / "q4.gguf", folder / "f32.gguf")
    assert len(found.tensors) == len(weights)
    (one,) = (t for t in found.tensors if t.role == "down_proj")
    true = weights["blk.0.ffn_down"]
    kind = gguf.GGMLQuantizationType.Q4_0
    error = gguf.quants.dequantize(gguf.quants.quantize(true, kind), kind) - true
    rms = np.sqrt(np.square(error).mean() / np.square(true).mean())
    assert one.rms == pytest.approx(rms, rel=1e-5)
    assert one.snr == pytest.approx(-20 * np.log10(rms), rel=1e-5)
    assert one.channels[0] == 5
    rows = np.sqrt(np.square(error).mean(axis=1) / np.square(true).mean())
    assert one.channel_rms == pytest.approx(sorted(rows)[::-1][:10], rel=1e-5)
    assert (one.layer, one.kind, one.bits) == (0, "Q4_0", 4.5)
    (layer,) = found.layers().values()
    inside = [t.rms for t in found.tensors if t.layer == 0]
    assert layer == pytest.approx(np.sqrt(np.mean(np.square(inside))))


def test_nothing_differs_from_itself(files, tmp_path: Path):
    folder, _ = files
    found = tensor_errors(folder / "q4.gguf", folder / "q4.gguf")
    assert {t.rms for t in found.tensors} == {0.0}
    assert {t.snr for t in found.tensors} == {np.inf}
    found.save(tmp_path / "t.json")
    assert TensorErrors.load(tmp_path / "t.json") == found


def test_it_is_drawn(files):
    folder, _ = files
    ax = tensor_errors(folder / "q4.gguf", folder / "f32.gguf").plot()
    assert ax.get_xlabel() == "layer"
    assert len(ax.get_lines()) == 7


def test_other_models_are_refused(files):
    folder, _ = files
    with pytest.raises(InvalidRequest, match="other models"):
        tensor_errors(folder / "q4.gguf", "demo")
