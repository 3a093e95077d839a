"""Folders to GGUF: every value, the tokenizer, llama.cpp's recipes, and nothing half done."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import mlx.core as mx
import numpy as np
import pytest

from rl_mlx.convert import convert, export
from rl_mlx.convert.gguf import ggml
from rl_mlx.errors import (
    DestinationExists,
    FormatError,
    InvalidRequest,
    ModelNotFound,
    OutOfMemory,
    UnsupportedModel,
)

module = sys.modules["rl_mlx.convert.gguf.export"]
HF = ("qwen2", "llama3-rope", "qwen3_moe")
PARITY = (
    "gemma2", "gemma3_text", "gpt_oss", "lfm2", "llama", "llama3-rope", "mixtral", "qwen2", "qwen3",
    "qwen3_moe",
)  # fmt: skip
QUANTS = ("IQ4_XS", "Q2_K", "Q3_K_M", "Q4_0", "Q4_1", "Q4_K_M", "Q5_0", "Q5_1", "Q5_K_M", "Q6_K",
          "Q8_0", "TQ2_0")  # fmt: skip
# Of a file's making, not of the model.
IGNORED = {"general.name", "general.size_label", "general.file_type"}


def tensors(path: Path) -> dict[str, Any]:
    return {t.name: t for t in gguf.GGUFReader(path).tensors}


def keys(path: Path) -> dict[str, Any]:
    fields = gguf.GGUFReader(path).fields.values()
    return {f.name: f.contents() for f in fields if not f.name.startswith("GGUF.")}


def octets(tensor: Any) -> np.ndarray:
    return np.asarray(tensor.data).view(np.uint8).reshape(-1)


@pytest.mark.shared
@pytest.mark.parametrize("name", HF)
def test_tensors_and_metadata_are_those_of_the_reference_converter(
    name: str, shared: Path, tmp_path: Path
) -> None:
    target = tmp_path / "sub" / "model.gguf"
    seen: list[tuple[int, int]] = []
    report = export(shared / "hf" / name, target, progress=lambda *at: seen.append(at))
    ours, theirs = tensors(target), tensors(shared / "parity" / f"{name}.gguf")
    assert len(report.tensors) == len(seen) == len(ours.keys() - {"rope_freqs.weight"})
    assert report.file_bytes == target.stat().st_size
    assert report.is_exact
    assert report.notes == ()
    assert seen[-1][0] == seen[-1][1]
    assert ours.keys() == theirs.keys()
    for tensor in theirs.values():  # they wrote float16, which holds these weights exactly
        np.testing.assert_allclose(
            ours[tensor.name].data, tensor.data, atol=1e-6, err_msg=tensor.name
        )
    found = keys(target)
    for key, value in keys(shared / "parity" / f"{name}.gguf").items():
        assert key in IGNORED or found[key] == value, key


@pytest.mark.shared
@pytest.mark.parametrize("name", PARITY)
def test_gguf_to_mlx_to_gguf_gives_the_same_file(name: str, shared: Path, tmp_path: Path) -> None:
    source = shared / "parity" / f"{name}.gguf"
    convert(source, tmp_path / "mlx")
    report = export(tmp_path / "mlx", tmp_path / "back.gguf")
    before, after = tensors(source), tensors(tmp_path / "back.gguf")
    assert before.keys() == after.keys()
    assert report.is_exact
    for key in before.keys() - {"rope_freqs.weight"}:  # which is computed from the config
        assert before[key].tensor_type == after[key].tensor_type, key
        np.testing.assert_array_equal(octets(before[key]), octets(after[key]), key)
    # A vocabulary that was made up has scores and types that say nothing.
    free = {"tokenizer.ggml.scores", "tokenizer.ggml.token_type"} if name == "gemma2" else set()
    found = keys(tmp_path / "back.gguf")
    for key, value in keys(source).items():
        assert key in IGNORED | free or found[key] == value, key


@pytest.mark.shared
@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "TQ2_0"])
def test_blocks_come_back_byte_for_byte(name: str, shared: Path, tmp_path: Path) -> None:
    source = shared / "quants" / f"qwen3-{name}.gguf"
    convert(source, tmp_path / "mlx")
    before = tensors(source)
    same = [t for t in before.values() if t.tensor_type.name == name]
    assert len(same) > 20
    for is_recorded in (True, False):
        if not is_recorded:
            (tmp_path / "mlx" / "rl_mlx.json").unlink()
        export(tmp_path / "mlx", tmp_path / "back.gguf", force=True)
        after = tensors(tmp_path / "back.gguf")
        for tensor in same:
            assert after[tensor.name].tensor_type.name == name
            np.testing.assert_array_equal(octets(tensor), octets(after[tensor.name]), tensor.name)


@pytest.fixture(scope="module")
def qwen3(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "qwen3"
    convert(shared / "parity" / "qwen3.gguf", folder)
    return folder


@pytest.mark.shared
@pytest.mark.parametrize("name", QUANTS)
def test_recipes_make_what_llama_quantize_makes(
    name: str, qwen3: Path, shared: Path, tmp_path: Path
) -> None:
    report = export(qwen3, tmp_path / "ours.gguf", quant=name.lower())
    ours, theirs = (
        tensors(tmp_path / "ours.gguf"),
        tensors(shared / "quants" / f"qwen3-{name}.gguf"),
    )
    assert {n: t.tensor_type for n, t in ours.items()} == {
        n: t.tensor_type for n, t in theirs.items()
    }
    for key, tensor in theirs.items():
        np.testing.assert_array_equal(octets(ours[key]), octets(tensor), key)
    assert (
        keys(tmp_path / "ours.gguf")["general.file_type"]
        == (keys(shared / "quants" / f"qwen3-{name}.gguf")["general.file_type"])
    )
    assert report.quant == name
    down = next(t for t in report.tensors if t.name == "blk.0.ffn_down.weight")
    assert 0.001 < down.rms < 1


# MLX's own quantization of a tiny llama, and what each of its containers becomes.
CONTAINERS = [
    ("affine", 2, 64, "bfloat16", "Q4_0"),
    ("affine", 3, 64, "float16", "Q4_1"),
    ("affine", 4, 32, "bfloat16", "Q4_1"),
    ("affine", 4, 64, "float16", "Q4_1"),
    ("affine", 4, 128, "float32", "Q4_1"),
    ("affine", 5, 64, "float16", "Q5_1"),
    ("affine", 6, 64, "float16", "F16"),
    ("affine", 8, 64, "bfloat16", "F16"),
    ("mxfp4", 4, 32, "bfloat16", "MXFP4"),
    ("nvfp4", 4, 16, "bfloat16", "NVFP4"),
    ("mxfp8", 8, 32, "bfloat16", "BF16"),
]  # fmt: skip


@pytest.fixture
def mlx_folder(tmp_path, hf_config, mlx_arrays, make_folder):
    """A tiny llama whose matrices MLX has quantized; some rows of it are nothing but zeros."""

    def make(mode, bits, group, dtype, model_type="llama"):
        config = hf_config(hidden_size=128, intermediate_size=256, model_type=model_type)
        arrays, packed = mlx_arrays(config, getattr(mx, dtype)), {}
        for name, array in arrays.items():
            packed[name] = array
            if array.ndim == 2:
                array = mx.where(array > 0, array, array * 0.4)  # so that no bias is by chance -8
                array = mx.concatenate([array[:-2], mx.zeros((2, array.shape[1]), array.dtype)])
                parts = mx.quantize(array, group_size=group, bits=bits, mode=mode)
                module = name.removesuffix(".weight")
                names = (f"{module}.{part}" for part in ("weight", "scales", "biases"))
                packed.update(dict(zip(names, parts)))
        quantization = {"bits": bits, "group_size": group, "mode": mode}
        folder = make_folder(config | {"quantization": quantization}, {"model.safetensors": packed})
        return folder, packed

    return make


@pytest.mark.parametrize(("mode", "bits", "group", "dtype", "kind"), CONTAINERS)
def test_mlx_containers(mode, bits, group, dtype, kind, mlx_folder, tmp_path) -> None:
    folder, packed = mlx_folder(mode, bits, group, dtype)
    report = export(folder, tmp_path / "out.gguf")
    assert "no_vocab" in keys(tmp_path / "out.gguf")["tokenizer.ggml.model"]
    assert any("tokenizer" in line for line in report.notes)
    found = tensors(tmp_path / "out.gguf")
    name, module = "blk.1.ffn_down.weight", "model.layers.1.mlp.down_proj"
    parts = [
        packed[f"{module}.{p}"] for p in ("weight", "scales", "biases")[: 3 - (mode != "affine")]
    ]
    wide = [parts[0], *(p.astype(mx.float32) if mode == "affine" else p for p in parts[1:])]
    values = np.array(
        mx.dequantize(*wide, group_size=group, bits=bits, mode=mode, dtype=mx.float32)
    )
    assert found[name].tensor_type.name == kind
    back = gguf.quants.dequantize(found[name].data, found[name].tensor_type).reshape(values.shape)
    line = next(t for t in report.tensors if t.name == name)
    is_rounded = dtype == "float32" or (mode == "affine" and bits > 5)
    if is_rounded:  # to float16: the scales, or the weights
        np.testing.assert_allclose(back, values, rtol=2e-3, atol=2e-4)
        assert 0 < line.rms < 1e-3
    else:
        np.testing.assert_array_equal(back, values)
        assert line.max_error == 0


def test_symmetric_codes_need_no_minimum(mlx_folder, tmp_path) -> None:
    """A bias of -8 scales is Q4_0's, of -128 Q8_0's, of any whole number of scales the next's."""
    import safetensors.numpy

    for bits, zero, kind in ((4, 8, "Q4_0"), (5, 16, "Q5_0"), (8, 128, "Q8_0"), (3, 4, "Q4_0"),
                             (6, 32, "Q8_0"), (2, 1, "Q4_0")):  # fmt: skip
        folder, _ = mlx_folder("affine", bits, 64, "float16")
        file = folder / "model.safetensors"
        arrays = safetensors.numpy.load_file(file)
        for name in [n for n in arrays if n.endswith(".biases")]:
            arrays[name] = -zero * arrays[name.replace("biases", "scales")]
        safetensors.numpy.save_file(arrays, file)
        report = export(folder, tmp_path / f"{kind}.gguf", force=True)
        found = {t.container for t in report.tensors if len(t.shape) > 1}
        assert found == {kind}, bits
        assert report.is_exact
        shutil.rmtree(folder)


