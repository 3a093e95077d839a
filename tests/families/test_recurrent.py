"""Unusual families through the whole engine, recurrent ones above all: the same tokens whatever
else goes on.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from rl_mlx import LLM
from rl_mlx.model import gated_delta, mamba2

OPTIONS: dict[str, Any] = {"temperature": 0, "max_tokens": 12, "ignore_eos": True}


def prompts() -> list[list[int]]:
    rng = np.random.default_rng(5)
    return [rng.integers(3, 256, n).tolist() for n in (3, 90, 17, 41, 80, 8)]


@pytest.fixture
def draft(make_folder: Callable[..., Path], named: Callable[[str], Any], tmp_path: Path) -> Path:
    """A model of chance that guesses wrong most of the time."""
    return make_folder(named("llama")).rename(tmp_path / "draft")


@pytest.mark.parametrize("name", ["qwen3_5_text", "falcon_h1", "gpt2", "cohere2"])
def test_alone_in_a_batch_after_a_hit_and_with_a_random_draft(
    name: str, draft: Path, make_folder: Callable[..., Path], named: Callable[[str], Any]
) -> None:
    folder = str(make_folder(named(name)))
    with LLM(folder, dtype="float32") as llm:
        alone = [llm.generate(p, **OPTIONS).token_ids for p in prompts()]
        again = [llm.generate(p, **OPTIONS) for p in prompts()]  # all of them prefix hits
    assert [r.token_ids for r in again] == alone
    assert all(r.timings.reused > 0 for r in again if r.usage.prompt_tokens > 64)
    with LLM(folder, dtype="float32") as llm:
        assert [r.token_ids for r in llm.generate(prompts(), **OPTIONS)] == alone
    with LLM(folder, dtype="float32", draft=str(draft), draft_tokens=3) as llm:
        drafted = llm.generate(prompts(), **OPTIONS)
    assert [r.token_ids for r in drafted] == alone
    assert sum(r.timings.drafted for r in drafted) > 50


def some(rng: np.random.Generator, *shape: int) -> mx.array:
    return mx.array(rng.standard_normal(shape).astype(np.float32))


def token_by_token(advance: Any, memory: mx.array, inputs: tuple[mx.array, ...]) -> Any:
    answers = []
    for i in range(inputs[0].shape[1]):
        answer, memory = advance(memory, tuple(x[:, i : i + 1] for x in inputs))
        answers.append(answer)
    return mx.concatenate(answers, axis=1), memory


@pytest.mark.parametrize("length", [2, 5, 64, 70, 150])
def test_chunks_of_a_delta_net_are_the_rule_token_by_token(length: int) -> None:
    rng = np.random.default_rng(length)
    keys = some(rng, 2, length, 3, 8)
    keys = keys / mx.linalg.norm(keys, axis=-1, keepdims=True)
    keys[:, 3:] = keys[:, :1]  # the same key again and again, which is hard on the inverse
    inputs = (
        some(rng, 2, length, 3, 8), keys, some(rng, 2, length, 3, 5),
        -0.1 * mx.abs(some(rng, 2, length, 3)), mx.sigmoid(some(rng, 2, length, 3) + 2),
    )  # fmt: skip
    memory = some(rng, 2, 3, 8, 5)
    want = token_by_token(gated_delta.advance, memory, inputs)
    for got, expected in zip(gated_delta.advance(memory, inputs), want):
        assert mx.allclose(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("length", [3, 64, 100])
def test_chunks_of_mamba_are_its_recurrence(length: int) -> None:
    rng = np.random.default_rng(length)
    u, decay = some(rng, 2, length, 3, 5), -0.3 * mx.abs(some(rng, 2, length, 3))
    inputs = u, some(rng, 2, length, 3, 8), some(rng, 2, length, 3, 8), decay
    memory = some(rng, 2, 3, 8, 5)
    state, want = np.array(memory, np.float64), []
    for i in range(length):
        added, b, c, rate = (np.array(x[:, i], np.float64) for x in inputs)
        state = state * np.exp(rate)[..., None, None] + b[..., None] * added[..., None, :]
        want.append(np.einsum("bhn,bhnp->bhp", c, state))
    got, after = mamba2.advance(memory, inputs)
    np.testing.assert_allclose(got, np.stack(want, 1), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(after, state, rtol=1e-4, atol=1e-4)
