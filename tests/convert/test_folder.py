"""Folders: transformers 4 and 5, one file or many, MLX's quantized ones; names are mlx-lm's."""

from __future__ import annotations

import contextlib
import importlib
import json

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mlx.utils import tree_flatten

from rl_mlx.convert.folder import FolderWeights
from rl_mlx.convert.weights import Dense, Packed
from rl_mlx.errors import FormatError, ModelNotFound, RlMlxError, UnsupportedModel


def parameters(model, dtype=mx.float32):
    return {name: array.astype(dtype) for name, array in tree_flatten(model.parameters())}


def shapes(weights):
    return {name: weights.shape(name) for name in weights.names()}


def assert_same(weights, expected, values):
    """Every tensor is as long as said, as shaped as said, and holds the expected numbers."""
    assert set(weights.names()) == set(expected)
    for name in weights.names():
        tensor = weights.load(name)
        assert tensor.shape == weights.shape(name) == expected[name].shape
        np.testing.assert_array_equal(values(tensor), np.array(expected[name].astype(mx.float32)))


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
def test_every_float_type_keeps_its_bits(make_folder, hf_config, mlx_model, values, dtype):
    config = hf_config()
    arrays = parameters(mlx_model(config), dtype)
    weights = FolderWeights(make_folder(config, {"model.safetensors": arrays}))
    assert_same(weights, arrays, values)
    assert weights.load("model.norm.weight").dtype == str(dtype).removeprefix("mlx.core.")


def test_shards_and_their_index(make_folder, hf_config, mlx_model, values):
    config = hf_config()
    arrays = parameters(mlx_model(config))
    names = sorted(arrays)
    files = {
        "model-00001-of-00002.safetensors": {n: arrays[n] for n in names[::2]},
        "model-00002-of-00002.safetensors": {n: arrays[n] for n in names[1::2]},
    }
    for index in (True, False):
        folder = make_folder(config, files, index, name=f"index-{index}")
        mx.save_safetensors(str(folder / "consolidated.safetensors"), arrays)  # Mistral's twin
        assert_same(FolderWeights(folder), arrays, values)


def test_arrays_stay_valid_after_close(make_folder, hf_config, mlx_model):
    config = hf_config()
    arrays = parameters(mlx_model(config))
    weights = FolderWeights(make_folder(config, {"model.safetensors": arrays}))
    norm = weights.load("model.norm.weight").array
    weights.close()
    np.testing.assert_array_equal(norm, np.array(arrays["model.norm.weight"]))


def test_tied_heads_are_dropped_and_silence_is_read_off_the_tensors(
    make_folder, hf_config, mlx_model
):
    untied = parameters(mlx_model(hf_config(tie_word_embeddings=False)))
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
    make_folder, hf_config, mlx_model
):
    arrays = parameters(mlx_model(hf_config()))
    bare = {name.removeprefix("model."): array for name, array in arrays.items()}
    bare["layers.0.self_attn.rotary_emb.inv_freq"] = mx.ones(8)
    weights = FolderWeights(make_folder(hf_config(), {"model.safetensors": bare}))
    assert set(weights.names()) == set(arrays)


MIXTRAL = {
    "model_type": "mixtral",
    "num_local_experts": 3,
    "num_experts_per_tok": 2,
    "tie_word_embeddings": False,
}
QWEN3_MOE = {
    "model_type": "qwen3_moe",
    "num_experts": 3,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "head_dim": 16,
    "tie_word_embeddings": False,
}
GPT_OSS = {
    "model_type": "gpt_oss",
    "num_local_experts": 3,
    "num_experts_per_tok": 2,
    "intermediate_size": 96,
    "head_dim": 16,
    "sliding_window": 8,
    "tie_word_embeddings": False,
}
LFM2 = {
    "model_type": "lfm2",
    "norm_eps": 1e-5,
    "conv_bias": False,
    "conv_L_cache": 3,
    "block_dim": 64,
    "block_multiple_of": 16,
    "block_ffn_dim_multiplier": 1.0,
    "block_auto_adjust_ff_dim": True,
    "block_ff_dim": 144,
    "layer_types": ["conv", "full_attention"],
}
_NAMES = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}


