"""Layouts of Hugging Face become those of mlx-lm, as its own ``sanitize`` has them."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from rl_mlx.convert.folder import FolderWeights
from rl_mlx.convert.weights import Packed
from rl_mlx.errors import FormatError


def shapes(weights):
    return {name: weights.shape(name) for name in weights.names()}


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


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
@pytest.mark.parametrize("form", ["one by one", "fused", "stacked"])
def test_experts_are_stacked(
    make_folder, hf_config, assert_same, mlx_arrays, mlx_model, family, form
):
    config = hf_config(model_type=family)
    arrays = mlx_arrays(config)
    parent = "block_sparse_moe" if family == "mixtral" else "mlp"
    stored = {
        "one by one": lambda: unstacked(arrays, parent, _NAMES if family == "mixtral" else {}),
        "fused": lambda: fused(arrays, parent, "mlp"),
        "stacked": lambda: arrays,
    }[form]()
    weights = FolderWeights(make_folder(config, {"model.safetensors": stored}))
    assert_same(weights, arrays)
    if form == "one by one":  # as mlx-lm's own sanitize has it
        assert set(mlx_model(config).sanitize(dict(stored))) == set(weights.names())


def test_mixed_dense_and_sparse_layers(make_folder, hf_config, assert_same, mlx_arrays):
    config = hf_config(model_type="qwen3_moe", mlp_only_layers=[0])
    arrays = mlx_arrays(config)
    stored = unstacked(arrays, "mlp", {})
    assert_same(FolderWeights(make_folder(config, {"model.safetensors": stored})), arrays)


def test_missing_and_differing_experts(make_folder, hf_config, mlx_arrays):
    config = hf_config(model_type="mixtral")
    stored = unstacked(mlx_arrays(config), "block_sparse_moe", _NAMES)
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


def test_gpt_oss_in_mxfp4_is_as_mlx_lm_sanitizes_it(
    make_folder, hf_config, mlx_arrays, mlx_model, mlx_shapes
):
    config = hf_config(model_type="gpt_oss")
    stored = gpt_oss_blocks(mlx_arrays(config))
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


def test_plain_gpt_oss_experts_lie_the_other_way_round(
    make_folder, hf_config, assert_same, mlx_arrays
):
    config = hf_config(model_type="gpt_oss")
    arrays = mlx_arrays(config)
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
    assert_same(weights, arrays)


def test_lfm2_kernels_are_turned(make_folder, hf_config, assert_same, mlx_arrays):
    config = hf_config(model_type="lfm2")
    arrays = mlx_arrays(config)
    name = "model.layers.0.conv.conv.weight"
    assert arrays[name].shape == (64, 3, 1)
    stored = arrays | {name: arrays[name].swapaxes(1, 2)}
    weights = FolderWeights(make_folder(config, {"model.safetensors": stored}, name="hf"))
    assert_same(weights, arrays)
    assert_same(
        FolderWeights(make_folder(config, {"model.safetensors": arrays}, name="mlx")),
        arrays,
    )
