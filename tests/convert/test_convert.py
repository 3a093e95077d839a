"""Whole models to MLX folders: what they compute, what is kept, and that nothing is half done."""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.utils import load, load_model
from safetensors.numpy import load_file

from rl_mlx import LLM
from rl_mlx.convert import Recipe, Report, checkpoint, convert, inspect, pipeline
from rl_mlx.convert.open import open_weights
from rl_mlx.convert.pieces import Holding, Piece, Unfit
from rl_mlx.convert.weights import Tensor
from rl_mlx.errors import (
    DestinationExists,
    FormatError,
    InvalidRequest,
    ModelNotFound,
    OutOfMemory,
    UnsupportedModel,
)

# mlx-lm has no sliding window in gemma2, and rounds YaRN's range in gpt_oss: it is silently wrong.
RIGHT_IN_MLX_LM = "llama llama3-rope gemma3_text lfm2 mixtral qwen2 qwen3 qwen3_moe".split()  # noqa: SIM905
WRONG_IN_MLX_LM = ["gemma2", "gpt_oss"]


def stock(folder: Path, ids: list[int]) -> np.ndarray:
    """Logits of mlx-lm as it is, in float32."""
    model, _ = load_model(folder)
    model.set_dtype(mx.float32)
    return np.array(model(mx.array([ids]))[0])


def ours(path: Path, ids: list[int]) -> np.ndarray:
    with LLM(str(path), backend="mlx", dtype="float32") as llm:
        return llm.logits(ids)


def reference(shared: Path, name: str) -> tuple[list[int], np.ndarray]:
    with np.load(shared / "parity" / f"{name}.npz") as data:
        return data["ids"].reshape(-1).tolist(), data["logits"]


@pytest.mark.shared
@pytest.mark.parametrize("name", [*RIGHT_IN_MLX_LM, *WRONG_IN_MLX_LM])
def test_every_family_computes_the_same(name: str, shared: Path, tmp_path: Path) -> None:
    report = convert(shared / "parity" / f"{name}.gguf", tmp_path / "out")
    assert report.max_error == 0
    ids, expected = reference(shared, name)
    logits = ours(tmp_path / "out", ids)
    np.testing.assert_allclose(logits, expected, atol=1e-3)
    if name in RIGHT_IN_MLX_LM:
        np.testing.assert_allclose(stock(tmp_path / "out", ids), logits, atol=1e-4)


@pytest.mark.shared
@pytest.mark.parametrize("rule", ["exact", "faithful", "compact"])
@pytest.mark.parametrize("kind", ["Q4_K_M", "IQ4_XS", "Q2_K"])
def test_quantized_models_compute_what_the_report_says(
    kind: str, rule: Any, shared: Path, tmp_path: Path
) -> None:
    path = shared / "quants" / f"qwen3-{kind}.gguf"
    report = convert(path, tmp_path / "out", fidelity=rule)
    ids = list(range(3, 40))
    logits = ours(tmp_path / "out", ids)
    np.testing.assert_allclose(stock(tmp_path / "out", ids), logits, atol=1e-4)
    assert report.noise_ratio is not None
    if rule == "exact":
        with np.load(path.with_suffix(".npz")) as data:
            ids, expected = data["ids"].reshape(-1).tolist(), data["logits"]
        np.testing.assert_allclose(ours(tmp_path / "out", ids), expected, atol=2e-3)
        assert report.noise_ratio == 0
    elif rule == "faithful":
        assert all(t.noise_ratio is None or t.noise_ratio <= 0.1 for t in report.tensors)
        assert 0 < report.noise_ratio < 0.1
    else:
        assert all(t.bytes <= 1.05 * t.source_bytes for t in report.tensors)


@pytest.mark.shared
@pytest.mark.parametrize("name", ["llama3-rope", "qwen2", "qwen3_moe"])
def test_folders_stay_as_they_are(name: str, shared: Path, tmp_path: Path) -> None:
    source, out = shared / "hf" / name, tmp_path / "out"
    convert(source, out)
    before, after = open_weights(source), open_weights(out)
    assert before.names() == after.names()
    for tensor in before.names():
        one, other = before.load(tensor), after.load(tensor)
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one.array, other.array)
    for text in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (out / text).read_bytes() == (source / text).read_bytes()


