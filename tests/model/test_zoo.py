"""A family that is not ours runs through mlx-lm's model on our cache, and gives its logits."""

from __future__ import annotations

import json
import warnings

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from rl_mlx.cache.arena import Arena
from rl_mlx.convert.open import open_weights
from rl_mlx.errors import UnsupportedModel
from rl_mlx.model.load import is_ours
from rl_mlx.model.zoo import load_zoo

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    mlx_lm_models = pytest.importorskip("mlx_lm.models.helium")

CONFIG = {
    "model_type": "helium", "hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 96,
    "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "max_position_embeddings": 512, "head_dim": 16,
    "attention_bias": False, "mlp_bias": False, "tie_word_embeddings": True,
}  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    """A tiny Helium with random weights, and its logits without a cache."""
    mx.random.seed(3)
    model = mlx_lm_models.Model(mlx_lm_models.ModelArgs.from_dict(CONFIG))
    mx.eval(model.parameters())
    mx.save_safetensors(
        str(tmp_path / "model.safetensors"),
        dict(tree_flatten(model.parameters())),
        {"format": "mlx"},
    )
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return tmp_path, model


def test_its_logits_are_those_of_mlx_lm(folder):
    path, theirs = folder
    weights = open_weights(path)
    assert not is_ours(weights.config)
    model = load_zoo(weights, "float32")
    ids = np.random.default_rng(0).integers(0, 96, (2, 21)).tolist()
    want = np.array(theirs(mx.array(ids)))
    arena = Arena(model.cache_specs, mx.float32, 64)
    for row, first in enumerate((9, 14)):  # rows of other lengths, then all of them together
        arena.add_row()
        step = arena.begin(row, row + 1, first)
        model.forward(mx.array([ids[row][:first]]), step)
        arena.advance(row, [first])
    for at in range(5):
        tokens = mx.array([[ids[0][9 + at]], [ids[1][14 + at]]])
        got = np.array(model.head(model.forward(tokens, arena.begin(0, 2, 1))))
        arena.advance(0, [1, 1])
        assert np.abs(got[0, 0] - want[0, 9 + at]).max() < 1e-4
        assert np.abs(got[1, 0] - want[1, 14 + at]).max() < 1e-4


def test_a_family_nobody_knows_says_what_to_do(folder):
    path, _ = folder
    (path / "config.json").write_text(json.dumps({**CONFIG, "model_type": "unheard_of"}))
    with pytest.raises(UnsupportedModel, match="unheard_of") as caught:
        load_zoo(open_weights(path), "float32")
    assert "\n" not in str(caught.value)
    assert "llama.cpp" in str(caught.value)
