"""The network that trains is the one that answers, and the draft guesses it often enough."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np
import numpy.typing as npt
import pytest
from gguf import GGUFReader
from gguf.quants import dequantize

from rl_mlx import LLM
from rl_mlx.demo import demo_path, draft_path
from rl_mlx.demo.network import Shape, Weights, forward
from rl_mlx.demo.train import DRAFT, TARGET

PROMPTS = [
    "What is rl-mlx?",
    "How do I get a real model?",
    "What is the KV cache?",
    "Tell me a joke about a cat",
    "List the months",
    "Tell me a story about a fox",
    "Who painted the ceiling of the chapel?",
    "What is 4 + 4?",
]


def weights(path: Path) -> Weights:
    return {
        tensor.name: mx.array(dequantize(tensor.data, tensor.tensor_type))
        for tensor in GGUFReader(path).tensors
    }


def logits(path: Path, shape: Shape, ids: list[int]) -> npt.NDArray[np.float32]:
    return np.array(forward(weights(path), shape, mx.array([ids])))[0]


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM("demo", backend="mlx", dtype="float32")


def test_the_decoder_computes_what_was_trained(llm: LLM) -> None:
    ids = llm.tokenize(llm.apply_template([{"role": "user", "content": PROMPTS[0]}]))
    ours, theirs = logits(demo_path(), TARGET, ids), llm.logits(ids)
    assert np.linalg.norm(ours - theirs) < 1e-3 * np.linalg.norm(theirs)


def test_the_draft_guesses_most_tokens_of_greedy_answers(llm: LLM) -> None:
    same, all_tokens = 0, 0
    for prompt in PROMPTS:
        messages = [{"role": "user", "content": prompt}]
        ids = llm.tokenize(llm.apply_template(messages))
        answer = list(llm.chat(messages, max_tokens=96, temperature=0).token_ids)
        guesses = logits(draft_path(), DRAFT, ids + answer)[len(ids) - 1 : -1].argmax(-1)
        same += int((guesses == np.array(answer)).sum())
        all_tokens += len(answer)
    assert same / all_tokens > 0.5
