"""Sampling options are checked where they are made, and say what is wrong with them."""

from __future__ import annotations

import math

import pytest

from rl_mlx.errors import InvalidRequest
from rl_mlx.types import SamplingParams, Timings


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": math.nan}, "temperature must be a finite number"),
        ({"temperature": -0.1}, "temperature must be at least 0"),
        ({"temperature": "hot"}, "temperature must be a finite number, not 'hot'"),
        ({"temperature": True}, "temperature must be a finite number"),
        ({"top_p": 1.01}, "top_p must be at least 0 and at most 1"),
        ({"min_p": -1}, "min_p"),
        ({"xtc_threshold": 0.51}, "xtc_threshold must be at least 0 and at most 0.5"),
        ({"repetition_penalty": 0}, "repetition_penalty must be above 0"),
        ({"top_k": -1}, "top_k must be at least 0"),
        ({"top_k": 1.5}, "top_k must be a whole number"),
        ({"max_tokens": -1}, "max_tokens must be at least 0"),
        ({"logprobs": 101}, "logprobs must be at most 100"),
        ({"seed": "x"}, "seed must be a whole number"),
        ({"stop": ["ok", ""]}, "stop must be non-empty strings"),
        ({"stop": [3]}, "stop must be non-empty strings"),
        ({"logit_bias": {1: math.inf}}, "logit_bias"),
        ({"logit_bias": {-1: 1.0}}, "logit_bias token"),
        ({"temp": 1}, "unknown sampling option 'temp'; did you mean temperature?"),
        ({"zzz": 1}, "unknown sampling option 'zzz'; known are dry_allowed_length, "),
    ],
)
def test_a_bad_value_is_one_clear_line(options, message):
    with pytest.raises(InvalidRequest, match=message) as caught:
        SamplingParams.of(**options)
    assert "\n" not in str(caught.value)
    assert caught.value.status == 400
    assert caught.value.exit_code == 2


def test_options_go_over_params():
    params = SamplingParams(temperature=0.2, top_k=5)
    assert SamplingParams.of(params, top_k=7) == SamplingParams(temperature=0.2, top_k=7)
    assert SamplingParams.of(params) == params


def test_one_stop_string_may_stand_alone():
    assert SamplingParams(stop="END").stop == ("END",)


def test_rates_say_nothing_where_nothing_was_measured():
    assert Timings(generated=1, decode=0.0).tokens_per_second == 0
    assert Timings(generated=11, decode=2.0).tokens_per_second == 5
    assert Timings(prompt_tokens=30, reused=10, prefill=0.5).prompt_tokens_per_second == 40
    assert Timings(queued=1.0, prefill=0.5).first_token == 1.5
