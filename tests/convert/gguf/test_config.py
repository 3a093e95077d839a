"""Metadata to config: what each key means, against the configs that the models had."""

from __future__ import annotations

import math

import pytest

from rl_mlx.convert.gguf.config import gguf_config
from rl_mlx.convert.gguf.reader import GGUFFile
from rl_mlx.convert.gguf.rope import rope_parameters
from rl_mlx.errors import FormatError, RlMlxError, UnsupportedModel


@pytest.fixture
def config(make_gguf):
    """The config of a tiny GGUF with the given keys."""

    def make(arch="llama", tensors=None, **keys):
        named = {key.replace("__", "."): value for key, value in keys.items()}
        return gguf_config(GGUFFile.open(make_gguf(arch, tensors, named)))

    return make


def test_floats_are_as_short_as_they_were(config):
    found = config(rope__freq_base=1e6, attention__layer_norm_rms_epsilon=1e-5)
    assert found["rms_norm_eps"] == 1e-5
    assert found["rope_theta"] == found["rope_parameters"]["rope_theta"] == 1e6


def test_a_plain_llama(config):
    found = config()
    assert found["model_type"] == "llama"
    assert found["architectures"] == ["LlamaForCausalLM"]
    assert found["vocab_size"] == 40
    assert found["head_dim"] == 16
    assert found["num_key_value_heads"] == 2
    assert found["max_position_embeddings"] == 512
    assert found["tie_word_embeddings"] is True
    assert found["rope_parameters"] == {"rope_type": "default", "rope_theta": 10000.0}
    assert found["attention_bias"] is found["mlp_bias"] is False


def test_defaults_that_files_leave_out(config):
    found = config(attention__head_count_kv=None)
    assert found["num_key_value_heads"] == found["num_attention_heads"] == 4


@pytest.mark.parametrize("key", ["rope__scaling__factor", "rope__scale_linear"])
def test_linear_scaling(config, key):
    found = config(**{key: 4.0})
    assert found["rope_parameters"] == {
        "rope_type": "linear",
        "rope_theta": 10000.0,
        "factor": 4.0,
    }
    assert found["rope_scaling"] == {"rope_type": "linear", "type": "linear", "factor": 4.0}


@pytest.mark.parametrize(
    "keys", [{"factor": 1.0}, {"factor": 0.0}, {"type": "none", "factor": 8.0}]
)
def test_scaling_that_is_none(config, keys):
    found = config(**{f"rope__scaling__{key}": value for key, value in keys.items()})
    assert found["rope_parameters"]["rope_type"] == "default"
    assert found["rope_scaling"] is None


def test_yarn(config):
    found = config(
        rope__scaling__type="yarn",
        rope__scaling__factor=4.0,
        rope__scaling__original_context_length=128,
        rope__scaling__yarn_beta_fast=16.0,
    )
    assert found["rope_parameters"] == {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 128,
        "beta_fast": 16.0,
        "beta_slow": 1.0,
    }
    assert found["rope_scaling"]["type"] == "yarn"


def test_yarn_magnitudes(config):
    yarn = {"rope__scaling__type": "yarn", "rope__scaling__factor": 4.0}
    found = config(**yarn, rope__scaling__yarn_attn_factor=1.5)
    assert found["rope_parameters"]["attention_factor"] == 1.5
    assert found["rope_parameters"]["original_max_position_embeddings"] == 512  # the context
    found = config(**yarn, rope__scaling__attn_factor=1.5)  # times YaRN's own, by llama.cpp
    assert found["rope_parameters"]["attention_factor"] == 1.5 * (0.1 * math.log(4) + 1)
    found = config(**yarn, rope__scaling__yarn_log_multiplier=1.0)["rope_parameters"]
    assert (found["mscale"], found["mscale_all_dim"]) == (1.0, 1.0)


def test_mistral_3(config):
    assert config("mistral3")["model_type"] == "mistral"
    yarn = {
        "rope__scaling__type": "yarn",
        "rope__scaling__factor": 16.0,
        "rope__scaling__original_context_length": 128,
        "rope__scaling__yarn_log_multiplier": 1.0,
        "attention__temperature_scale": 0.1,
    }
    found = config("mistral3", **yarn)
    assert found["model_type"] == "ministral3"
    assert found["rope_parameters"]["llama_4_scaling_beta"] == 0.1
    assert found["rope_parameters"]["original_max_position_embeddings"] == 128


