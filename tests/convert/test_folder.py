"""Folders of transformers 4 and 5, in one file or many; broken ones."""

from __future__ import annotations

import contextlib
import json

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from rl_mlx.convert.folder import FolderWeights
from rl_mlx.convert.weights import Dense
from rl_mlx.errors import FormatError, ModelNotFound, RlMlxError


def shapes(weights):
    return {name: weights.shape(name) for name in weights.names()}


@pytest.mark.shared
@pytest.mark.parametrize("name", ["qwen2", "llama3-rope", "qwen3_moe"])
def test_folders_of_transformers_5_are_what_mlx_lm_expects(shared, mlx_shapes, name):
    weights = FolderWeights(shared / "hf" / name)
    assert shapes(weights) == mlx_shapes(weights.config)
    for tensor in weights.names():
        loaded = weights.load(tensor)
        assert isinstance(loaded, Dense)
        assert loaded.shape == weights.shape(tensor)
        assert loaded.array.nbytes == weights.nbytes(tensor)
        assert loaded.array.flags.c_contiguous
        assert loaded.array.flags.aligned


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_every_float_type_keeps_its_bits(make_folder, hf_config, assert_same, mlx_arrays, dtype):
    config = hf_config()
    arrays = mlx_arrays(config, dtype)
    weights = FolderWeights(make_folder(config, {"model.safetensors": arrays}))
    assert_same(weights, arrays)
    assert weights.load("model.norm.weight").dtype == str(dtype).removeprefix("mlx.core.")


def test_shards_and_their_index(make_folder, hf_config, assert_same, mlx_arrays):
    config = hf_config()
    arrays = mlx_arrays(config)
    names = sorted(arrays)
    files = {
        "model-00001-of-00002.safetensors": {n: arrays[n] for n in names[::2]},
        "model-00002-of-00002.safetensors": {n: arrays[n] for n in names[1::2]},
    }
    for index in (True, False):
        folder = make_folder(config, files, index, name=f"index-{index}")
        mx.save_safetensors(str(folder / "consolidated.safetensors"), arrays)  # Mistral's twin
        assert_same(FolderWeights(folder), arrays)


def test_arrays_stay_valid_after_close(make_folder, hf_config, mlx_arrays):
    config = hf_config()
    arrays = mlx_arrays(config)
    weights = FolderWeights(make_folder(config, {"model.safetensors": arrays}))
    norm = weights.load("model.norm.weight").array
    weights.close()
    np.testing.assert_array_equal(norm, np.array(arrays["model.norm.weight"]))


def test_tied_heads_are_dropped_and_silence_is_read_off_the_tensors(
    make_folder, hf_config, mlx_arrays
):
    untied = mlx_arrays(hf_config(tie_word_embeddings=False))
    folder = make_folder(hf_config(), {"model.safetensors": untied}, name="tied")
    assert "lm_head.weight" not in FolderWeights(folder).names()
    silent = hf_config(tie_word_embeddings=None)
    weights = FolderWeights(make_folder(silent, {"model.safetensors": untied}, name="silent"))
    assert weights.config["tie_word_embeddings"] is False
    assert "lm_head.weight" in weights.names()
    del untied["lm_head.weight"]
    weights = FolderWeights(make_folder(silent, {"model.safetensors": untied}, name="headless"))
    assert weights.config["tie_word_embeddings"] is True


def test_derived_tensors_are_dropped_and_bare_decoders_get_their_prefix(
    make_folder, hf_config, mlx_arrays
):
    arrays = mlx_arrays(hf_config())
    bare = {name.removeprefix("model."): array for name, array in arrays.items()}
    bare["layers.0.self_attn.rotary_emb.inv_freq"] = mx.ones(8)
    weights = FolderWeights(make_folder(hf_config(), {"model.safetensors": bare}))
    assert set(weights.names()) == set(arrays)


def test_other_families_keep_the_names_of_their_files(make_folder):
    config = {"model_type": "helium", "rope_theta": 1e5, "tie_word_embeddings": True}
    arrays = {"model.layers.0.mlp.c_fc.weight": mx.ones((4, 64)), "lm_head.weight": mx.ones((2, 2))}
    weights = FolderWeights(make_folder(config, {"model.safetensors": arrays}))
    assert set(weights.names()) == set(arrays)
    assert weights.config["rope_parameters"]["rope_theta"] == 1e5


