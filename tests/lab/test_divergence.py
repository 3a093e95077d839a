"""KL divergence and agreement: against closed forms, and through a file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from rl_mlx.errors import DestinationExists, FormatError, InvalidRequest
from rl_mlx.lab import Divergence, Reference, divergence, perplexity
from rl_mlx.lab.reference import MAGIC, is_reference
from rl_mlx.lab.text import log_probs
from tests.lab.conftest import VOCAB, by_last, letter_tokenizer

TEXT = "thequickbrownfoxjumpsoverthelazydog" * 3


def close_to(seed: int, much: float):
    base, other = by_last(0), by_last(seed, much)
    return lambda ids: base(ids) + other(ids)


def closed_form(llm, p_table, q_table) -> np.ndarray:
    ids = [1, *llm.tokenize(TEXT, add_special=False)][:-1]
    p, q = (
        log_probs(np.array([table([i]) for i in ids], np.float32)) for table in (p_table, q_table)
    )
    return np.sum(np.exp(p) * (p - q), axis=1)


def test_it_is_kullbacks_and_leiblers(make_table):
    base, other = make_table(by_last(0)), make_table(close_to(1, 0.3))
    found = divergence(other, base, TEXT, window=16)
    want = closed_form(base, by_last(0), close_to(1, 0.3))
    assert found.mean == pytest.approx(want.mean(), rel=1e-9)
    assert found.median == pytest.approx(np.median(want))
    assert found.p99 == pytest.approx(np.quantile(want, 0.99))
    assert found.maximum == pytest.approx(want.max()) == found.quantiles[100]
    assert found.tokens == len(TEXT)
    assert 0.3 < found.top1 < 1
    assert 0.3 < found.top5 < 1
    assert found.probability_rms > 0
    assert found.reference_perplexity == pytest.approx(perplexity(base, TEXT, window=16).value)
    assert found.perplexity == pytest.approx(perplexity(other, TEXT, window=16).value)


def test_agreement_counts_what_is_the_same(make_table):
    base = make_table(lambda _: np.arange(VOCAB, dtype=float))
    swapped = np.arange(VOCAB, dtype=float)
    swapped[[-1, -2]] = swapped[[-2, -1]]
    swapped[[-5, -6]] = swapped[[-6, -5]]
    found = divergence(make_table(lambda _: swapped), base, TEXT, window=16)
    assert (found.top1, found.top5) == (0.0, pytest.approx(0.8))


def test_a_model_does_not_diverge_from_itself(make_table, tmp_path: Path):
    llm = make_table(by_last(0, 4.0))
    alone = divergence(llm, llm, TEXT, window=16)
    assert (alone.mean, alone.maximum, alone.top1, alone.top5) == (0, 0, 1, 1)
    assert alone.probability_rms == 0
    perplexity(llm, TEXT, window=16, save_logits=tmp_path / "ref")
    filed = divergence(llm, tmp_path / "ref")
    assert filed.maximum < 1e-7
    assert (filed.top1, filed.top5) == (1, 1)
    assert filed.reference_perplexity == pytest.approx(filed.perplexity, rel=1e-4)


def test_a_file_serves_as_the_model_does(make_table, tmp_path: Path):
    base, other = make_table(by_last(0), name="base"), make_table(close_to(1, 0.3))
    perplexity(base, TEXT, window=16, stride=7, save_logits=tmp_path / "ref")
    live = divergence(other, base, TEXT, window=16, stride=7)
    filed = divergence(other, Reference.open(tmp_path / "ref"))
    assert filed.mean == pytest.approx(live.mean, rel=1e-4)
    assert filed.reference == live.reference == "base"
    assert filed.tokens == live.tokens
    rows = len(TEXT) * (8 + 2 * VOCAB)
    assert rows < (tmp_path / "ref").stat().st_size < rows + 4 * len(TEXT) + 1000


def test_another_text_or_vocabulary_is_refused(make_table, tmp_path: Path):
    llm = make_table(by_last(0))
    path = tmp_path / "ref"
    perplexity(llm, TEXT, window=16, save_logits=path)
    assert divergence(llm, path, TEXT).tokens == len(TEXT)
    with pytest.raises(InvalidRequest, match="is of another text"):
        divergence(llm, path, TEXT + "a")
    with pytest.raises(InvalidRequest, match="leave window, stride and tokens out"):
        divergence(llm, path, window=8)
    other = letter_tokenizer(tmp_path / "other.gguf", "z")
    with pytest.raises(InvalidRequest, match="have different vocabularies"):
        divergence(make_table(by_last(0), other), path)
    with pytest.raises(InvalidRequest, match="have different vocabularies"):
        divergence(make_table(lambda _: np.zeros(VOCAB + 1), vocab=VOCAB + 1), llm, TEXT, window=8)
    with pytest.raises(InvalidRequest, match="a context of 8; make the reference"):
        divergence(make_table(by_last(0), context=8), path)


def test_files_are_whole_or_not_there(make_table, tmp_path: Path):
    path = tmp_path / "ref"
    perplexity(make_table(by_last(0)), TEXT, window=16, save_logits=path)
    data = path.read_bytes()
    assert is_reference(path)
    with pytest.raises(DestinationExists, match="exists"):
        perplexity(make_table(by_last(0)), TEXT, window=16, save_logits=path)
    perplexity(make_table(by_last(0)), TEXT, window=16, save_logits=path, force=True)
    assert path.read_bytes() == data
    failing = make_table(lambda ids: np.full(VOCAB, np.nan if ids[-1] == 9 else 0.0))
    with pytest.raises(Exception, match="not finite"):
        perplexity(failing, TEXT, window=16, save_logits=path, force=True)
    assert path.read_bytes() == data
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "damage",
    [
        lambda d: d[:-1], lambda d: d[:40], lambda d: d[:9], lambda d: d + b"x",
        lambda d: MAGIC + b"\xff\xff\xff\x7f" + d[12:], lambda d: MAGIC + b"\2\0\0\0[]" + d,
        lambda d: b"GGUF" + d, lambda d: d.replace(b'"rows": 105', b'"rows": 104'),
        lambda d: d.replace(b'"vocab": 29', b'"vocab":-29'),
        lambda d: d.replace(b'"stride": 8', b'"stride": 0'),
    ],
)  # fmt: skip
def test_damaged_files_are_one_error(make_table, tmp_path: Path, damage):
    path = tmp_path / "ref"
    perplexity(make_table(by_last(0)), TEXT, window=16, save_logits=path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(FormatError):
        Reference.open(path)


def test_results_are_plain_values(make_table):
    llm = make_table(by_last(0))
    assert isinstance(divergence(llm, llm, TEXT, window=16), Divergence)