def test_ministral_3_is_a_model_of_mlx_lm(make_gguf, mlx_shapes):
    keys = {"attention.temperature_scale": 0.1}
    found = gguf_config(GGUFFile.open(make_gguf("mistral3", keys=keys)))
    assert "model.layers.1.mlp.up_proj.weight" in mlx_shapes(found)


def test_mixtral_is_a_llama_of_experts(config):
    found = config(expert_count=8, expert_used_count=2)
    assert found["model_type"] == "mixtral"
    assert (found["num_local_experts"], found["num_experts_per_tok"]) == (8, 2)


def test_qwen3_moe(config):
    found = config(
        "qwen3moe",
        expert_count=8,
        expert_used_count=2,
        expert_feed_forward_length=32,
        feed_forward_length=None,
    )
    assert found["model_type"] == "qwen3_moe"
    assert found["num_experts"] == 8
    assert found["moe_intermediate_size"] == found["intermediate_size"] == 32
    assert found["norm_topk_prob"] is True
    assert (found["decoder_sparse_step"], found["mlp_only_layers"]) == (1, [])


SLIDING, FULL = "sliding_attention", "full_attention"


def test_gemma_2(config):
    found = config("gemma2", attention__sliding_window=16, attention__key_length=32)
    assert found["layer_types"] == [SLIDING, FULL]
    assert found["sliding_window"] == 16
    assert (found["attn_logit_softcapping"], found["final_logit_softcapping"]) == (50.0, 30.0)
    assert found["query_pre_attn_scalar"] == found["head_dim"] == 32
    assert found["hidden_activation"] == "gelu_pytorch_tanh"
    assert config("gemma2")["sliding_window"] == 4096
    assert config("gemma2", final_logit_softcapping=20.0)["final_logit_softcapping"] == 20.0


def many_blocks(tensors, count):
    return tensors | {
        name.replace("blk.0.", f"blk.{i}."): array
        for i in range(2, count)
        for name, array in tensors.items()
        if name.startswith("blk.0.")
    }


@pytest.mark.parametrize(("arch", "layers"), [("gemma2", 46), ("gemma3", 62)])
def test_the_largest_gemmas_scale_by_hidden_size(config, llama_tensors, arch, layers):
    keys = {"block_count": layers, "attention__key_length": 32}
    found = config(arch, many_blocks(llama_tensors, layers), **keys)
    assert found["query_pre_attn_scalar"] == 16  # 64 / 4, and not the 32 of a head