def unstacked(arrays, parent, rename):
    """One tensor an expert, as Hugging Face has them."""
    split = {}
    for name, array in arrays.items():
        if ".switch_mlp." not in name:
            split[name] = array
            continue
        at, module = name.removesuffix(".weight").split(".switch_mlp.")
        for i in range(array.shape[0]):
            split[f"{at}.experts.{i}.{rename.get(module, module)}.weight"] = array[i]
    return split


def fused(arrays, source, target):
    """All experts' gate and up in one tensor, as transformers 5 holds them."""
    found = {}
    for name, array in arrays.items():
        name = name.replace(source, target)
        at, _, module = name.removesuffix(".weight").partition(".switch_mlp.")
        if module == "down_proj":
            found[f"{at}.experts.down_proj"] = array
        elif module == "gate_proj":
            up = arrays[f"{at.replace(target, source)}.switch_mlp.up_proj.weight"]
            found[f"{at}.experts.gate_up_proj"] = mx.concatenate([array, up], axis=1)
        elif not module:
            found[name] = array
    return found


@pytest.mark.parametrize("family", [MIXTRAL, QWEN3_MOE], ids=["mixtral", "qwen3_moe"])
@pytest.mark.parametrize("form", ["one by one", "fused", "stacked"])
def test_experts_are_stacked(make_folder, hf_config, mlx_model, values, family, form):
    config = hf_config(**family)
    arrays = parameters(mlx_model(config))
    parent = "block_sparse_moe" if family is MIXTRAL else "mlp"
    stored = {
        "one by one": lambda: unstacked(arrays, parent, _NAMES if family is MIXTRAL else {}),
        "fused": lambda: fused(arrays, parent, "mlp"),
        "stacked": lambda: arrays,
    }[form]()
    weights = FolderWeights(make_folder(config, {"model.safetensors": stored}))
    assert_same(weights, arrays, values)
    if form == "one by one":  # as mlx-lm's own sanitize has it
        assert set(mlx_model(config).sanitize(dict(stored))) == set(weights.names())


def test_mixed_dense_and_sparse_layers(make_folder, hf_config, mlx_model, values):
    config = hf_config(**QWEN3_MOE | {"mlp_only_layers": [0]})
    arrays = parameters(mlx_model(config))
    stored = unstacked(arrays, "mlp", {})
    assert_same(FolderWeights(make_folder(config, {"model.safetensors": stored})), arrays, values)


def test_missing_and_differing_experts(make_folder, hf_config, mlx_model):
    config = hf_config(**MIXTRAL)
    stored = unstacked(parameters(mlx_model(config)), "block_sparse_moe", _NAMES)
    name = "model.layers.1.block_sparse_moe.experts.{}.w2.weight"
    lacking = {n: a for n, a in stored.items() if n != name.format(1)}
    with pytest.raises(FormatError, match=r"expert 1 of tensor .*down_proj.* is missing"):
        FolderWeights(make_folder(config, {"model.safetensors": lacking}, name="lacking"))
    stored[name.format(2)] = stored[name.format(2)].astype(mx.float16)
    with pytest.raises(FormatError, match=r"expert 2 of tensor .* is F16 .*expert 0 is F32"):
        FolderWeights(make_folder(config, {"model.safetensors": stored}, name="differing"))


def gpt_oss_blocks(arrays):
    """OpenAI's MXFP4 form of the experts: rows of gate and up in turn, 16 bytes a block."""
    stored = {}
    for name, array in arrays.items():
        at, _, module = name.partition(".experts.")
        if not module:
            stored[name] = array
        elif module == "down_proj.weight":
            blocks, scales = mx.quantize(array, 32, 4, mode="mxfp4")
            stored[f"{at}.experts.down_proj_blocks"] = as_blocks(blocks)
            stored[f"{at}.experts.down_proj_scales"] = scales
        elif module == "down_proj.bias":
            stored[f"{at}.experts.down_proj_bias"] = array
        elif module == "gate_proj.weight":
            both = in_turn(array, arrays[f"{at}.experts.up_proj.weight"])
            blocks, scales = mx.quantize(both, 32, 4, mode="mxfp4")
            stored[f"{at}.experts.gate_up_proj_blocks"] = as_blocks(blocks)
            stored[f"{at}.experts.gate_up_proj_scales"] = scales
        elif module == "gate_proj.bias":
            both = in_turn(array, arrays[f"{at}.experts.up_proj.bias"])
            stored[f"{at}.experts.gate_up_proj_bias"] = both
    return stored


def in_turn(gate, up):
    return mx.stack([gate, up], axis=2).reshape(gate.shape[0], -1, *gate.shape[2:])


