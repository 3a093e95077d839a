"""The filters against plain NumPy ones, and draws against the distribution they should have."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rl_mlx.sample.filters import filtered, pick
from rl_mlx.sample.sampler import Row, Sampler
from rl_mlx.sample.seeds import uniform
from rl_mlx.types import SamplingParams

NEUTRAL = {"temperature": 1.0, "min_p": 0.0}


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def reference(logits, p, xtc=False):
    """The kept tokens' probabilities, written as one would explain it."""
    probs = softmax(logits.astype(np.float64) / p.temperature)
    order = np.argsort(-probs, kind="stable")
    keep = np.ones(len(probs), bool)
    if 0 < p.top_k < len(probs):
        keep[order[p.top_k :]] = False
    if p.top_p < 1:
        total, seen = probs[keep].sum(), 0.0
        for token in order:
            if not keep[token]:
                continue
            if seen >= p.top_p and seen > 0:
                keep[token] = False
            seen += probs[token] / total
    keep &= probs >= p.min_p * probs[keep].max() * (1 - 1e-9)
    if xtc:
        now = np.where(keep, probs, 0) / probs[keep].sum()
        above = [t for t in order if now[t] >= p.xtc_threshold]
        keep[above[:-1]] = False
    return np.where(keep, probs, 0) / probs[keep].sum()


def kept(logits, params, xtc):
    return np.array(mx.softmax(filtered(mx.array(logits), params, xtc), axis=-1))


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**32 - 1),
    rows=st.lists(
        st.fixed_dictionaries(
            {
                "temperature": st.floats(0.3, 3),
                "top_k": st.integers(0, 40),
                "top_p": st.floats(0.05, 1),
                "min_p": st.floats(0, 0.5),
                "xtc_threshold": st.floats(0.01, 0.4),
            }
        ),
        min_size=1,
        max_size=4,
    ),
    coins=st.lists(st.booleans(), min_size=4, max_size=4),
)
def test_every_combination_is_the_plain_one(seed, rows, coins):
    params = [SamplingParams(**r) for r in rows]
    logits = np.random.default_rng(seed).normal(0, 2, (len(rows), 30)).astype(np.float32)
    got = kept(logits, params, coins[: len(rows)])
    for row, (p, coin) in enumerate(zip(params, coins)):
        want = reference(logits[row], p, coin)
        # A token exactly on a border may fall either way in float32.
        assert np.abs(got[row] - want).max() < 2e-5 or _on_a_border(want, got[row])


def _on_a_border(want, got):
    return ((want > 0) != (got > 0)).sum() <= 1


def test_neutral_rows_keep_every_bit():
    logits = mx.random.normal((2, 50), key=mx.random.key(0))
    strict = SamplingParams(temperature=1.0, top_k=3, top_p=0.5, min_p=0.1)
    out = filtered(logits, [SamplingParams(**NEUTRAL), strict], [False, False])
    assert np.array_equal(np.array(out)[0], np.array(logits)[0])
    assert np.isinf(np.array(out)[1]).sum() >= 47


def test_draws_have_the_target_distribution():
    # Chi-square over 20,000 draws of 8 tokens; 24.3 is the 0.999 quantile at 7 degrees of freedom.
    logits = np.array([[2.0, 1.5, 1.0, 0.5, 0.0, -0.5, -1.0, -1.5]], np.float32)
    count = 20_000
    ids = pick(
        mx.array(np.repeat(logits, count, 0)), [uniform(7, position) for position in range(count)]
    )
    observed = np.bincount(np.array(ids), minlength=8)
    expected = softmax(logits[0]) * count
    assert ((observed - expected) ** 2 / expected).sum() < 24.3


def test_a_dropped_token_is_never_drawn():
    logits = mx.array([[0.0, -np.inf, 0.0, -np.inf]] * 3)
    assert np.array(pick(logits, [0.0, 0.49, 1 - 2**-24])).tolist() == [0, 0, 2]


def test_uniform_numbers_look_uniform_and_differ_by_seed():
    numbers = np.array([uniform(3, i) for i in range(10_000)])
    assert numbers.min() >= 0
    assert numbers.max() < 1
    assert abs(numbers.mean() - 0.5) < 0.01
    assert abs(np.corrcoef(numbers[:-1], numbers[1:])[0, 1]) < 0.03
    assert uniform(3, 5) != uniform(4, 5)
    assert np.float32(max(numbers)) < 1


def _sample(params, logits, position=0, prompt=(), answer=()):
    sampler = Sampler([params])
    row = Row(params, 11, prompt, answer, position)
    return sampler.sample(mx.array([logits], mx.float32), [row]).read([params])[0]


def test_greedy_ignores_the_filters_and_the_seed():
    params = SamplingParams(temperature=0, top_k=1, top_p=0.1, min_p=0.9)
    assert _sample(params, [0.0, 3.0, 2.0])[0] == 1


def test_top_k_beyond_the_vocabulary_keeps_everything():
    params = SamplingParams(temperature=1.0, top_k=1000, min_p=0.0)
    tokens = {_sample(params, [0.0, 0.1, 0.2], position=i)[0] for i in range(60)}
    assert tokens == {0, 1, 2}


def test_logprobs_are_those_of_the_raw_logits():
    params = SamplingParams(temperature=0, logprobs=2, logit_bias={0: 100.0})
    logits = [1.0, 3.0, 2.0]
    token, logprob = _sample(params, logits)
    want = np.log(softmax(np.array(logits)))
    assert token == 0
    assert logprob.logprob == pytest.approx(want[0], abs=1e-6)
    assert [t for t, _ in logprob.top] == [1, 2]
    assert logprob.top[0][1] == pytest.approx(want[1], abs=1e-6)


def test_a_batch_samples_each_row_as_alone():
    rows = [
        SamplingParams(temperature=0),
        SamplingParams(temperature=0.8, top_k=5),
        SamplingParams(temperature=1.3, top_p=0.7, repetition_penalty=1.3, frequency_penalty=0.4),
        SamplingParams(temperature=1.0, xtc_probability=1.0, xtc_threshold=0.05),
    ]
    logits = mx.random.normal((4, 64), key=mx.random.key(5)) * 3
    history = [Row(p, 100 + i, [1, 2, 3, 3], [3, 4, 4], 3) for i, p in enumerate(rows)]
    together = np.array(Sampler(rows).sample(logits, history).tokens).tolist()
    alone = [
        np.array(Sampler([p]).sample(logits[i : i + 1], [history[i]]).tokens).tolist()[0]
        for i, p in enumerate(rows)
    ]
    assert together == alone