@pytest.mark.shared
@pytest.mark.parametrize("quant", ["q4", "q8", "mxfp4", "mxfp8", "nvfp4"])
def test_quantized_weights_are_those_of_mlx(quant: str, shared: Path, tmp_path: Path) -> None:
    source = shared / "hf" / "llama3-rope"
    convert(source, tmp_path / "out", quant=quant, scales="float32")
    settings = json.loads((tmp_path / "out" / "config.json").read_text())["quantization"]
    arrays = mx.load(str(tmp_path / "out" / "model.safetensors"))
    dense = mx.load(str(source / "model.safetensors"))
    name = "model.layers.0.mlp.down_proj"
    expected = mx.quantize(
        dense[f"{name}.weight"].astype(mx.float32),
        **{key: settings[key] for key in ("group_size", "bits", "mode")},
    )
    for part, array in zip(("weight", "scales", "biases"), expected, strict=False):
        assert mx.array_equal(arrays[f"{name}.{part}"], array)
    ids = list(range(3, 30))
    np.testing.assert_allclose(stock(tmp_path / "out", ids), ours(tmp_path / "out", ids), atol=1e-4)


@pytest.mark.shared
def test_mixed_recipes_by_role_and_name(shared: Path, tmp_path: Path) -> None:
    recipe = Recipe(
        quant="q4",
        group_size=32,
        mixed=True,
        roles={"head": "q8"},
        tensors={"model.layers.1.*": "q3", "*.layers.1.self_attn.o_proj": "keep"},
    )
    report = convert(shared / "hf" / "qwen3_moe", tmp_path / "out", quant=recipe)
    found = {t.name: t.container for t in report.tensors}
    layer = "model.layers.{}.".format
    assert found[layer(0) + "self_attn.q_proj.weight"] == "4-bit g32 float16"
    assert found[layer(0) + "self_attn.v_proj.weight"] == "6-bit g32 float16"
    assert found[layer(0) + "mlp.switch_mlp.down_proj.weight"] == "6-bit g32 float16"
    assert found[layer(0) + "mlp.gate.weight"] == "8-bit g32 float16"
    assert found["lm_head.weight"] == "8-bit g32 float16"
    assert found[layer(1) + "self_attn.q_proj.weight"] == "3-bit g32 float16"
    assert found[layer(1) + "self_attn.o_proj.weight"] == "float16"
    assert found["model.norm.weight"] == "float16"
    ids = list(range(3, 30))
    np.testing.assert_allclose(stock(tmp_path / "out", ids), ours(tmp_path / "out", ids), atol=1e-4)
    again = convert(tmp_path / "out", tmp_path / "copy")
    assert again.bytes == report.bytes
    assert again.max_error == 0
    np.testing.assert_array_equal(ours(tmp_path / "out", ids), ours(tmp_path / "copy", ids))


def test_narrow_blocks_are_not_quantized_wider(
    make_gguf: Callable[..., Path], tmp_path: Path
) -> None:
    kind = gguf.GGMLQuantizationType
    types = {"blk.0.attn_q.weight": kind.Q4_0, "blk.0.attn_output.weight": kind.Q8_0}
    report = convert(make_gguf(types=types), tmp_path / "out", quant="q6")
    found = {t.name: t.container for t in report.tensors}
    assert found["model.layers.0.self_attn.q_proj.weight"] == "4-bit g32 float16"
    assert found["model.layers.0.self_attn.o_proj.weight"] == "6-bit g64 float16"
    assert found["model.layers.0.mlp.down_proj.weight"] == "6-bit g32 float16"  # 96 columns


