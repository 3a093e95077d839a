"""MLX's quantized folders: every mode, overrides by module, parts that do not fit together."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from rl_mlx.convert.folder import FolderWeights
from rl_mlx.convert.weights import Dense, Packed
from rl_mlx.errors import FormatError, RlMlxError, UnsupportedModel


def shapes(weights):
    return {name: weights.shape(name) for name in weights.names()}


_NAMES = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}


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


def test_packed_experts_are_stacked_too(make_folder, hf_config, mlx_model):
    config = hf_config(model_type="mixtral", intermediate_size=128)
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
    for method in ("bitsandbytes", "aqlm", "hqq"):
        config = hf_config(quantization_config={"quant_method": method})
        with pytest.raises(UnsupportedModel, match=f"quantized by {method}.*use an unquantized"):
            FolderWeights(make_folder(config, {"model.safetensors": arrays}, name=method))
