"""Folders to GGUF: every value, the tokenizer, and nothing half done."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from rl_mlx.convert import export as module
from rl_mlx.convert.export import export
from rl_mlx.errors import DestinationExists, ModelNotFound, OutOfMemory, UnsupportedModel

pytestmark = pytest.mark.shared
NAMES = ("qwen2", "llama3-rope", "qwen3_moe")


@pytest.mark.parametrize("name", NAMES)
def test_tensors_and_metadata_are_those_of_the_reference_converter(
    name: str, shared: Path, tmp_path: Path
) -> None:
    target = tmp_path / "sub" / "model.gguf"
    seen: list[tuple[int, int]] = []
    report = export(shared / "hf" / name, target, progress=lambda *at: seen.append(at))
    ours = gguf.GGUFReader(target)
    theirs = gguf.GGUFReader(shared / "parity" / f"{name}.gguf")
    assert (
        report.tensors
        == len(seen)
        == len([t for t in ours.tensors if t.name != "rope_freqs.weight"])
    )
    assert report.bytes == target.stat().st_size
    assert seen[-1][0] == seen[-1][1]
    tensors = {t.name: t.data for t in ours.tensors}
    assert tensors.keys() == {t.name for t in theirs.tensors}
    for tensor in theirs.tensors:  # they wrote float16, which holds these weights exactly
        np.testing.assert_allclose(
            tensors[tensor.name], tensor.data, atol=1e-6, err_msg=tensor.name
        )
    fields = {f.name: f.contents() for f in ours.fields.values()}
    ignored = {"general.name", "general.size_label", "general.file_type"}
    for field in theirs.fields.values():
        if not field.name.startswith("GGUF.") and field.name not in ignored:
            assert fields[field.name] == field.contents(), field.name


def test_bfloat16_and_float16_keep_their_bits(shared: Path, tmp_path: Path) -> None:
    import safetensors.numpy

    folder = tmp_path / "model"
    shutil.copytree(shared / "hf" / "qwen2", folder)
    weights = safetensors.numpy.load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    halves = {k: v.astype(np.float16) for k, v in weights.items()}
    safetensors.numpy.save_file(halves, folder / "model.safetensors")
    export(folder, tmp_path / "f16.gguf")
    tensors = {t.name: t for t in gguf.GGUFReader(tmp_path / "f16.gguf").tensors}
    up = tensors["blk.0.ffn_up.weight"]
    assert up.tensor_type == gguf.GGMLQuantizationType.F16
    np.testing.assert_array_equal(up.data, halves[name])
    assert tensors["blk.0.attn_norm.weight"].tensor_type == gguf.GGMLQuantizationType.F32


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"model_type": "stablelm"}, "stablelm"),
        (
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "dynamic",
        ),
    ],
)
def test_what_cannot_be_exported_is_refused(
    change: dict[str, Any], reason: str, shared: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(shared / "hf" / "llama3-rope", folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(UnsupportedModel, match=reason):
        export(folder, tmp_path / "out.gguf")
    assert not (tmp_path / "out.gguf").exists()


def test_nothing_is_overwritten_or_left_behind(
    shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "model.gguf"
    target.write_bytes(b"mine")
    with pytest.raises(DestinationExists, match="force"):
        export(shared / "hf" / "qwen2", target)
    with pytest.raises(ModelNotFound):
        export(tmp_path / "nowhere", tmp_path / "x.gguf")

    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export(shared / "hf" / "qwen2", target, force=True, progress=interrupt)
    monkeypatch.setattr(module, "_HEADER_ROOM", 1 << 60)
    with pytest.raises(OutOfMemory, match="disk"):
        export(shared / "hf" / "qwen2", target, force=True)
    assert target.read_bytes() == b"mine"
    assert [p.name for p in tmp_path.iterdir()] == ["model.gguf"]


def test_what_a_killed_export_left_is_cleared_away(shared: Path, tmp_path: Path) -> None:
    dead = subprocess.run(
        [sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True
    )
    stale = tmp_path / f".model.gguf.{int(dead.stdout)}.part"
    stale.write_bytes(b"half")
    export(shared / "hf" / "qwen2", tmp_path / "model.gguf")
    assert [p.name for p in tmp_path.iterdir()] == ["model.gguf"]
