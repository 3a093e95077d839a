"""Configs in both dialects, against the config classes of transformers 5."""

from __future__ import annotations

import importlib
import json
from copy import deepcopy
from pathlib import Path

import pytest

from rl_mlx.convert.hfconfig import bilingual, layer_types
from rl_mlx.convert.open import open_weights

SLIDING, FULL = "sliding_attention", "full_attention"
LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN = {"factor": 4.0, "original_max_position_embeddings": 32768}
LONG = {"long_factor": [1.5] * 8, "short_factor": [1.0] * 8}


def transformers_config(config):
    """The config as a class of transformers reads it; without torch its models are not there."""
    auto = importlib.import_module("transformers").AutoConfig
    known = {key: value for key, value in deepcopy(config).items() if key != "model_type"}
    return auto.for_model(config["model_type"], **known)


VERSION_4 = {
    "plain": {"rope_theta": 5e5},
    "llama3": {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **LLAMA3}},
    "linear": {"rope_theta": 1e4, "rope_scaling": {"type": "linear", "factor": 2.0}},
    "yarn": {"rope_theta": 1e6, "rope_scaling": {"type": "yarn", **YARN}},
}


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("name", VERSION_4)
def test_version_4_in_the_words_of_5(hf_config, family, name):
    old = hf_config(model_type=family, rope_theta=None) | VERSION_4[name]
    both = bilingual(old)
    expected = transformers_config(old).rope_parameters
    expected.pop("type", None)  # it keeps the old word beside the new one
    assert both["rope_parameters"] == expected
    assert both["rope_theta"] == old["rope_theta"]
    if "rope_scaling" in old:
        assert both["rope_scaling"]["type"] == both["rope_scaling"]["rope_type"]
        assert both["rope_scaling"].items() >= old["rope_scaling"].items()


@pytest.mark.parametrize("name", VERSION_4)
def test_version_5_in_the_words_of_4(hf_config, name):
    old = hf_config(rope_theta=None) | VERSION_4[name]
    new = json.loads(transformers_config(old).to_json_string())
    assert "rope_scaling" not in new
    new["rope_parameters"].pop("type", None)
    both, expected = bilingual(new), bilingual(old)
    for key in ("rope_theta", "rope_scaling", "rope_parameters"):
        assert both.get(key) == expected.get(key)


def test_twice_is_once(hf_config):
    for change in VERSION_4.values():
        both = bilingual(hf_config() | change)
        assert bilingual(both) == both


@pytest.mark.parametrize("word", ["longrope", "su", "yarn"])
def test_phi_3(hf_config, mlx_model, word):
    old = hf_config(
        model_type="phi3",
        original_max_position_embeddings=64,
        rope_scaling={"type": word, **LONG},
        tie_word_embeddings=False,
        pad_token_id=0,
    )
    both = bilingual(old)
    assert both["rope_scaling"]["type"] == both["rope_parameters"]["rope_type"] == "longrope"
    assert both["rope_parameters"]["original_max_position_embeddings"] == 64
    new = bilingual(json.loads(transformers_config(both).to_json_string()))
    assert new["rope_parameters"].items() >= both["rope_parameters"].items()
    assert new["original_max_position_embeddings"] == 64
    assert mlx_model(new).args.rope_scaling["long_factor"] == LONG["long_factor"]
    plain = hf_config(model_type="phi3", tie_word_embeddings=False, pad_token_id=0)
    again = bilingual(json.loads(transformers_config(plain).to_json_string()))
    assert mlx_model(again).args.rope_scaling is None


def test_gemma_3(hf_config):
    old = hf_config(
        model_type="gemma3_text",
        num_hidden_layers=7,
        rope_theta=1e6,
        rope_local_base_freq=1e4,
        rope_scaling={"rope_type": "linear", "factor": 8.0},
        sliding_window_pattern=6,
    )
    both = bilingual(old)
    expected = transformers_config(old)
    assert both["rope_parameters"] == expected.rope_parameters
    assert both["layer_types"] == expected.layer_types == [SLIDING] * 5 + [FULL, SLIDING]
    new = json.loads(expected.to_json_string())
    new.pop("sliding_window_pattern", None)
    again = bilingual(new)
    assert (again["rope_theta"], again["rope_local_base_freq"]) == (1e6, 1e4)
    assert again["rope_scaling"]["factor"] == 8.0
    assert again["sliding_window_pattern"] == 6


