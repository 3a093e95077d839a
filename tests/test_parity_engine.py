"""Every reference model through the whole engine: the same tokens whatever else goes on."""

from __future__ import annotations

import numpy as np
import pytest

from rl_mlx import LLM

pytestmark = pytest.mark.shared

MODELS = [
    "gemma2", "gemma3_text", "gpt_oss", "lfm2", "llama", "llama3-rope", "mixtral", "qwen2",
    "qwen3", "qwen3_moe",
]  # fmt: skip
OPTIONS = {"temperature": 0, "max_tokens": 24, "ignore_eos": True}


def prompts():
    rng = np.random.default_rng(5)
    return [rng.integers(5, 1000, n).tolist() for n in (3, 90, 17, 41, 130, 8, 64, 29)]


@pytest.mark.parametrize("name", MODELS)
def test_alone_in_a_batch_after_a_hit_and_with_a_random_draft(shared, name):
    path = str(shared / f"parity/{name}.gguf")
    # Gemma 2's file has a vocabulary of its own, so that only the text can draft for it.
    other = "llama" if name == "qwen2" else "qwen2"
    draft = "lookup" if name == "gemma2" else str(shared / f"parity/{other}.gguf")
    with LLM(path, dtype="float32") as llm:
        alone = [llm.generate(p, **OPTIONS).token_ids for p in prompts()]
        again = [llm.generate(p, **OPTIONS) for p in prompts()]  # all of them prefix hits
    assert [r.token_ids for r in again] == alone
    assert all(r.timings.reused > 0 for r in again if r.usage.prompt_tokens > 64)
    with LLM(path, dtype="float32") as llm:
        assert [r.token_ids for r in llm.generate(prompts(), **OPTIONS)] == alone
    with LLM(path, dtype="float32", draft=draft, draft_tokens=4) as llm:
        drafted = llm.generate(prompts(), **OPTIONS)
    assert [r.token_ids for r in drafted] == alone
    assert sum(r.timings.drafted for r in drafted) > (0 if draft == "lookup" else 100)


# The experts of a random mixture are chosen by hairs: any rounding changes which ones answer.
@pytest.mark.parametrize(
    "name", ["gemma2", "gemma3_text", "llama", "llama3-rope", "qwen2", "qwen3"]
)
def test_eight_bits_of_kv_change_logits_little(shared, name):
    path = str(shared / f"parity/{name}.gguf")
    ids = np.load(shared / f"parity/{name}.npz")["ids"].tolist()
    with LLM(path, dtype="float32") as llm:
        want = llm.logits(ids)
    with LLM(path, dtype="float32", kv_bits=8) as llm:
        got = llm.logits(ids)
    assert 0 < np.linalg.norm(got - want) / np.linalg.norm(want) < 2e-2
