"""Configs as GGUF metadata: what is written is read back as it was."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from rl_mlx.convert import export
from rl_mlx.convert.folder import FolderWeights
from rl_mlx.convert.gguf.fields import fields, rope_tensors
from rl_mlx.convert.gguf.weights import GGUFWeights
from rl_mlx.convert.layout import layout
from rl_mlx.errors import UnsupportedModel

FACTORS = [1.0 + i / 8 for i in range(8)]
CASES = {
    "linear": {"rope_scaling": {"type": "linear", "factor": 4.0}},
    "yarn": {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "beta_fast": 16.0,
                              "original_max_position_embeddings": 128}},
    "llama3": {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
                                "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}},
    "longrope": {"model_type": "phi3", "original_max_position_embeddings": 128,
                 "sliding_window": 64,
                 "rope_scaling": {"type": "longrope", "long_factor": FACTORS,
                                  "short_factor": FACTORS[::-1]}},
    "phi3": {"model_type": "phi3"},
    "head_dim": {"head_dim": 32},
    "ministral3": {"model_type": "ministral3", "rope_theta": None,
                   "rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6, "factor": 16.0,
                                       "original_max_position_embeddings": 64,
                                       "llama_4_scaling_beta": 0.1}},
    "gemma2": {"model_type": "gemma2", "head_dim": 16, "query_pre_attn_scalar": 16,
               "sliding_window": 32, "attn_logit_softcapping": 20.0,
               "final_logit_softcapping": 10.0},
}  # fmt: skip
# Said otherwise in GGUF, or not at all.
UNSAID = {"architectures", "mlp_bias", "attention_bias", "hidden_act", "hidden_activation"}


@pytest.mark.parametrize("name", CASES)
def test_what_is_written_is_read_back(name, hf_config, make_folder, tmp_path):
    config = hf_config(**CASES[name])
    rng = np.random.default_rng(0)
    arrays = {  # numbers that stay as they are where Gemma's norms have 1 added
        tensor: mx.array(rng.integers(-64, 64, shape) / np.float32(64))
        for tensor, shape in layout(config, 1000).items()
    }
    folder = make_folder(config, {"model.safetensors": arrays})
    export(folder, tmp_path / "out.gguf")
    before, after = FolderWeights(folder), GGUFWeights(tmp_path / "out.gguf")
    assert set(before.names()) == set(after.names())
    for key in before.config.keys() - UNSAID:
        if key in after.config and before.config[key] is not None:
            found, wanted = after.config[key], before.config[key]
            if isinstance(wanted, dict):
                for inner in wanted.keys() & found.keys():
                    assert found[inner] == pytest.approx(wanted[inner]), (key, inner)
            else:
                assert found == pytest.approx(wanted), key
    for tensor in before.names():  # Q and K were there and back
        np.testing.assert_array_equal(
            after.load(tensor).array, before.load(tensor).array, err_msg=tensor
        )


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model_type": "helium"}, "known are llama"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "dynamic"),
        ({"model_type": "gemma2", "query_pre_attn_scalar": 100}, "query_pre_attn_scalar"),
        ({"model_type": "qwen3_moe", "norm_topk_prob": False}, "norm_topk_prob"),
        ({"model_type": "smollm3", "no_rope_layers": [0, 1]}, "every 4th layer"),
        ({"model_type": "cohere", "use_qk_norm": True, "logit_scale": 1.0}, "from 64 layers"),
        (
            {
                "model_type": "exaone4",
                "sliding_window": 8,
                "layer_types": ["sliding_attention", "full_attention"],
            },
            "of 64 layers",
        ),
    ],
)
def test_what_gguf_cannot_say_is_refused(changes, reason, hf_config):
    with pytest.raises(UnsupportedModel, match=reason):
        fields(hf_config(**changes))


def test_plain_rope_has_no_tensor(hf_config):
    assert rope_tensors(hf_config()) == {}