@pytest.mark.shared
def test_the_folder_is_whole(shared: Path, tmp_path: Path) -> None:
    source = shared / "quants" / "qwen3-Q4_K_M.gguf"
    seen: list[tuple[int, int]] = []
    report = convert(source, tmp_path / "out", progress=lambda *at: seen.append(at))
    kept = json.loads((tmp_path / "out" / "rl_mlx.json").read_text())
    assert kept["sha256"] == report.sha256 == hashlib.sha256(source.read_bytes()).hexdigest()
    assert kept["tensors"][0]["container"] == report.tensors[0].container
    assert {"rl_mlx", "source", "fidelity", "scales", "bits_before", "bits_after"} <= kept.keys()
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1] == (report.source_bytes, report.source_bytes)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization"] == config["quantization_config"]
    embedding = {"group_size": 32, "bits": 8, "mode": "affine"}
    assert config["quantization"]["model.embed_tokens"] == embedding
    assert (config["quantization"]["bits"], config["quantization"]["group_size"]) == (4, 32)
    model, tokenizer = load(str(tmp_path / "out"))
    assert tree_flatten(model.parameters())
    with LLM(str(source), backend="mlx") as llm:
        text = "Hello, the 12 dogs. <|im_end|>"
        assert tokenizer.encode(text) == llm.tokenize(text)
        assert tokenizer.decode(llm.tokenize(text)) == text
        messages = [{"role": "user", "content": "hi"}]
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        assert prompt == llm.apply_template(messages)
    assert inspect(tmp_path / "out").bits_per_weight == pytest.approx(report.bits_after)
    assert [*tmp_path.iterdir()] == [tmp_path / "out"]


@pytest.mark.shared
def test_shards_and_index(shared: Path, tmp_path: Path) -> None:
    source = shared / "parity" / "qwen3.gguf"
    convert(source, tmp_path / "one")
    convert(source, tmp_path / "many", shard_bytes=700_000)
    files = sorted(p.name for p in (tmp_path / "many").glob("*.safetensors"))
    assert len(files) > 3
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors"
    places = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    one = mx.load(str(tmp_path / "one" / "model.safetensors"))
    assert set(places["weight_map"]) == set(one)
    for name, file in places["weight_map"].items():
        assert mx.array_equal(mx.load(str(tmp_path / "many" / file))[name], one[name])
    sizes = [(tmp_path / "many" / f).stat().st_size for f in files]
    largest = max(a.nbytes for a in one.values())
    assert max(sizes) <= max(700_000, largest) + 20_000
    assert places["metadata"]["total_size"] == sum(a.nbytes for a in one.values())
    ids = [5, 6, 7]
    np.testing.assert_array_equal(ours(tmp_path / "many", ids), ours(tmp_path / "one", ids))


def test_dtype_rounds_plain_floats(make_gguf: Callable[..., Path], tmp_path: Path) -> None:
    kept = convert(make_gguf(), tmp_path / "kept")
    assert {t.container for t in kept.tensors} == {"float32"}
    asked = convert(make_gguf(), tmp_path / "asked", dtype="bfloat16")
    assert {t.container for t in asked.tensors} == {"bfloat16"}
    assert 0 < asked.rms < 4e-3


def test_mixed_floats_are_noted(make_gguf: Callable[..., Path], tmp_path: Path) -> None:
    types = {"token_embd.weight": gguf.GGMLQuantizationType.Q8_0}
    report = convert(make_gguf(types=types), tmp_path / "out")
    assert any("float32" in note and "dtype=" in note for note in report.notes)
    assert any("no tokenizer" in note for note in report.notes)


# ---- what goes wrong ----


def test_a_destination_is_kept(make_gguf: Callable[..., Path], tmp_path: Path) -> None:
    source, out = make_gguf(), tmp_path / "out"
    convert(source, out)
    (out / "mine").write_text("x")
    with pytest.raises(DestinationExists, match="--force"):
        convert(source, out)
    assert (out / "mine").exists()
    convert(source, out, force=True)
    assert not (out / "mine").exists()


