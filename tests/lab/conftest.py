"""Models for the lab: small ones of random weights, and an independent forward in NumPy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import gguf
import numpy as np
import pytest

from rl_mlx.backends.fake import INFO, FakeBackend
from rl_mlx.llm import LLM
from rl_mlx.text.tokenizer import Tokenizer

VOCAB = 3 + 26


@pytest.fixture(autouse=True)
def _drawn_without_a_screen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MPLBACKEND", "agg")


@pytest.fixture(scope="session")
def letters(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A vocabulary of small letters, with a BOS."""
    return letter_tokenizer(tmp_path_factory.mktemp("letters") / "letters.gguf", "a")


def letter_tokenizer(path: Path, first: str) -> Tokenizer:
    """Letters in alphabetical order, but ``first`` before all others."""
    alphabet = sorted("abcdefghijklmnopqrstuvwxyz", key=lambda c: (c != first, c))
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_tokenizer_model("llama")
    writer.add_token_list(["<unk>", "<s>", "</s>", *alphabet])
    writer.add_token_scores([0.0] * VOCAB)
    writer.add_token_types([2, 3, 3] + [1] * 26)
    writer.add_bos_token_id(1)
    writer.add_add_bos_token(True)
    writer.add_add_space_prefix(False)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return Tokenizer.open(path)


class TableBackend(FakeBackend):
    """Logits of position ``i`` are ``table(ids[: i + 1])``; every call is kept."""

    def __init__(self, table: Callable[[Sequence[int]], np.ndarray], **info: object) -> None:
        about = {**INFO.__dict__, "vocab": VOCAB, "context": 64, "name": "table", **info}
        super().__init__(lambda _: [], INFO.__class__(**about))
        self.calls: list[list[int]] = []
        self._table = table

    def logits(self, ids: Sequence[int]) -> np.ndarray:
        self.calls.append(list(ids))
        rows = [self._table(ids[: i + 1]) for i in range(len(ids))]
        return np.array(rows, np.float32)


def by_last(seed: int, spread: float = 1.0) -> Callable[[Sequence[int]], np.ndarray]:
    """Random logits that depend on the last token alone."""
    table = np.random.default_rng(seed).normal(0, spread, (VOCAB, VOCAB))
    return lambda ids: table[ids[-1]]


@pytest.fixture
def make_table(letters: Tokenizer):
    """``make_table(table, **info)``: an LLM whose logits are those."""
    made: list[LLM] = []

    def make(table, tokenizer=letters, **info) -> LLM:
        made.append(LLM.of(TableBackend(table, **info), tokenizer))
        return made[-1]

    yield make
    for llm in made:
        llm.close()


class NumpyLlama:
    """Logits of a Llama in a GGUF file of floats, in float64, by gguf-py and NumPy alone."""

    def __init__(self, path: Path) -> None:
        reader = gguf.GGUFReader(path)
        self.weights = {
            t.name: gguf.dequantize(t.data, t.tensor_type).astype(np.float64).reshape(t.shape[::-1])
            for t in reader.tensors
        }
        about = {k: f.contents() for k, f in reader.fields.items() if k.startswith("llama.")}
        self.layers = about["llama.block_count"]
        self.heads = about["llama.attention.head_count"]
        self.kv_heads = about["llama.attention.head_count_kv"]
        self.eps = about["llama.attention.layer_norm_rms_epsilon"]
        self.base = about.get("llama.rope.freq_base", 10000.0)
        self.dim = about["llama.embedding_length"] // self.heads

    def logits(self, ids: Sequence[int]) -> np.ndarray:
        """``[len(ids), vocab]``."""
        w = self.weights
        x = w["token_embd.weight"][list(ids)]
        for i in range(self.layers):
            at = f"blk.{i}."
            x = x + self._attention(self._norm(x, w[f"{at}attn_norm.weight"]), at)
            h = self._norm(x, w[f"{at}ffn_norm.weight"])
            gate, up = h @ w[f"{at}ffn_gate.weight"].T, h @ w[f"{at}ffn_up.weight"].T
            x = x + (gate / (1 + np.exp(-gate)) * up) @ w[f"{at}ffn_down.weight"].T
        return self._norm(x, w["output_norm.weight"]) @ w["output.weight"].T

    def _norm(self, x: np.ndarray, weight: np.ndarray) -> np.ndarray:
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + self.eps) * weight

    def _attention(self, x: np.ndarray, at: str) -> np.ndarray:
        n, dim = len(x), self.dim
        q, k, v = (
            (x @ self.weights[f"{at}attn_{part}.weight"].T).reshape(n, -1, dim) for part in "qkv"
        )
        q, k = self._rotated(q), self._rotated(k)
        shared = self.heads // self.kv_heads
        k, v = np.repeat(k, shared, axis=1), np.repeat(v, shared, axis=1)
        scores = np.einsum("ihd,jhd->hij", q, k) / np.sqrt(dim)
        scores = np.where(np.tril(np.ones((n, n), bool)), scores, -np.inf)
        scores = np.exp(scores - scores.max(-1, keepdims=True))
        scores /= scores.sum(-1, keepdims=True)
        mixed = np.einsum("hij,jhd->ihd", scores, v).reshape(n, -1)
        return mixed @ self.weights[f"{at}attn_output.weight"].T

    def _rotated(self, x: np.ndarray) -> np.ndarray:
        """Neighbours are pairs, as in the original Llama."""
        angles = np.arange(len(x))[:, None] / self.base ** (np.arange(0, self.dim, 2) / self.dim)
        cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
        even, odd = x[..., 0::2], x[..., 1::2]
        pairs = np.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1)
        return pairs.reshape(x.shape)