def test_gemma_3_of_an_odd_pattern_has_no_period():
    config = {"model_type": "gemma3_text", "num_hidden_layers": 3}
    both = bilingual(config | {"layer_types": [SLIDING, FULL, FULL]})
    assert "sliding_window_pattern" not in both


@pytest.mark.parametrize("family", ["gemma2", "gpt_oss"])
def test_layers_that_a_config_leaves_to_its_class(hf_config, family):
    config = hf_config(model_type=family, num_hidden_layers=5, num_local_experts=2)
    assert bilingual(config)["layer_types"] == transformers_config(config).layer_types


def test_defaults_are_those_of_transformers(hf_config):
    expected = transformers_config(hf_config(model_type="gemma2"))
    both = bilingual(hf_config(model_type="gemma2", tie_word_embeddings=None))
    for key in ("query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping"):
        assert both[key] == getattr(expected, key)
    assert both["tie_word_embeddings"] is expected.tie_word_embeddings
    silent = hf_config(
        model_type="qwen3_moe",
        num_experts=None,
        num_local_experts=4,
        norm_topk_prob=None,
        decoder_sparse_step=None,
    )
    expected, both = transformers_config(silent), bilingual(silent)
    assert both["norm_topk_prob"] is expected.norm_topk_prob
    assert both["decoder_sparse_step"] == expected.decoder_sparse_step
    assert both["num_experts"] == 4


def test_lfm2_layers_are_named_and_numbered():
    config = {"model_type": "lfm2", "num_hidden_layers": 4, "hidden_size": 64, "block_ff_dim": 96}
    both = bilingual(config | {"full_attn_idxs": [1, 3]})
    assert both["layer_types"] == ["conv", FULL, "conv", FULL]
    assert bilingual(config | {"layer_types": both["layer_types"]})["full_attn_idxs"] == [1, 3]
    assert both["intermediate_size"] == 96
    assert both["block_dim"] == 64


def test_sizes_of_qwen2_vl_keep_their_sections():
    parameters = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
    both = bilingual({"model_type": "qwen2_vl", "rope_parameters": parameters})
    assert both["rope_scaling"]["mrope_section"] == [16, 24, 24]


def test_nothing_is_taken_away_or_changed_in_place(hf_config):
    config = hf_config(torch_dtype="bfloat16", rope_scaling={"rope_type": "llama3", **LLAMA3})
    before = json.dumps(config)
    both = bilingual(config)
    assert json.dumps(config) == before
    assert set(config) <= set(both)
    assert both["torch_dtype"] == "bfloat16"


def test_layer_types():
    assert layer_types(4, 2) == [SLIDING, FULL, SLIDING, FULL]
    assert layer_types(2, 1) == [FULL, FULL]


PARITY = "gemma2 gemma3_text gpt_oss lfm2 llama llama3-rope mixtral qwen2 qwen3 qwen3_moe"


@pytest.mark.shared
@pytest.mark.parametrize("name", PARITY.split())
def test_configs_out_of_gguf_are_read_by_transformers(shared: Path, name):
    config = open_weights(shared / "parity" / f"{name}.gguf").config
    read = transformers_config(config)
    assert read.rope_parameters.items() >= config["rope_parameters"].items()
    for key in ("hidden_size", "num_hidden_layers", "num_key_value_heads", "vocab_size"):
        assert getattr(read, key) == config[key]
    for key in ("layer_types", "sliding_window", "head_dim", "num_experts_per_tok"):
        if hasattr(read, key) and key in config:
            assert getattr(read, key) == config[key]
