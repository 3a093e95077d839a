"""The sampler on the host against its definition, written out plainly in float64."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rl_mlx.sample.host import choose
from rl_mlx.sample.seeds import XTC, uniform
from rl_mlx.types import SamplingParams

VOCAB = 700  # more than what is sorted at first


def logits_of(seed: int, spread: float) -> npt.NDArray[np.float32]:
    return np.random.default_rng(seed).normal(0, spread, VOCAB).astype(np.float32)


def plainly(logits: npt.NDArray[np.float32], params: SamplingParams, seed: int) -> int:
    """The filters one after the other, each over a dictionary of what is left."""
    scaled = {i: float(x) / params.temperature for i, x in enumerate(logits)}
    if params.top_k:
        lowest = sorted(scaled.values())[-min(params.top_k, VOCAB)]
        scaled = {i: x for i, x in scaled.items() if x >= lowest}
    top = max(scaled.values())
    weights = {i: math.exp(x - top) for i, x in scaled.items()}
    if params.top_p < 1:
        total, kept, before = sum(weights.values()), {}, 0.0
        for i, w in sorted(weights.items(), key=lambda item: -item[1]):
            if kept and before >= params.top_p * total:
                break
            kept[i] = w
            before += w
        weights = dict(sorted(kept.items()))
    weights = {i: w for i, w in weights.items() if w >= params.min_p}
    if params.xtc_probability and uniform(seed, 0, XTC) < params.xtc_probability:
        total = sum(weights.values())
        above = {i: w for i, w in weights.items() if w >= params.xtc_threshold * total}
        least = min(above.values(), default=math.inf)
        weights = {i: w for i, w in weights.items() if i not in above or w <= least}
    target = uniform(seed, 0) * sum(weights.values())
    for i, w in weights.items():
        target -= w
        if target < 0:
            return i
    return max(weights)


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    spread=st.sampled_from([0.1, 1.0, 4.0]),
    temperature=st.floats(0.2, 3.0),
    top_k=st.sampled_from([0, 1, 5, 600, 10_000]),
    top_p=st.sampled_from([1.0, 0.99, 0.5, 0.0]),
    min_p=st.sampled_from([0.0, 0.05, 0.5, 1.0]),
    xtc=st.sampled_from([0.0, 0.5, 1.0]),
)
def test_every_filter_does_what_its_definition_says(
    seed: int, spread: float, temperature: float, top_k: int, top_p: float, min_p: float, xtc: float
) -> None:
    params = SamplingParams(
        temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, xtc_probability=xtc,
        xtc_threshold=0.02,
    )  # fmt: skip
    logits = logits_of(seed, spread)
    before = logits.copy()
    token, logprob = choose(logits, params, seed, [1], [])
    assert token == plainly(logits, params, seed)
    assert logprob is None
    np.testing.assert_array_equal(logits, before)


def test_drawn_tokens_follow_the_distribution() -> None:
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32))
    params = SamplingParams(temperature=1.0, min_p=0.0)
    drawn = [choose(logits, params, seed, [], [])[0] for seed in range(4000)]
    shares = np.bincount(drawn, minlength=4) / 4000
    np.testing.assert_allclose(shares, [0.5, 0.3, 0.15, 0.05], atol=0.03)


def test_greedy_takes_the_first_of_the_best_after_bias_and_penalties() -> None:
    logits = np.array([1.0, 3.0, 3.0, 2.0], np.float32)
    greedy = SamplingParams(temperature=0)
    assert choose(logits, greedy, 0, [], [])[0] == 1
    biased = SamplingParams(temperature=0, logit_bias={3: 5.0, 99: 100.0})
    assert choose(logits, biased, 0, [], [])[0] == 3
    penalized = SamplingParams(temperature=0, repetition_penalty=2.0)
    assert choose(logits, penalized, 0, [1], [2])[0] == 3


@pytest.mark.parametrize("count", [0, 2, 100])
def test_logprobs_are_before_the_filters(count: int) -> None:
    logits = np.array([1.0, 2.0, 3.0], np.float32)
    params = SamplingParams(temperature=5.0, top_k=1, logprobs=count)
    token, logprob = choose(logits, params, 0, [], [])
    assert logprob is not None
    expected = logits - math.log(np.exp(logits.astype(np.float64)).sum())
    assert math.isclose(logprob.logprob, float(expected[token]), abs_tol=1e-5)
    assert [t for t, _ in logprob.top] == [2, 1, 0][:count]
    np.testing.assert_allclose(
        [p for _, p in logprob.top], sorted(expected)[::-1][:count], atol=1e-5
    )