def test_gemma_3(config, llama_tensors):
    tensors = many_blocks(llama_tensors, 7)
    keys = {"block_count": 7, "attention__sliding_window": 512}
    found = config(
        "gemma3", tensors, **keys, rope__scaling__type="linear", rope__scaling__factor=8.0
    )
    assert found["model_type"] == "gemma3_text"
    assert found["layer_types"] == [SLIDING] * 5 + [FULL, SLIDING]
    assert found["sliding_window_pattern"] == 6
    assert found["rope_parameters"] == {
        FULL: {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
        SLIDING: {"rope_type": "default", "rope_theta": 10000.0},
    }
    assert (found["rope_theta"], found["rope_local_base_freq"]) == (1e6, 10000.0)
    assert found["rope_scaling"]["factor"] == 8.0
    assert found["final_logit_softcapping"] is None


def test_gemma_3_without_windows(config):
    found = config("gemma3")
    assert found["layer_types"] == [FULL, FULL]
    assert (found["sliding_window"], found["sliding_window_pattern"]) == (None, 1)


def test_windows_by_a_pattern_of_the_file(config):
    found = config("gemma3", attention__sliding_window=8, attention__sliding_window_pattern=2)
    assert found["layer_types"] == [SLIDING, FULL]
    pattern = [False, True]
    found = config("gemma3", attention__sliding_window=8, attention__sliding_window_pattern=pattern)
    assert found["layer_types"] == [FULL, SLIDING]


def test_gpt_oss(config):
    found = config(
        "gpt-oss",
        expert_count=4,
        expert_used_count=2,
        expert_feed_forward_length=32,
        attention__sliding_window=8,
        rope__scaling__type="yarn",
        rope__scaling__factor=32.0,
        rope__scaling__original_context_length=64,
    )
    assert found["model_type"] == "gpt_oss"
    assert found["layer_types"] == [SLIDING, FULL]
    assert found["intermediate_size"] == 32
    assert found["rope_parameters"]["truncate"] is False


def test_phi3_windows(config):
    assert config("phi3", attention__sliding_window=2047)["sliding_window"] == 2047
    assert config("phi3", attention__sliding_window=0)["sliding_window"] is None


@pytest.mark.parametrize(("dims", "head"), [(12, 16), (14, 18), (58, 98), (2, 98), (86, 98)])
def test_a_part_of_each_head_is_rotated(config, dims, head):
    keys = {"attention__key_length": head, "attention__value_length": head}
    found = config("qwen3", rope__dimension_count=dims, **keys)
    assert int(head * found["partial_rotary_factor"]) == dims


def test_token_ids(config):
    found = config("llama")
    assert "eos_token_id" not in found


def test_unknown_architectures_say_what_can_be_done(config):
    with pytest.raises(UnsupportedModel, match=r"architecture 'rwkv7'.*try --backend llama\.cpp"):
        config("rwkv7")


REFUSED = {
    "rope on a part": ({"rope__dimension_count": 8}, UnsupportedModel, "part of each head"),
    "values of another width": ({"attention__value_length": 8}, UnsupportedModel, "another width"),
    "embeddings": ({"attention__causal": False}, UnsupportedModel, "embeddings"),
    "heads by layer": ({"attention__head_count_kv": [2, 4]}, UnsupportedModel, "layer to layer"),
    "odd yarn": (
        {"rope__scaling__type": "yarn", "rope__scaling__factor": 2.0}
        | {"rope__scaling__yarn_ext_factor": 0.5},
        UnsupportedModel,
        "'yarn'",
    ),
    "unknown scaling": (
        {"rope__scaling__type": "spiral", "rope__scaling__factor": 2.0},
        UnsupportedModel,
        "'spiral'",
    ),
    "an adapter": ({"general.type": "adapter"}, FormatError, "of the type 'adapter'"),
    "no heads": ({"attention__head_count": 0}, FormatError, "0 attention heads"),
    "no layers": ({"block_count": 0}, FormatError, "block_count cannot be 0"),
    "layers for years": ({"block_count": 1 << 31 - 1}, FormatError, "are not in 20 tensors"),
    "a context of text": ({"context_length": "long"}, FormatError, "must be a whole number"),
    "epsilon": ({"attention__layer_norm_rms_epsilon": float("nan")}, FormatError, "cannot be nan"),
    "no epsilon": ({"attention__layer_norm_rms_epsilon": None}, FormatError, "no metadata key"),
    "odd rotation": ({"rope__dimension_count": 7}, FormatError, "rope over 7 of 16"),
    "base": ({"rope__freq_base": -1.0}, FormatError, "cannot be"),
    "factor": ({"rope__scaling__factor": -2.0}, FormatError, "cannot be"),
    "short array": ({"attention__head_count_kv": [2]}, FormatError, "must give 2 whole"),
    "experts": ({"expert_count": 2, "expert_used_count": 3}, FormatError, "3 experts of 2"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_is_refused(config, name):
    keys, error, message = REFUSED[name]
    with pytest.raises(error, match=message) as caught:
        config("llama", **keys)
    assert "\n" not in str(caught.value)


@pytest.mark.shared
def test_vocabularies_are_no_models(shared):
    for path in sorted((shared / "vocab").glob("*.gguf")):
        with pytest.raises(RlMlxError, match=r"no model|not supported on MLX"):
            gguf_config(GGUFFile.open(path))


def test_rope_parameters_alone(make_gguf):
    file = GGUFFile.open(make_gguf(keys={"rope.freq_base": 5e5}))
    assert rope_parameters(file, "llama", 16) == {"rope_type": "default", "rope_theta": 5e5}