def test_force_replaces_models_only(make_gguf: Callable[..., Path], tmp_path: Path) -> None:
    source, out = make_gguf(), tmp_path / "photos"
    out.mkdir()
    (out / "cat.jpg").write_text("x")
    with pytest.raises(DestinationExists, match="no model folder"):
        convert(source, out, force=True)
    with pytest.raises(DestinationExists, match="no model folder"):
        convert(source, out / "cat.jpg", force=True)
    assert (out / "cat.jpg").exists()


@pytest.mark.parametrize("place", [".", "..", "inner"])
def test_the_source_is_never_in_the_way(
    place: str, make_folder: Callable[..., Path], hf_config: Any, mlx_arrays: Any
) -> None:
    config = hf_config()
    folder = make_folder(config, {"model.safetensors": mlx_arrays(config)})
    with pytest.raises(InvalidRequest, match="another place"):
        convert(folder, folder / place, force=True)
    assert (folder / "config.json").exists()


def test_bad_sources_leave_nothing(
    make_folder: Callable[..., Path], hf_config: Any, mlx_arrays: Any, tmp_path: Path
) -> None:
    config = hf_config()
    arrays = mlx_arrays(config)
    arrays.pop("model.layers.1.mlp.up_proj.weight")
    folder = make_folder(config, {"model.safetensors": arrays})
    with pytest.raises(FormatError, match=r"up_proj.*missing"):
        convert(folder, tmp_path / "out")
    with pytest.raises(ModelNotFound):
        convert(tmp_path / "nothing.gguf", tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"quant": "q9"}, "q2, q3"),
        ({"fidelity": "good"}, "exact, faithful, compact"),
        ({"scales": "float8"}, "float32, float16, bfloat16"),
        ({"dtype": "int8"}, "float32"),
        ({"group_size": 64}, "quant"),
        ({"quant": "q4", "group_size": 16}, "32, 64 or 128"),
        ({"quant": "mxfp4", "group_size": 64}, "leave group_size out"),
    ],
)
def test_unknown_options(
    options: Any, words: str, make_gguf: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(InvalidRequest, match=words):
        convert(make_gguf(), tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("bad", [{"roles": {"x": "q4"}}, {"tensors": {"*": "q1"}}])
def test_recipes_are_checked(bad: Any) -> None:
    with pytest.raises(InvalidRequest, match="known are"):
        Recipe(quant="q4", **bad)


def test_families_that_are_not_known_are_copied_but_not_quantized(
    make_folder: Callable[..., Path], tmp_path: Path
) -> None:
    arrays = {"a.weight": mx.ones((64, 64)), "b": mx.ones((3,), mx.bfloat16)}
    folder = make_folder({"model_type": "novel"}, {"model.safetensors": arrays})
    convert(folder, tmp_path / "out")
    copied = mx.load(str(tmp_path / "out" / "model.safetensors"))
    assert copied["b"].dtype == mx.bfloat16
    with pytest.raises(UnsupportedModel, match="novel"):
        convert(folder, tmp_path / "other", quant="q4")


def test_a_disk_that_is_too_small(
    make_gguf: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make_gguf()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9, 8, 1))  # type: ignore[attr-defined]
    with pytest.raises(OutOfMemory, match="make room"):
        convert(source, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["model.gguf"]


def test_a_disk_that_fills_up(
    make_gguf: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, left = make_gguf(), [5]

    def pwrite(*_: Any) -> int:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(28, "No space left on device")
        return real(*_)

    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", pwrite)
    with pytest.raises(OutOfMemory, match="disk is full"):
        convert(source, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["model.gguf"]


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="this system reserves no room")
def test_room_is_taken_where_the_file_system_can(
    make_gguf: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, number = make_gguf(), [errno.ENOSPC]

    def fallocate(*_: Any) -> None:
        raise OSError(number[0], "cannot")

    monkeypatch.setattr(os, "posix_fallocate", fallocate)
    with pytest.raises(OutOfMemory, match="disk is full"):
        convert(source, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["model.gguf"]
    number[0] = errno.EOPNOTSUPP
    convert(source, tmp_path / "out")
    monkeypatch.undo()
    convert(source, tmp_path / "reserved")
    weights = [(tmp_path / n / "model.safetensors").read_bytes() for n in ("out", "reserved")]
    assert weights[0] == weights[1]


def test_a_disk_that_fails_while_others_compute(
    make_gguf: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make_gguf()

    def fsync(_: Any) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(checkpoint, "_FLUSH", 1)
    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match="Input/output error"):
        convert(source, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["model.gguf"]


def test_a_container_that_proves_too_narrow_leaves_no_trace(
    make_gguf: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One slice does not fit while other threads still write theirs."""
    kind = gguf.GGMLQuantizationType.Q4_0
    source = make_gguf(types={f"blk.0.attn_{part}.weight": kind for part in ("q", "k", "v")})
    convert(source, tmp_path / "expected", scales="float32")
    real, calls = pipeline.hold, itertools.count()

    def hold(piece: Piece, holding: Holding) -> Tensor:
        if holding.bits and holding.dtype == "float16":
            if next(calls) % 3 == 2:
                raise Unfit
            time.sleep(0.02)
        return real(piece, holding)

    monkeypatch.setattr(pipeline, "hold", hold)
    monkeypatch.setattr(pipeline, "_SLICE", 256)
    convert(source, tmp_path / "out")
    folders = (tmp_path / name / "model.safetensors" for name in ("expected", "out"))
    expected, got = (load_file(path) for path in folders)
    packed = [name for name in got if name.removesuffix(".scales") + ".biases" in got]
    assert len(packed) == 3
    for name in packed:
        for part in ("scales", "biases", "weight"):
            array = name.removesuffix("scales") + part
            assert np.array_equal(expected[array], got[array]), array


def test_interrupted(make_gguf: Callable[..., Path], tmp_path: Path) -> None:
    def stop(done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    source = make_gguf()
    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "out", progress=stop)
    assert [p.name for p in tmp_path.iterdir()] == ["model.gguf"]


def test_killed_and_started_again(make_gguf: Callable[..., Path], tmp_path: Path) -> None:
    source, out = make_gguf(), tmp_path / "out"
    convert(source, out)
    program = (
        "import os, sys; from rl_mlx.convert import convert\n"
        "convert(sys.argv[1], sys.argv[2], force=True,"
        " progress=lambda done, total: os._exit(9) if done > total // 2 else None)"
    )
    killed = subprocess.run([sys.executable, "-c", program, source, out], check=False)
    assert killed.returncode == 9
    assert len([p for p in tmp_path.iterdir() if p.name.endswith(".part")]) == 1
    assert (out / "config.json").exists()
    convert(source, out, force=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.gguf", "out"]


def test_a_model_that_a_killed_run_had_moved_aside_comes_back(
    make_gguf: Callable[..., Path], tmp_path: Path
) -> None:
    source, out = make_gguf(), tmp_path / "out"
    convert(source, out)
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    out.rename(tmp_path / f".out.{gone.pid}.old")
    with pytest.raises(DestinationExists):
        convert(source, out)
    assert (out / "config.json").exists()


def test_the_table(make_gguf: Callable[..., Path], tmp_path: Path) -> None:
    types = {"blk.0.attn_q.weight": gguf.GGMLQuantizationType.Q8_0}
    report = convert(make_gguf(types=types), tmp_path / "out")
    assert isinstance(report, Report)
    head, *_, last = report.rows()
    assert len({len(row) for row in report.rows()}) == 1
    assert (head[0], last[0]) == ("tensor", "all")
    json.dumps(report.as_dict())


def test_the_package_is_light() -> None:
    program = (
        "import sys, rl_mlx.convert\n"
        "print({'mlx', 'mlx_lm', 'transformers', 'numpy', 'torch'} & set(sys.modules))\n"
        "from rl_mlx.convert import convert, inspect\n"
        "print({'mlx', 'mlx_lm', 'transformers', 'torch'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    assert done.stdout.split() == [b"set()", b"set()"]
