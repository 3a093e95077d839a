"""Penalties, bias and DRY, by hand."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rl_mlx.sample.adjust import Change, changes, dry_penalties, needs_tokens
from rl_mlx.sample.filters import apply_changes
from rl_mlx.types import SamplingParams


def test_repetition_counts_prompt_and_answer_within_the_window():
    params = SamplingParams(repetition_penalty=1.5, penalty_window=3)
    assert changes(params, [1, 2, 3], [4]) == {
        2: Change(1.5, 0.0),
        3: Change(1.5, 0.0),
        4: Change(1.5, 0.0),
    }


def test_frequency_and_presence_count_the_answer_alone():
    params = SamplingParams(frequency_penalty=0.5, presence_penalty=0.25)
    assert changes(params, [9, 9], [7, 7, 8]) == {7: Change(1.0, -1.25), 8: Change(1.0, -0.75)}


def test_bias_is_added():
    assert changes(SamplingParams(logit_bias={5: -100.0}), [], []) == {5: Change(1.0, -100.0)}


def test_nothing_asked_for_nothing_changed():
    assert changes(SamplingParams(), [1, 2], [3]) == {}
    assert not needs_tokens(SamplingParams(logit_bias={1: 1.0}))
    assert needs_tokens(SamplingParams(dry_multiplier=0.8))


def test_dry_makes_a_repeat_pay_for_its_length():
    params = SamplingParams(dry_multiplier=0.8, dry_base=2.0, dry_allowed_length=2)
    # "1 2 3" then "1 2": 3 would continue a repeat of length 2.
    assert dry_penalties(params, [1, 2, 3, 1, 2]) == [(3, pytest.approx(0.8))]
    # A repeat of length 3 costs twice that; a single repeated token is allowed.
    assert dry_penalties(params, [5, 1, 2, 3, 5, 1, 2]) == [(3, pytest.approx(1.6))]
    assert dry_penalties(params, [1, 2, 1]) == []


@given(st.lists(st.integers(0, 3), max_size=40))
def test_dry_finds_the_longest_repeat(tokens):
    params = SamplingParams(dry_multiplier=1.0, dry_base=2.0, dry_allowed_length=1)
    longest = {}
    for n in range(1, len(tokens)):
        for i in range(len(tokens) - n):
            if tokens[i : i + n] == tokens[-n:]:
                longest[tokens[i + n]] = n
    assert dict(dry_penalties(params, tokens)) == {t: 2.0 ** (n - 1) for t, n in longest.items()}


def test_changes_apply_to_their_own_row():
    logits = mx.array([[2.0, -2.0, 0.5], [1.0, 1.0, 1.0]])
    rows = [
        {0: Change(2.0, 0.0), 1: Change(2.0, -1.0)},
        {2: Change(1.0, 3.0), 99: Change(1.0, 9.0)},
    ]
    assert np.array(apply_changes(logits, rows)).tolist() == [[1.0, -5.0, 0.5], [1.0, 1.0, 4.0]]