def as_blocks(words):
    octets = words.view(mx.uint8)
    return octets.reshape(*octets.shape[:-1], -1, 16)


def test_gpt_oss_in_mxfp4_is_as_mlx_lm_sanitizes_it(make_folder, hf_config, mlx_model, mlx_shapes):
    config = hf_config(**GPT_OSS)
    stored = gpt_oss_blocks(parameters(mlx_model(config)))
    quantized = {**config, "quantization_config": {"quant_method": "mxfp4"}}
    weights = FolderWeights(make_folder(quantized, {"model.safetensors": stored}))
    assert shapes(weights) == mlx_shapes(config)
    expected = mlx_model(config).sanitize(dict(stored))
    for name in weights.names():
        tensor = weights.load(name)
        if isinstance(tensor, Packed):
            module = name.removesuffix(".weight")
            assert (tensor.mode, tensor.bits, tensor.group_size) == ("mxfp4", 4, 32)
            assert tensor.biases is None
            assert weights.nbytes(name) == tensor.weight.nbytes + tensor.scales.nbytes
            np.testing.assert_array_equal(tensor.weight, np.array(expected[name]))
            np.testing.assert_array_equal(tensor.scales, np.array(expected[f"{module}.scales"]))
        else:
            np.testing.assert_array_equal(tensor.array, np.array(expected[name]))
    assert sum(isinstance(weights.load(n), Packed) for n in weights.names()) == 2 * 3


def test_plain_gpt_oss_experts_lie_the_other_way_round(make_folder, hf_config, mlx_model, values):
    config = hf_config(**GPT_OSS)
    arrays = parameters(mlx_model(config))
    stored = {}
    for name, array in arrays.items():
        at, _, module = name.partition(".experts.")
        if module.startswith("down_proj"):
            plain = array.swapaxes(-1, -2) if module.endswith("weight") else array
            suffix = "" if module.endswith("weight") else "_bias"
            stored[f"{at}.experts.down_proj{suffix}"] = plain
        elif module.startswith("gate_proj"):
            both = in_turn(array, arrays[name.replace("gate_proj", "up_proj")])
            plain = both.swapaxes(-1, -2) if module.endswith("weight") else both
            suffix = "" if module.endswith("weight") else "_bias"
            stored[f"{at}.experts.gate_up_proj{suffix}"] = plain
        elif not module:
            stored[name] = array
    weights = FolderWeights(make_folder(config, {"model.safetensors": stored}))
    assert_same(weights, arrays, values)


def test_lfm2_kernels_are_turned(make_folder, hf_config, mlx_model, values):
    config = hf_config(**LFM2)
    arrays = parameters(mlx_model(config))
    name = "model.layers.0.conv.conv.weight"
    assert arrays[name].shape == (64, 3, 1)
    stored = arrays | {name: arrays[name].swapaxes(1, 2)}
    weights = FolderWeights(make_folder(config, {"model.safetensors": stored}, name="hf"))
    assert_same(weights, arrays, values)
    assert_same(
        FolderWeights(make_folder(config, {"model.safetensors": arrays}, name="mlx")),
        arrays,
        values,
    )


PACKINGS = [
    {"group_size": 64, "bits": 4},
    {"group_size": 32, "bits": 8},
    {"group_size": 32, "bits": 3},
    {"group_size": 32, "bits": 5},
    {"group_size": 64, "bits": 6},
    {"group_size": 32, "bits": 2},
    {"group_size": 32, "bits": 4, "mode": "mxfp4"},
    {"group_size": 32, "bits": 8, "mode": "mxfp8"},
    {"group_size": 16, "bits": 4, "mode": "nvfp4"},
]


def saved(make_folder, config, model, quantization, name="model"):
    """The folder of a quantized model."""
    config = {**config, "quantization": quantization, "quantization_config": quantization}
    return make_folder(
        config, {"model.safetensors": dict(tree_flatten(model.parameters()))}, name=name
    )