def test_scales_that_float16_does_not_hold_keep_their_range(mlx_folder, tmp_path) -> None:
    import safetensors.numpy

    folder, _ = mlx_folder("affine", 4, 64, "float32")
    file = folder / "model.safetensors"
    arrays = safetensors.numpy.load_file(file)
    arrays["model.layers.0.mlp.up_proj.scales"] *= np.float32(1e6)
    arrays["model.layers.0.mlp.up_proj.biases"] *= np.float32(1e6)
    safetensors.numpy.save_file(arrays, file)
    report = export(folder, tmp_path / "out.gguf")
    kinds = {t.name: t.container for t in report.tensors}
    assert kinds["blk.0.ffn_up.weight"] == "F32"
    assert kinds["blk.0.ffn_gate.weight"] == "Q4_1"
    with pytest.raises(InvalidRequest, match=r"blk\.0\.ffn_up\.weight.*BF16"):
        export(folder, tmp_path / "f16.gguf", quant="F16")
    export(folder, tmp_path / "bf16.gguf", quant="BF16")
    assert not (tmp_path / "f16.gguf").exists()


def test_bfloat16_and_float16_keep_their_bits(mlx_arrays, hf_config, make_folder, tmp_path) -> None:
    config = hf_config()
    for dtype, kind in ((mx.float16, "F16"), (mx.bfloat16, "BF16")):
        arrays = mlx_arrays(config, dtype)
        folder = make_folder(config, {"model.safetensors": arrays}, name=kind)
        export(folder, tmp_path / f"{kind}.gguf")
        found = tensors(tmp_path / f"{kind}.gguf")
        up = found["blk.0.ffn_up.weight"]
        assert up.tensor_type.name == kind
        expected = np.array(arrays["model.layers.0.mlp.up_proj.weight"].view(mx.uint16))
        np.testing.assert_array_equal(octets(up), expected.view(np.uint8).reshape(-1))
        assert found["blk.0.attn_norm.weight"].tensor_type.name == "F32"