CONTRADICTIONS = {
    "shape": (
        lambda a: a.update({"model.norm.weight": mx.ones(65)}),
        r"'model\.norm\.weight' must be \[64\].*is \[65\]",
    ),
    "missing": (
        lambda a: a.pop("model.layers.1.mlp.up_proj.weight"),
        r"'model\.layers\.1\.mlp\.up_proj\.weight' is missing",
    ),
    "surplus": (
        lambda a: a.update({"model.layers.0.self_attn.q_proj.bias": mx.ones(64)}),
        r"'model\.layers\.0\.self_attn\.q_proj\.bias' has no place",
    ),
}


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_tensors_that_contradict_the_config(make_folder, hf_config, mlx_arrays, name):
    change, message = CONTRADICTIONS[name]
    arrays = mlx_arrays(hf_config())
    change(arrays)
    with pytest.raises(FormatError, match=message):
        FolderWeights(make_folder(hf_config(), {"model.safetensors": arrays}))


def test_broken_folders(make_folder, hf_config, mlx_arrays):
    arrays = mlx_arrays(hf_config())
    folder = make_folder(hf_config(), {"model.safetensors": arrays}, index=True)
    index = folder / "model.safetensors.index.json"
    for places, error, message in (
        ({"x": "model-00002-of-00002.safetensors"}, ModelNotFound, "00002.*no such file"),
        ({"x": "model.safetensors"}, FormatError, "'x' is missing"),
        ({"x": "../model.safetensors"}, FormatError, "must name a file"),
        ({"x": 3}, FormatError, "must name a file"),
        (None, FormatError, "must name a file"),
    ):
        index.write_text(json.dumps({"weight_map": places}))
        with pytest.raises(error, match=message):
            FolderWeights(folder)
    index.unlink()
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    mx.save_safetensors(str(folder / "model-2.safetensors"), {"model.norm.weight": mx.ones(64)})
    with pytest.raises(FormatError, match="is in another file too"):
        FolderWeights(folder)
    for text, message in (("{", "cannot be read as JSON"), ("[]", "must be a JSON object")):
        (folder / "config.json").write_text(text)
        with pytest.raises(FormatError, match=message):
            FolderWeights(folder)


def test_folders_without_safetensors_say_what_to_do(make_folder, hf_config):
    folder = make_folder(hf_config(), {})
    with pytest.raises(ModelNotFound, match=r"no model\*\.safetensors"):
        FolderWeights(folder)
    (folder / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(ModelNotFound, match="PyTorch pickles"):
        FolderWeights(folder)


JSON = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 1 << 70),
    st.floats(),
    st.text(max_size=3),
    st.lists(st.one_of(st.integers(-2, 5), st.text(max_size=2)), max_size=3),
    st.dictionaries(st.sampled_from(["rope_type", "factor", "bits"]), st.integers(-1, 9)),
)
KEYS = st.sampled_from(
    [
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "vocab_size",
        "intermediate_size",
        "rope_parameters",
        "rope_scaling",
        "rope_theta",
        "layer_types",
        "quantization",
        "model_type",
        "quantization_config",
        "num_experts",
        "mlp_only_layers",
        "decoder_sparse_step",
        "moe_intermediate_size",
        "num_local_experts",
        "sliding_window_pattern",
        "full_attn_idxs",
        "block_ff_dim",
        "block_multiple_of",
        "block_ffn_dim_multiplier",
        "conv_L_cache",
        "attention_bias",
        "tie_word_embeddings",
    ]
)


@pytest.fixture(scope="module")
def any_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("any")
    mx.save_safetensors(str(folder / "model.safetensors"), {"model.norm.weight": mx.ones(64)})
    return folder


FAMILIES = ["llama", "mixtral", "qwen3_moe", "gemma2", "gemma3_text", "phi3", "gpt_oss", "lfm2"]


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(FAMILIES), st.dictionaries(KEYS, JSON, max_size=4))
@example("gemma2", {"sliding_window_pattern": False})
@example("gemma3_text", {"sliding_window_pattern": 0})
def test_no_config_crashes(any_folder, hf_config, family, changes):
    config = hf_config(model_type=family) | changes
    (any_folder / "config.json").write_text(json.dumps(config))
    with contextlib.suppress(RlMlxError):
        weights = FolderWeights(any_folder)
        assert weights.config["model_type"] not in FAMILIES  # one tensor is no model of ours


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3"])
def test_the_other_families_have_mlx_lms_names(
    make_folder, hf_config, assert_same, mlx_arrays, family
):
    config = hf_config(
        model_type=family,
        head_dim=16,
        tie_word_embeddings=family.startswith("gemma"),
        attention_bias=family == "llama",
        mlp_bias=family == "llama",
    )
    arrays = mlx_arrays(config)
    weights = FolderWeights(make_folder(config, {"model.safetensors": arrays}))
    assert_same(weights, arrays)