@pytest.mark.parametrize(
    "packing", PACKINGS, ids=lambda p: f"{p.get('mode', 'affine')}-{p['bits']}"
)
@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_mlx_folders_dequantize_to_the_same(
    make_folder, hf_config, mlx_model, mlx_shapes, values, packing, dtype
):
    config = hf_config(hidden_size=64, intermediate_size=128)
    model = mlx_model(config)
    model.set_dtype(dtype)
    nn.quantize(model, **packing)
    weights = FolderWeights(saved(make_folder, config, model, packing))
    assert shapes(weights) == mlx_shapes(config)
    parts = dict(tree_flatten(model.parameters()))
    for name in weights.names():
        module = name.removesuffix(".weight")
        tensor = weights.load(name)
        if f"{module}.scales" not in parts:
            assert isinstance(tensor, Dense)
            continue
        assert isinstance(tensor, Packed)
        arrays = [
            parts[f"{module}.{part}"]
            for part in ("scales", "biases")
            if f"{module}.{part}" in parts
        ]
        wide = [a if a.dtype == mx.uint8 else a.astype(mx.float32) for a in arrays]
        expected = mx.dequantize(parts[name], *wide, **packing, dtype=mx.float32)
        np.testing.assert_array_equal(values(tensor), np.array(expected))
        held = tensor.weight.nbytes + tensor.scales.nbytes
        assert weights.nbytes(name) == held + (0 if tensor.biases is None else tensor.biases.nbytes)
    own = weights.load("model.embed_tokens.weight", str(dtype).removeprefix("mlx.core."))
    np.testing.assert_array_equal(own.weight, np.array(parts["model.embed_tokens.weight"]))
    scales = parts["model.embed_tokens.scales"]
    raw = scales.view(mx.uint16) if scales.dtype == mx.bfloat16 else scales
    np.testing.assert_array_equal(own.scales, np.array(raw))


def test_overrides_by_module_and_dense_ones(make_folder, hf_config, mlx_model, values):
    config = hf_config(intermediate_size=128)
    model = mlx_model(config)
    own = {
        "model.embed_tokens": {"group_size": 32, "bits": 8},
        "model.layers.0.mlp.down_proj": {"group_size": 32, "bits": 4, "mode": "mxfp4"},
        "model.layers.1.self_attn.q_proj": False,
    }
    nn.quantize(model, 64, 4, class_predicate=lambda p, m: own.get(p, hasattr(m, "to_quantized")))
    weights = FolderWeights(saved(make_folder, config, model, {"group_size": 64, "bits": 4} | own))
    packed = {n: weights.load(n) for n in weights.names()}
    assert packed["model.embed_tokens.weight"].bits == 8
    assert packed["model.layers.0.mlp.down_proj.weight"].mode == "mxfp4"
    assert packed["model.layers.0.mlp.up_proj.weight"].group_size == 64
    assert isinstance(packed["model.layers.1.self_attn.q_proj.weight"], Dense)
    parts = dict(tree_flatten(model.parameters()))
    expected = mx.dequantize(
        *[parts[f"model.embed_tokens.{p}"] for p in ("weight", "scales", "biases")], 32, 8
    )
    found = values(packed["model.embed_tokens.weight"])
    np.testing.assert_array_equal(found, np.array(expected))


def test_packing_is_seen_in_the_shapes_where_no_override_names_it(
    make_folder, hf_config, mlx_model
):
    config = hf_config(intermediate_size=128)
    model = mlx_model(config)
    nn.quantize(model, 32, 8)  # as many bits a row as 64, 4 would need twice over
    weights = FolderWeights(saved(make_folder, config, model, {"group_size": 64, "bits": 4}))
    tensor = weights.load("model.embed_tokens.weight")
    assert (tensor.bits, tensor.group_size) == (8, 32)


def test_packed_experts_are_stacked_too(make_folder, hf_config, mlx_model, values):
    config = hf_config(**MIXTRAL | {"intermediate_size": 128})
    model = mlx_model(config)
    nn.quantize(model, 32, 4)
    arrays = dict(tree_flatten(model.parameters()))
    stored = {}
    for name, array in arrays.items():
        if ".switch_mlp." not in name:
            stored[name] = array
            continue
        at, rest = name.split(".switch_mlp.")
        module, part = rest.split(".")
        for i in range(3):
            stored[f"{at}.experts.{i}.{_NAMES[module]}.{part}"] = array[i]
    config["quantization"] = {"group_size": 32, "bits": 4}
    weights = FolderWeights(make_folder(config, {"model.safetensors": stored}))
    name = "model.layers.0.block_sparse_moe.switch_mlp.gate_proj.weight"
    tensor = weights.load(name)
    assert isinstance(tensor, Packed)
    np.testing.assert_array_equal(tensor.weight, np.array(arrays[name]))


