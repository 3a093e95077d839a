"""Files as others make them, and folders that mlx-lm loads."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import mlx.core as mx
import numpy as np
import pytest

from rl_mlx import LLM
from rl_mlx.convert import convert, export

Make = Callable[..., Path]


def logits(path: Path, ids: list[int], backend: str = "mlx") -> np.ndarray:
    with LLM(str(path), backend=backend, dtype="float32") as llm:
        return llm.logits(ids)


def difference(got: np.ndarray, want: np.ndarray) -> float:
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def rewritten(
    path: Path, target: Path, arch: str, change: Callable[[dict[str, np.ndarray]], None]
) -> Path:
    """A GGUF file with other tensors, under the name of another architecture."""
    source = gguf.GGUFReader(path)
    old = str(source.fields["general.architecture"].contents())
    writer = gguf.GGUFWriter(target, arch)
    for field in source.fields.values():
        if field.name.startswith("GGUF.") or field.name == "general.architecture":
            continue
        name = field.name.replace(f"{old}.", f"{arch}.", 1)
        is_array = field.types[0] == gguf.GGUFValueType.ARRAY
        sub = field.types[-1] if is_array and len(field.types) > 1 else None
        if sub is None and is_array:  # merges, of which there are none
            writer.add_array(name, ["a b"])
        else:
            writer.add_key_value(name, field.contents(), field.types[0], sub)
    tensors = {t.name: np.array(t.data) for t in source.tensors}
    change(tensors)
    for name, array in tensors.items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


@pytest.fixture
def exported(make_folder: Make, named: Callable[[str], Any], tmp_path: Path) -> Make:
    def make(name: str) -> Path:
        export(make_folder(named(name)), tmp_path / "model.gguf")
        return tmp_path / "model.gguf"

    return make


def test_a_latent_model_of_before_its_matrices_were_split(
    exported: Make, ids: list[int], tmp_path: Path
) -> None:
    path = exported("deepseek_v3")

    def join(tensors: dict[str, np.ndarray]) -> None:
        for i in range(3):
            keys, values = (tensors.pop(f"blk.{i}.attn_{k}_b.weight") for k in "kv")
            both = np.concatenate([keys.swapaxes(1, 2), values], axis=1)
            tensors[f"blk.{i}.attn_kv_b.weight"] = both.reshape(-1, both.shape[-1])

    older = rewritten(path, tmp_path / "older.gguf", "deepseek2", join)
    assert difference(logits(older, ids), logits(path, ids)) < 1e-5


@pytest.mark.parametrize("fused", [False, True])
def test_qwen3_next_as_llamacpp_converts_it(
    exported: Make, ids: list[int], tmp_path: Path, fused: bool
) -> None:
    pytest.importorskip("xllamacpp", reason="needs the llama.cpp binding (xllamacpp)")
    path = exported("qwen3_next")
    keys, each, key, value = 2, 2, 32, 32  # heads and widths of the registry's model

    def in_order(rows: np.ndarray, width: int) -> np.ndarray:
        """Value heads key head by key head, out of turns."""
        return rows.reshape(each, keys, width, -1).swapaxes(0, 1).reshape(rows.shape)

    def as_next(tensors: dict[str, np.ndarray]) -> None:
        for i in (0, 1, 2):
            at = f"blk.{i}."
            for name in ("attn_qkv.weight", "ssm_conv1d.weight"):
                qk, v = np.split(tensors[at + name], [2 * keys * key])
                tensors[at + name] = np.concatenate([qk, in_order(v, value)])
            for name, width in (("attn_gate.weight", value), ("ssm_a", 1), ("ssm_dt.bias", 1)):
                tensors[at + name] = in_order(tensors[at + name], width)
            out = tensors[at + "ssm_out.weight"]
            tensors[at + "ssm_out.weight"] = np.ascontiguousarray(in_order(out.T, value).T)
            b, a = (in_order(tensors.pop(f"{at}ssm_{n}.weight"), 1) for n in ("beta", "alpha"))
            pairs = [t.reshape(keys, each, -1) for t in (b, a)]
            tensors[at + "ssm_ba.weight"] = np.concatenate(pairs, axis=1).reshape(2 * len(b), -1)
            if fused:
                qkv, z = tensors.pop(at + "attn_qkv.weight"), tensors.pop(at + "attn_gate.weight")
                q, k, v = np.split(qkv, [keys * key, 2 * keys * key])
                parts = [t.reshape(keys, -1, t.shape[-1]) for t in (q, k, v, z)]
                tensors[at + "ssm_in.weight"] = np.concatenate(parts, axis=1).reshape(
                    -1, qkv.shape[-1]
                )

    file = rewritten(path, tmp_path / "next.gguf", "qwen3next", as_next)
    want = logits(path, ids)
    assert difference(logits(file, ids), want) < 1e-5
    assert difference(logits(file, ids, "llama.cpp"), want) < 2e-3


@pytest.mark.parametrize("name", ["qwen3_5_moe_text", "deepseek_v3"])
def test_a_converted_folder_loads_in_mlx_lm(
    exported: Make, ids: list[int], tmp_path: Path, name: str
) -> None:
    from mlx_lm.utils import load_model

    path = exported(name)
    convert(path, tmp_path / "mlx")
    want = logits(path, ids)
    assert difference(logits(tmp_path / "mlx", ids), want) < 1e-5
    mx.disable_compile()
    try:
        model, _ = load_model(tmp_path / "mlx")
        got = np.array(model(mx.array([ids]))[0])
    finally:
        mx.enable_compile()
    assert difference(got, want) < 1e-4


@pytest.mark.parametrize("form", ["hugging face", "mlx-lm"])
def test_the_decoder_in_a_model_that_sees(
    make_folder: Make, named: Callable[[str], Any], ids: list[int], tmp_path: Path, form: str
) -> None:
    folder = make_folder(named("qwen3_5_text"))
    want = logits(folder, ids)
    config = json.loads((folder / "config.json").read_text())
    whole = {"model_type": "qwen3_5", "text_config": config, "vision_config": {"depth": 1}}
    (folder / "config.json").write_text(json.dumps(whole))
    arrays = dict(mx.load(str(folder / "model.safetensors")))
    if form == "mlx-lm":
        arrays = {f"language_model.{name}": array for name, array in arrays.items()}
    else:
        arrays = {_as_trained(name): _trained(name, array) for name, array in arrays.items()}
        arrays |= {"model.visual.blocks.0.norm1.weight": mx.ones(4), "mtp.fc.weight": mx.ones(4)}
    mx.save_safetensors(str(folder / "model.safetensors"), arrays)
    assert difference(logits(folder, ids), want) < 1e-5


def _as_trained(name: str) -> str:
    return name.replace("model.", "model.language_model.", 1) if "model." in name else name


def _trained(name: str, array: mx.array) -> mx.array:
    """Kernels as torch has them, norms around 0."""
    if name.endswith("conv1d.weight"):
        return mx.contiguous(array.swapaxes(1, 2))
    plain = name.endswith("norm.weight") and "linear_attn.norm" not in name
    return array - 1 if plain else array
