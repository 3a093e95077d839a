"""Perplexity, against closed forms, a forward in NumPy, and across backends."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rl_mlx import LLM
from rl_mlx.convert import convert, export
from rl_mlx.errors import EngineError, InvalidRequest
from rl_mlx.lab import Text, perplexity, read_text
from rl_mlx.lab.text import PIECE, Passage, passage
from tests.lab.conftest import VOCAB, NumpyLlama, by_last


@given(
    count=st.integers(2, 60), window=st.integers(2, 60), stride=st.integers(1, 60),
    bos=st.sampled_from([None, 1]),
)  # fmt: skip
@settings(deadline=None, max_examples=50)
def test_every_token_is_predicted_once_from_what_is_before_it(count, window, stride, bos):
    ids = np.arange(100, 100 + count, dtype=np.int32)
    cut = Passage(
        name="t", sha256="", vocabulary="", ids=ids, bytes=count, bos=bos, window=window,
        stride=min(stride, window),
    )  # fmt: skip
    predicted = []
    for number, part in enumerate(cut.windows()):
        assert 0 < len(part.inputs) <= window
        assert (part.inputs[0] == bos) == (bos is not None)
        for i, target in enumerate(part.targets):
            seen = part.first + i + 1
            before = part.inputs[:seen]
            assert before[-1] == target - 1 or (before[-1] == bos and seen == 1)
            assert number == 0 or seen > window - cut.stride
            predicted.append(target)
    assert predicted == list(ids[cut.bos is None :])
    assert len(predicted) == cut.count == sum(cut.pieces())
    assert max(cut.pieces()) <= PIECE


def test_a_model_that_knows_nothing_is_as_perplexed_as_its_vocabulary_is_large(make_table):
    llm = make_table(lambda _: np.zeros(VOCAB))
    found = perplexity(llm, "abcdefghij" * 3, window=8)
    assert found.value == pytest.approx(VOCAB)
    assert found.bits_per_byte == pytest.approx(math.log2(VOCAB))
    assert (found.tokens, found.bytes, found.error) == (30, 30, pytest.approx(0, abs=1e-12))
    assert found.byte_value == pytest.approx(VOCAB)


def test_a_chain_of_letters_has_its_own_likelihood(make_table):
    table = by_last(3)
    llm = make_table(table)
    text = "thequickbrownfoxjumpsoverthelazydog" * 3
    ids = [1, *llm.tokenize(text, add_special=False)]
    losses = []
    for before, token in itertools.pairwise(ids):
        logits = table([before]).astype(np.float32).astype(np.float64)
        losses.append(math.log(np.exp(logits).sum()) - logits[token])
    found = perplexity(llm, Text("fox", text), window=16, stride=5)
    assert found.value == pytest.approx(math.exp(np.mean(losses)), rel=1e-9)
    assert found.error == pytest.approx(
        found.value * np.std(losses, ddof=1) / math.sqrt(len(losses)), rel=1e-9
    )
    assert np.dot(found.losses, found.scored) == pytest.approx(sum(losses))
    assert sum(found.scored) == found.tokens == len(text)


def test_only_the_tokens_that_are_asked_for(make_table):
    llm = make_table(by_last(0))
    assert perplexity(llm, "abc" * 40, window=8, tokens=50).tokens == 50
    calls = llm._llm._backend.calls
    assert max(map(len, calls)) == 8


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"window": 65}, "the context of table, 64"),
        ({"window": 1}, "at least 2 tokens"),
        ({"window": 8, "stride": 9}, "a stride must be between 1 and the window, 8"),
        ({"window": 8, "stride": 0}, "a stride"),
        ({"window": 8, "tokens": 0}, "tokens must be at least 1"),
        ({"window": 31}, "text has 30 tokens here, fewer than a window of 31"),
    ],
)
def test_what_cannot_be_is_refused(make_table, options, says):
    llm = make_table(by_last(0))
    with pytest.raises(InvalidRequest, match=says):
        perplexity(llm, "abcdefghij" * 3, **options)


def test_logits_that_are_no_numbers_are_an_error(make_table):
    llm = make_table(lambda _: np.full(VOCAB, np.nan))
    with pytest.raises(EngineError, match="not finite"):
        perplexity(llm, "abcdefghij", window=8)


def test_texts(tmp_path: Path):
    own = read_text()
    assert 8_000 < len(own.text) < 12_000
    file = tmp_path / "t.txt"
    file.write_bytes("naïve".encode())
    assert read_text(file) == Text("t.txt", "naïve")
    file.write_bytes(b"abc\xff")
    with pytest.raises(InvalidRequest, match=r"is not UTF-8 \(byte 3\)"):
        read_text(file)


@pytest.mark.shared
@pytest.mark.parametrize("backend", ["mlx", "llama.cpp"])
def test_a_real_model_agrees_with_numpy(shared: Path, backend: str):
    path = shared / "models/stories260K.gguf"
    text = Text("wikitext", (shared / "text/wikitext2-raw.test.raw").read_text("utf-8")[:20_000])
    options = {"threads": 1, "threads_batch": 1} if backend == "llama.cpp" else {}
    with LLM(str(path), backend=backend, backend_options=options) as llm:
        found = perplexity(llm, text, window=128, stride=64, tokens=600)
        ids = passage(llm, text, tokens=600).ids
    numpy = NumpyLlama(path)
    losses: list[float] = []
    for start in range(0, len(ids), 64):  # windows of BOS and 127 tokens
        logits = numpy.logits([1, *ids[start : start + 127]])
        logits -= logits.max(-1, keepdims=True)
        logits -= np.log(np.exp(logits).sum(-1, keepdims=True))
        targets = ids[start : start + 128]
        each = -logits[np.arange(len(targets)), targets]
        losses += list(each[len(losses) - start :])
        if len(losses) == len(ids):
            break
    assert found.value == pytest.approx(math.exp(np.mean(losses)), rel=1e-3)


@pytest.mark.shared
def test_backends_agree_on_float16(shared: Path, tmp_path: Path):
    convert(shared / "models/stories260K.gguf", tmp_path / "folder", dtype="float16")
    export(tmp_path / "folder", tmp_path / "f16.gguf", quant="F16")
    text = read_text()
    found = []
    for backend in ("mlx", "llama.cpp"):
        with LLM(str(tmp_path / "f16.gguf"), backend=backend) as llm:
            found.append(perplexity(llm, text, window=128, tokens=400).value)
    assert found[0] == pytest.approx(found[1], rel=0.01)
    assert found[0] != found[1]