def test_scales_too_large_for_the_type_asked_for_stay_float32(make_folder, hf_config, mlx_model):
    config = hf_config()
    model = mlx_model(config)
    model.model.embed_tokens.weight = model.model.embed_tokens.weight * 1e8
    nn.quantize(model, 32, 4)
    weights = FolderWeights(saved(make_folder, config, model, {"group_size": 32, "bits": 4}))
    assert weights.load("model.embed_tokens.weight", "float16").dtype == "float32"
    assert weights.load("model.layers.0.mlp.up_proj.weight", "float16").dtype == "float16"


def test_other_families_keep_the_names_of_their_files(make_folder):
    config = {"model_type": "starcoder2", "rope_theta": 1e5, "tie_word_embeddings": True}
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
def test_tensors_that_contradict_the_config(make_folder, hf_config, mlx_model, name):
    change, message = CONTRADICTIONS[name]
    arrays = parameters(mlx_model(hf_config()))
    change(arrays)
    with pytest.raises(FormatError, match=message):
        FolderWeights(make_folder(hf_config(), {"model.safetensors": arrays}))


@pytest.mark.parametrize(
    ("part", "change", "error", "message"),
    [
        ("scales", lambda a: a[:, :-1], FormatError, r"embed_tokens"),
        (
            "scales",
            lambda a: a.astype(mx.uint8),
            FormatError,
            r"biases' must not be there, in mode 'mxfp4'",
        ),
        ("biases", lambda a: a[:-1], FormatError, r"biases' must be"),
        ("biases", None, FormatError, r"biases' must be"),
        ("weight", lambda a: a[:, :-1], RlMlxError, r"embed_tokens"),
    ],
)
def test_packed_tensors_that_do_not_fit_together(
    make_folder, hf_config, mlx_model, part, change, error, message
):
    config = hf_config()
    model = mlx_model(config)
    nn.quantize(model, 32, 4)
    arrays = dict(tree_flatten(model.parameters()))
    name = f"model.embed_tokens.{part}"
    if change is None:
        del arrays[name]
    else:
        arrays[name] = change(arrays[name])
    config["quantization"] = {"group_size": 32, "bits": 4}
    with pytest.raises(error, match=message):
        FolderWeights(make_folder(config, {"model.safetensors": arrays}))


def test_unknown_quantization(make_folder, hf_config, mlx_model):
    config = hf_config()
    model = mlx_model(config)
    nn.quantize(model, 32, 4)
    arrays = dict(tree_flatten(model.parameters()))
    config["quantization"] = {"model.embed_tokens": {"group_size": 32, "bits": 4, "mode": "int4"}}
    with pytest.raises(UnsupportedModel, match=r"mode 'int4'"):
        FolderWeights(make_folder(config, {"model.safetensors": arrays}, name="mode"))
    for method in ("gptq", "fp8", "compressed-tensors"):
        config = hf_config(quantization_config={"quant_method": method})
        with pytest.raises(UnsupportedModel, match=f"quantized by {method}.*use an unquantized"):
            FolderWeights(make_folder(config, {"model.safetensors": arrays}, name=method))


def test_broken_folders(tmp_path, make_folder, hf_config, mlx_model):
    arrays = parameters(mlx_model(hf_config()))
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
def test_no_config_crashes(any_folder, hf_config, family, changes):
    extra = {"mixtral": MIXTRAL, "qwen3_moe": QWEN3_MOE, "gpt_oss": GPT_OSS, "lfm2": LFM2}
    config = hf_config(**{"model_type": family} | extra.get(family, {})) | changes
    (any_folder / "config.json").write_text(json.dumps(config))
    with contextlib.suppress(RlMlxError):
        weights = FolderWeights(any_folder)
        assert weights.config["model_type"] not in FAMILIES  # one tensor is no model of ours


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3"])
def test_the_other_families_have_mlx_lms_names(make_folder, hf_config, mlx_model, values, family):
    importlib.import_module(f"mlx_lm.models.{family}")
    config = hf_config(
        model_type=family,
        head_dim=16,
        tie_word_embeddings=family.startswith("gemma"),
        attention_bias=family == "llama",
        mlp_bias=family == "llama",
    )
    arrays = parameters(mlx_model(config))
    weights = FolderWeights(make_folder(config, {"model.safetensors": arrays}))
    assert_same(weights, arrays, values)