@pytest.mark.shared
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"model_type": "helium"}, "helium"),
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


@pytest.mark.shared
def test_nothing_is_overwritten_or_left_behind(
    shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, folder = tmp_path / "model.gguf", shared / "hf" / "qwen2"
    target.write_bytes(b"mine")
    with pytest.raises(DestinationExists, match="force"):
        export(folder, target)
    with pytest.raises(DestinationExists, match="folder"):
        export(folder, tmp_path, force=True)
    with pytest.raises(ModelNotFound):
        export(tmp_path / "nowhere", tmp_path / "x.gguf")
    with pytest.raises(InvalidRequest, match="is a file"):
        export(target, tmp_path / "x.gguf")
    with pytest.raises(InvalidRequest, match="known are F32"):
        export(folder, target, quant="Q9", force=True)
    with pytest.raises(InvalidRequest, match="goes with a quant"):
        export(folder, target, imatrix="x.dat", force=True)

    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export(folder, target, force=True, progress=interrupt)

    def full(done: int, total: int) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(OutOfMemory, match="full"):
        export(folder, target, force=True, progress=full)
    monkeypatch.setattr(module, "_MARGIN", 1 << 60)
    with pytest.raises(OutOfMemory, match="disk"):
        export(folder, target, force=True)
    assert target.read_bytes() == b"mine"
    assert [p.name for p in tmp_path.iterdir()] == ["model.gguf"]


@pytest.mark.shared
def test_what_a_killed_export_left_is_cleared_away(shared: Path, tmp_path: Path) -> None:
    dead = subprocess.run(
        [sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True
    )
    stale = tmp_path / f".model.gguf.{int(dead.stdout)}.part"
    stale.write_bytes(b"half")
    export(shared / "hf" / "qwen2", tmp_path / "model.gguf")
    assert [p.name for p in tmp_path.iterdir()] == ["model.gguf"]


def test_numbers_that_are_none_are_refused_by_name(
    mlx_arrays, hf_config, make_folder, tmp_path
) -> None:
    config = hf_config(hidden_size=256, intermediate_size=256)
    arrays = mlx_arrays(config)
    name = "model.layers.1.mlp.up_proj.weight"
    arrays[name] = mx.where(mx.arange(256) == 3, mx.array(float("nan")), arrays[name])
    folder = make_folder(config, {"model.safetensors": arrays})
    with pytest.raises(FormatError, match=r"layers\.1\.mlp\.up_proj"):
        export(folder, tmp_path / "out.gguf", quant="Q4_K_M")
    assert not (tmp_path / "out.gguf").exists()


def test_an_importance_matrix_steers_ggml(
    mlx_arrays, hf_config, make_folder, tmp_path, write_dat
) -> None:
    config = hf_config(hidden_size=256, intermediate_size=256, model_type="qwen3_moe",
                       moe_intermediate_size=256, head_dim=64)  # fmt: skip
    arrays = mlx_arrays(config)
    folder = make_folder(config, {"model.safetensors": arrays})
    with pytest.raises(InvalidRequest, match=r"IQ2_XXS.*importance"):
        export(folder, tmp_path / "out.gguf", quant="IQ2_XXS")
    rng = np.random.default_rng(0)
    importance = {}
    for line in export(folder, tmp_path / "plain.gguf").tensors:
        if len(line.shape) > 1:
            count = line.shape[-1] * int(np.prod(line.shape[:-2]))
            importance[line.name] = rng.random(count).astype(np.float32)
    write_dat(tmp_path / "i.dat", importance, calls=4)
    export(folder, tmp_path / "out.gguf", quant="Q4_K_S", imatrix=tmp_path / "i.dat")
    name = "blk.0.ffn_up_exps.weight"
    values = np.array(arrays["model.layers.0.mlp.switch_mlp.up_proj.weight"])
    expected = [
        ggml.quantize(values[i], module.T.Q4_K, importance[name].reshape(3, -1)[i] / 4)
        for i in range(3)
    ]
    found = tensors(tmp_path / "out.gguf")[name]
    np.testing.assert_array_equal(octets(found), np.stack(expected).reshape(-1))
    with pytest.raises(InvalidRequest, match=r"Q2_K_S.*importance"):
        export(folder, tmp_path / "low.gguf", quant="Q2_K_S")
    export(folder, tmp_path / "low.gguf", quant="Q2_K_S", imatrix=tmp_path / "i.dat")
    write_dat(tmp_path / "i.dat", importance | {name: np.ones(7, np.float32)}, calls=1)
    with pytest.raises(InvalidRequest, match=r"ffn_up_exps.*another model"):
        export(folder, tmp_path / "x.gguf", quant="Q4_K_S", imatrix=tmp_path / "i.dat")
