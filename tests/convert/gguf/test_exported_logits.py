"""Exported files run on llama.cpp, and compute what the folder computes on MLX."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

import rl_mlx.demo
from rl_mlx import LLM
from rl_mlx.convert import convert, export
from rl_mlx.model.layers import DenseMatrix, QuantizedMatrix

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("xllamacpp") is None or sys.platform == "win32",
    reason="needs llama.cpp's binding, whose C API is hidden on Windows",
)


def logits(model: Path, backend: str, ids: list[int]) -> np.ndarray:
    with LLM(str(model), backend=backend, dtype="float32") as llm:
        return llm.logits(ids)


def of_parity(shared: Path, name: str, folder: Path) -> list[int]:
    convert(shared / "parity" / f"{name}.gguf", folder)
    return np.load(shared / "parity" / f"{name}.npz")["ids"].ravel()[:24].tolist()


def rounded_range(folder: Path) -> None:
    """Round YaRN's range to whole pairs, as llama.cpp does whatever the config says."""
    config = json.loads((folder / "config.json").read_text("utf-8"))
    for rope in (config["rope_parameters"], config["rope_scaling"]):
        rope["truncate"] = True
    (folder / "config.json").write_text(json.dumps(config), "utf-8")


@pytest.mark.shared
@pytest.mark.parametrize(
    "name",
    ["gemma2", "gemma3_text", "gpt_oss", "lfm2", "llama", "mixtral", "qwen3", "llama3-rope",
     "qwen2", "qwen3_moe"],
)  # fmt: skip
def test_floats_give_our_logits(name: str, shared: Path, tmp_path: Path) -> None:
    ids = of_parity(shared, name, tmp_path / "mlx")
    if name == "gpt_oss":
        rounded_range(tmp_path / "mlx")
    export(tmp_path / "mlx", tmp_path / "out.gguf", quant="F32")
    ours = logits(tmp_path / "mlx", "mlx", ids)
    theirs = logits(tmp_path / "out.gguf", "llama.cpp", ids)
    # Gemma's are the largest errors: llama.cpp looks GELU up in a table of float16.
    assert np.linalg.norm(theirs - ours) < 2e-3 * np.linalg.norm(ours)
    assert (theirs.argmax(-1) == ours.argmax(-1)).all()


def rounded(x: mx.array) -> mx.array:
    """What ggml multiplies blocks of 32 weights with: Q8_0, whose scale is a float16."""
    blocks = x.astype(mx.float32).reshape(*x.shape[:-1], -1, 32)
    largest = mx.abs(blocks).max(-1, keepdims=True)
    q = mx.round(blocks * (127 / mx.where(largest == 0, 1, largest)))
    return (q * (largest / 127).astype(mx.float16).astype(mx.float32)).reshape(x.shape)


@pytest.mark.shared
@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "llama3-rope"])
def test_a_quantized_file_is_off_by_what_rounding_activations_costs(
    name: str, shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Random models have near ties, so that 90% of best tokens agree in Q8_0. The file is right:
    its numbers as F32 give our logits, and our own with ggml's rounding are as far from them.
    """
    ids = of_parity(shared, name, tmp_path / "mlx")
    export(tmp_path / "mlx", tmp_path / "q8.gguf", quant="Q8_0")
    ours = logits(tmp_path / "q8.gguf", "mlx", ids)
    theirs = logits(tmp_path / "q8.gguf", "llama.cpp", ids)

    convert(tmp_path / "q8.gguf", tmp_path / "q8", fidelity="exact")
    export(tmp_path / "q8", tmp_path / "f32.gguf", quant="F32")
    unrounded = logits(tmp_path / "f32.gguf", "llama.cpp", ids)
    assert np.linalg.norm(unrounded - ours) < 2e-3 * np.linalg.norm(ours)
    assert (unrounded.argmax(-1) == ours.argmax(-1)).mean() >= 0.95

    for kind in (DenseMatrix, QuantizedMatrix):  # either is how packed weights are held
        plainly = kind.multiply
        monkeypatch.setattr(kind, "multiply", lambda self, x, by=plainly: by(self, rounded(x)))
    with_rounding = logits(tmp_path / "q8.gguf", "mlx", ids)
    assert 0.8 < np.linalg.norm(theirs - ours) / np.linalg.norm(with_rounding - ours) < 1.25


@pytest.mark.shared
@pytest.mark.parametrize("quant", ["Q8_0", "Q4_0"])
def test_a_trained_model_agrees_on_the_next_token(quant: str, shared: Path, tmp_path: Path) -> None:
    convert(shared / "models" / "stories260K.gguf", tmp_path / "mlx")
    export(tmp_path / "mlx", tmp_path / "out.gguf", quant=quant)
    with LLM(str(tmp_path / "out.gguf"), backend="mlx", dtype="float32") as llm:
        prompt = llm.tokenize("Once upon a time, there was a little girl")
        ids = prompt + llm.generate(prompt, max_tokens=160, temperature=0).token_ids
        ours = llm.logits(ids)
    theirs = logits(tmp_path / "out.gguf", "llama.cpp", ids)
    assert (ours.argmax(-1) == theirs.argmax(-1)).mean() >= 0.95


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[int]]:
    """A trained model as an MLX folder, and a conversation: models of chance have near ties."""
    source = next(Path(rl_mlx.demo.__file__).parent.glob("demo.gguf"))
    folder = tmp_path_factory.mktemp("demo") / "mlx"
    convert(source, folder)
    with LLM(str(source), backend="mlx", dtype="float32") as llm:
        prompt = llm.apply_template([{"role": "user", "content": "Hello, who are you?"}])
        answer = llm.generate(prompt, max_tokens=48, temperature=0).text
        return folder, llm.tokenize(prompt + answer)


@pytest.mark.parametrize("how", ["Q4_K_M", "Q8_0", "q4 of MLX", "mxfp4 of MLX", "nvfp4 of MLX"])
def test_quantized_files_agree_on_the_next_token(
    how: str, demo: tuple[Path, list[int]], tmp_path: Path
) -> None:
    folder, ids = demo
    quant, _, mlx = how.partition(" of ")
    if mlx:
        convert(folder, tmp_path / "q", quant=quant)
        folder = tmp_path / "q"
    export(folder, tmp_path / "out.gguf", quant=None if mlx else quant)
    ours = logits(folder if mlx else tmp_path / "out.gguf", "mlx", ids)
    theirs = logits(tmp_path / "out.gguf", "llama.cpp", ids)
    assert (ours.argmax(-1) == theirs.argmax(-1)).mean() >= 0.95


@pytest.mark.shared
def test_a_tokenizer_comes_out_as_it_went_in(shared: Path, tmp_path: Path) -> None:
    export(shared / "hf" / "qwen2", tmp_path / "out.gguf")
    text = "Hello, wörld!  12345\n\n  naïve café 你好 <|im_start|>"
    with LLM(str(shared / "hf" / "qwen2"), backend="mlx", dtype="float32") as llm:
        expected = llm.tokenize(text), llm.apply_template([{"role": "user", "content": "hi"}])
    with LLM(str(tmp_path / "out.gguf"), backend="llama.cpp") as llm:
        assert llm.tokenize(text) == expected[0]
        assert llm.apply_template([{"role": "user", "content": "hi"}]) == expected[1]
