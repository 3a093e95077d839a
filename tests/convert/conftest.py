"""Small models to read: GGUF files and folders written by other hands than ours."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path

import gguf
import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from rl_mlx.convert.weights import Dense

HIDDEN, HEADS, KV_HEADS, DIM, INNER, VOCAB, LAYERS = 64, 4, 2, 16, 96, 40, 2

_QTYPE = gguf.GGMLQuantizationType


def _block(rng, i):
    def weight(*shape):
        return rng.standard_normal(shape).astype(np.float32)

    return {
        f"blk.{i}.attn_norm.weight": weight(HIDDEN),
        f"blk.{i}.attn_q.weight": weight(HEADS * DIM, HIDDEN),
        f"blk.{i}.attn_k.weight": weight(KV_HEADS * DIM, HIDDEN),
        f"blk.{i}.attn_v.weight": weight(KV_HEADS * DIM, HIDDEN),
        f"blk.{i}.attn_output.weight": weight(HIDDEN, HEADS * DIM),
        f"blk.{i}.ffn_norm.weight": weight(HIDDEN),
        f"blk.{i}.ffn_gate.weight": weight(INNER, HIDDEN),
        f"blk.{i}.ffn_up.weight": weight(INNER, HIDDEN),
        f"blk.{i}.ffn_down.weight": weight(HIDDEN, INNER),
    }


def _tensors():
    rng = np.random.default_rng(5)
    tensors = {
        "token_embd.weight": rng.standard_normal((VOCAB, HIDDEN)).astype(np.float32),
        "output_norm.weight": rng.standard_normal(HIDDEN).astype(np.float32),
    }
    for i in range(LAYERS):
        tensors |= _block(rng, i)
    return tensors


@pytest.fixture
def llama_tensors() -> dict[str, np.ndarray]:
    """GGUF names and float32 arrays of a tiny llama with tied embeddings."""
    return _tensors()


@pytest.fixture
def make_gguf(tmp_path) -> Callable[..., Path]:
    """Write a GGUF: ``(arch, tensors, keys, types)``; a key of None leaves a default one out."""

    def make(arch="llama", tensors=None, keys=None, types=None, name="model.gguf") -> Path:
        path = tmp_path / name
        writer = gguf.GGUFWriter(path, arch)
        fields = {
            "block_count": LAYERS,
            "context_length": 512,
            "embedding_length": HIDDEN,
            "feed_forward_length": INNER,
            "attention.head_count": HEADS,
            "attention.head_count_kv": KV_HEADS,
            "attention.layer_norm_rms_epsilon": 1e-5,
        } | (keys or {})
        for key, value in fields.items():
            _add(writer, key if key.startswith("general.") else f"{arch}.{key}", value)
        for tensor, array in (_tensors() if tensors is None else tensors).items():
            kind = (types or {}).get(tensor)
            if kind is None:
                writer.add_tensor(tensor, array)
            else:
                packed = gguf.quants.quantize(array, kind)
                writer.add_tensor(tensor, packed, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    return make


def _add(writer, key, value):
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    elif value is not None:
        writer.add_array(key, value)


CONFIG = {
    "model_type": "llama",
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "intermediate_size": INNER,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "rms_norm_eps": 1e-5,
    "vocab_size": VOCAB,
    "max_position_embeddings": 512,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
}


EXTRAS = {
    "mixtral": {
        "num_local_experts": 3,
        "num_experts_per_tok": 2,
        "tie_word_embeddings": False,
    },
    "qwen3_moe": {
        "num_experts": 3,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "head_dim": DIM,
        "tie_word_embeddings": False,
    },
    "gpt_oss": {
        "num_local_experts": 3,
        "num_experts_per_tok": 2,
        "head_dim": DIM,
        "sliding_window": 8,
        "tie_word_embeddings": False,
    },
    "lfm2": {
        "norm_eps": 1e-5,
        "conv_bias": False,
        "conv_L_cache": 3,
        "block_dim": HIDDEN,
        "block_multiple_of": 16,
        "block_ffn_dim_multiplier": 1.0,
        "block_auto_adjust_ff_dim": True,
        "block_ff_dim": 144,
        "layer_types": ["conv", "full_attention"],
    },
}


@pytest.fixture
def hf_config() -> Callable[..., dict]:
    """The config of a tiny model (``model_type``), with changes; None takes a key away."""

    def make(**changes) -> dict:
        merged = CONFIG | EXTRAS.get(changes.get("model_type", "llama"), {}) | changes
        return {key: value for key, value in merged.items() if value is not None}

    return make


@pytest.fixture
def make_folder(tmp_path) -> Callable[..., Path]:
    """Write a folder: config.json and ``{file name: {tensor: mx.array}}``, perhaps an index."""

    def make(config, files, index=False, name="model") -> Path:
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config))
        for file, arrays in files.items():
            mx.save_safetensors(str(folder / file), arrays)
        if index:
            places = {tensor: file for file, arrays in files.items() for tensor in arrays}
            text = json.dumps({"metadata": {}, "weight_map": places})
            (folder / "model.safetensors.index.json").write_text(text)
        return folder

    return make


@pytest.fixture
def mlx_model() -> Callable[..., object]:
    """mlx-lm's own model of a config, with weights of chance."""

    def make(config):
        family = {"mistral": "llama"}.get(config["model_type"], config["model_type"])
        module = importlib.import_module(f"mlx_lm.models.{family}")
        model = module.Model(module.ModelArgs.from_dict(config))
        if family == "gemma3_text" and config["tie_word_embeddings"]:
            model.sanitize({})  # it makes the head, and takes it away on reading
        return model

    return make


@pytest.fixture
def mlx_arrays(mlx_model) -> Callable[..., dict[str, mx.array]]:
    """Weights of chance, by canonical name, of a config."""

    def make(config, dtype=mx.float32):
        parameters = tree_flatten(mlx_model(config).parameters())
        return {name: array.astype(dtype) for name, array in parameters}

    return make


@pytest.fixture
def assert_same(values) -> Callable[..., None]:
    """Check that weights have the expected names, shapes and numbers."""

    def check(weights, expected):
        assert set(weights.names()) == set(expected)
        for name in weights.names():
            tensor = weights.load(name)
            assert tensor.shape == weights.shape(name) == expected[name].shape
            numbers = np.array(expected[name].astype(mx.float32))
            np.testing.assert_array_equal(values(tensor), numbers)

    return check


@pytest.fixture
def mlx_shapes(mlx_model) -> Callable[..., dict[str, tuple[int, ...]]]:
    """Names and shapes of the parameters of mlx-lm's model of a config; nothing is evaluated."""

    def make(config):
        return {name: array.shape for name, array in tree_flatten(mlx_model(config).parameters())}

    return make


@pytest.fixture
def values() -> Callable[..., np.ndarray]:
    """The float32 values of a tensor, by MLX."""

    def decode(tensor) -> np.ndarray:
        if isinstance(tensor, Dense):
            array = mx.array(tensor.array)
            array = array.view(mx.bfloat16) if tensor.dtype == "bfloat16" else array
            return np.array(array.astype(mx.float32))
        parts = [tensor.scales] if tensor.biases is None else [tensor.scales, tensor.biases]
        arrays = [mx.array(part) for part in parts]
        if tensor.dtype == "bfloat16" and tensor.mode == "affine":
            arrays = [array.view(mx.bfloat16) for array in arrays]
        array = mx.dequantize(
            mx.array(tensor.weight),
            *arrays,
            group_size=tensor.group_size,
            bits=tensor.bits,
            mode=tensor.mode,
            dtype=mx.float32,
        )
        return np.array(array)

    return decode
