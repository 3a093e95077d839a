"""Rotary embeddings against their definition, and scalings against their closed forms."""

from __future__ import annotations

import math

import mlx.core as mx
import numpy as np
import pytest

from rl_mlx.errors import UnsupportedModel
from rl_mlx.model.rope import Rope, rope_parameters, rope_plan


def rotated(x, periods, positions, magnitude=1.0):
    """The half-split rotation by its definition; ``x`` is [S, D]."""
    half = len(periods)
    angles = positions[:, None] / np.asarray(periods)[None]
    a, b = x[:, :half], x[:, half : 2 * half]
    turned = [a * np.cos(angles) - b * np.sin(angles), b * np.cos(angles) + a * np.sin(angles)]
    return np.concatenate([magnitude * np.concatenate(turned, 1), x[:, 2 * half :]], 1)


@pytest.mark.parametrize(
    "config",
    [
        {"rope_theta": 10000.0},
        {"rope_theta": 500000.0, "partial_rotary_factor": 0.5},
        {"rope_theta": 10000.0, "rope_scaling": {"type": "linear", "factor": 4.0}},
        {
            "rope_parameters": {
                "rope_theta": 500000.0, "rope_type": "llama3", "factor": 8.0,
                "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                "original_max_position_embeddings": 512,
            }
        },
        {
            "rope_theta": 10000.0, "max_position_embeddings": 4096,
            "rope_scaling": {"type": "yarn", "factor": 4.0,
                             "original_max_position_embeddings": 1024},
        },
    ],
)  # fmt: skip
def test_a_rotation_is_its_definition(config):
    plan = rope_plan(config, 16, 4096)
    base = rope_parameters(config)["rope_theta"]
    periods = plan.periods or [base ** (i / plan.dims) for i in range(0, plan.dims, 2)]
    x = np.random.default_rng(0).normal(size=(5, 16)).astype(np.float32)
    got = np.array(Rope(plan)(mx.array(x)[None, None], 37))[0, 0]
    want = rotated(x, periods, plan.scale * np.arange(37, 42), plan.magnitude)
    assert np.abs(got - want).max() < 2e-5


def test_rows_may_have_offsets_of_their_own():
    rope = Rope(rope_plan({"rope_theta": 10000.0}, 8, 100))
    x = mx.random.normal((2, 3, 4, 8), key=mx.random.key(1))
    together = np.array(rope(x, mx.array([3, 11], mx.int32)))
    for row, offset in enumerate([3, 11]):
        assert np.abs(together[row] - np.array(rope(x[row : row + 1], offset))[0]).max() < 1e-6


def test_llama3_keeps_short_waves_and_stretches_long_ones():
    scaling = {
        "rope_theta": 500000.0, "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
    }  # fmt: skip
    plan = rope_plan({"rope_parameters": scaling}, 128, 8192)
    plain = [500000.0 ** (i / 128) for i in range(0, 128, 2)]
    for period, before in zip(plan.periods, plain):
        wave = 2 * math.pi * before
        if wave < 8192 / 4:
            assert period == pytest.approx(before)
        elif wave > 8192:
            assert period == pytest.approx(8 * before)
        else:
            assert before <= period <= 8 * before


def test_yarn_has_the_magnitude_of_its_paper():
    scaling = {"type": "yarn", "factor": 40.0, "original_max_position_embeddings": 4096}
    config = {"rope_scaling": scaling, "max_position_embeddings": 163840}
    assert rope_plan(config, 64, 4096).magnitude == pytest.approx(0.1 * math.log(40) + 1)


def test_longrope_takes_the_long_factors_for_a_long_context_alone():
    config = {
        "max_position_embeddings": 131072, "original_max_position_embeddings": 4096,
        "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 4, "long_factor": [9.0] * 4},
    }  # fmt: skip
    short, long = rope_plan(config, 8, 4096), rope_plan(config, 8, 8192)
    assert [b / a for a, b in zip(short.periods, long.periods)] == pytest.approx([9.0] * 4)
    assert short.magnitude == pytest.approx(math.sqrt(1 + math.log(32) / math.log(4096)))


def test_settings_by_layer_type_are_found():
    config = {
        "rope_parameters": {
            "full_attention": {"rope_theta": 1e6, "rope_type": "linear", "factor": 8.0},
            "sliding_attention": {"rope_theta": 1e4, "rope_type": "default"},
        }
    }
    assert rope_plan(config, 8, 64, "full_attention").scale == 1 / 8
    assert rope_plan(config, 8, 64, "sliding_attention").base == 1e4


def test_an_unknown_scaling_says_so():
    config = {"rope_scaling": {"type": "spiral", "factor": 2.0}}
    with pytest.raises(UnsupportedModel, match="rope scaling 'spiral'"):
        rope_plan(config, 8, 64)
