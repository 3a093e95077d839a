"""Logits of real files against transformers and ggml, and a golden text: the MLX backend, whole."""

from __future__ import annotations

import json

import numpy as np
import pytest

from rl_mlx import LLM

pytestmark = pytest.mark.shared

ARCHITECTURES = [
    "gemma2", "gemma3_text", "gpt_oss", "lfm2", "llama", "llama3-rope", "mixtral", "qwen2",
    "qwen3", "qwen3_moe",
]  # fmt: skip
EXACT = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K_M", "Q5_K_M", "Q6_K", "Q3_K_M", "Q2_K"]
EXACT += ["IQ4_XS", "TQ2_0"]


def errors(path, reference, **options):
    """Relative L2 of the logits, and whether every position has the same best token."""
    with LLM(str(path), backend="mlx", **options) as llm:
        got = llm.logits(reference["ids"].tolist())
    want = reference["logits"]
    assert got.dtype == np.float32
    assert got.shape == want.shape
    return np.linalg.norm(got - want) / np.linalg.norm(want), got.argmax(1) == want.argmax(1)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_gguf_has_the_logits_of_transformers(shared, name):
    reference = np.load(shared / f"parity/{name}.npz")
    error, same = errors(shared / f"parity/{name}.gguf", reference, dtype="float32")
    assert error < 1e-5
    assert same.all()


@pytest.mark.parametrize("name", ["qwen2", "llama3-rope", "qwen3_moe"])
def test_folders_have_the_logits_of_transformers(shared, name):
    reference = np.load(shared / f"hf/{name}/reference.npz")
    error, same = errors(shared / f"hf/{name}", reference, dtype="float32")
    assert error < 1e-5
    assert same.all()


@pytest.mark.parametrize("kind", EXACT)
def test_float32_asked_for_keeps_every_quantization_exact(shared, kind):
    reference = np.load(shared / f"quants/qwen3-{kind}.npz")
    error, same = errors(shared / f"quants/qwen3-{kind}.gguf", reference, dtype="float32")
    assert error < 1e-5
    assert same.all()


@pytest.mark.parametrize(("kind", "bound"), [("Q8_0", 1e-5), ("Q4_K_M", 2e-2), ("Q6_K", 2e-2)])
def test_packed_containers_stay_within_their_guarantee(shared, kind, bound):
    # Without dtype= tensors stay packed; those in Q6_K cost what the table in docs says.
    reference = np.load(shared / f"quants/qwen3-{kind}.npz")
    error, same = errors(shared / f"quants/qwen3-{kind}.gguf", reference)
    assert error < bound
    assert same.mean() > 0.9


@pytest.mark.parametrize("from_the_middle", [False, True])
def test_the_golden_story(shared, from_the_middle):
    golden = json.loads((shared / "models/stories260K.greedy.json").read_text())
    ids = golden["greedy_ids_from_bos"]
    with LLM(str(shared / "models/stories260K.gguf"), dtype="float32") as llm:
        assert llm.info.backend == "mlx"
        if from_the_middle:
            result = llm.generate(ids[:70], temperature=0, max_tokens=131)
            assert result.token_ids == ids[70:]
            return
        result = llm.generate("", temperature=0, max_tokens=200)
        assert result.token_ids == ids[1:]
        assert result.text.startswith("Once upon a time, there was a little girl named Lily.")
        assert result.finish_reason == "length"
        assert (result.usage.prompt_tokens, result.usage.completion_tokens) == (1, 200)
