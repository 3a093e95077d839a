"""Fixtures of all tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, settings

from rl_mlx.convert.layout import layout
from rl_mlx.convert.weights import Dense, FloatType, Tensor, Weights

ROOT = Path(__file__).resolve().parent.parent

# No test measures time, and machines that run tests are often busy.
settings.register_profile("rl-mlx", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("rl-mlx")


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data beside the project; tests that need it are skipped without it."""
    path = ROOT.parent / "shared"
    if not path.is_dir():
        pytest.skip("needs the test data in ../shared, which is not here")
    return path


class RandomWeights(Weights):
    """Tensors drawn from a seed, of whatever names and shapes the model is asked to have."""

    def __init__(self, config: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> None:
        self.path = Path("random")
        self.config = config
        rng = np.random.default_rng(0)
        self._tensors = {
            name: rng.normal(0, 0.08, shape).astype(np.float32)
            + (1 if name.endswith("norm.weight") else 0)
            for name, shape in shapes.items()
        }

    def names(self) -> list[str]:
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensors[name].shape

    def nbytes(self, name: str, *, exact: bool = False) -> int:
        return self._tensors[name].nbytes

    def load(self, name: str, scales: FloatType = "float32", *, exact: bool = False) -> Tensor:
        return Dense(self._tensors[name].astype(np.float32), "float32")

    def close(self) -> None:
        pass


LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": True,
}
GEMMA3 = {
    **LLAMA,
    "model_type": "gemma3_text",
    "head_dim": 16,
    "sliding_window": 16,
    "sliding_window_pattern": 2,
    "query_pre_attn_scalar": 16,
    "hidden_activation": "gelu_pytorch_tanh",
}
LFM2 = {
    **LLAMA,
    "model_type": "lfm2",
    "layer_types": ["conv", "full_attention"],
    "conv_L_cache": 3,
    "block_auto_adjust_ff_dim": False,
}


QWEN35 = {
    **LLAMA,
    "model_type": "qwen3_5_text",
    "head_dim": 16,
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_conv_kernel_dim": 4,
}


def tiny_weights(config: dict[str, Any]) -> RandomWeights:
    """Random weights of one of the configs above."""
    if config["model_type"] == "qwen3_5_text":
        return RandomWeights(config, layout(config, 100))
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    dim = config.get("head_dim", hidden // config["num_attention_heads"])
    q, kv = config["num_attention_heads"] * dim, config["num_key_value_heads"] * dim
    lfm2, gemma = config["model_type"] == "lfm2", config["model_type"] == "gemma3_text"
    norm = "embedding_norm" if lfm2 else "norm"
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config["vocab_size"], hidden),
        f"model.{norm}.weight": (hidden,),
    }
    for i in range(config["num_hidden_layers"]):
        names: dict[str, tuple[int, ...]] = {}
        if lfm2 and config["layer_types"][i] == "conv":
            names["conv.in_proj"] = (3 * hidden, hidden)
            names["conv.conv"] = (hidden, config["conv_L_cache"], 1)
            names["conv.out_proj"] = (hidden, hidden)
        else:
            names["self_attn.q_proj"] = (q, hidden)
            names["self_attn.k_proj"] = names["self_attn.v_proj"] = (kv, hidden)
            names["self_attn.out_proj" if lfm2 else "self_attn.o_proj"] = (hidden, q)
            if lfm2 or gemma:
                suffix = "layernorm" if lfm2 else "norm"
                names[f"self_attn.q_{suffix}"] = names[f"self_attn.k_{suffix}"] = (dim,)
        gate, up, down = ("w1", "w3", "w2") if lfm2 else ("gate_proj", "up_proj", "down_proj")
        mlp = "feed_forward" if lfm2 else "mlp"
        names[f"{mlp}.{gate}"] = names[f"{mlp}.{up}"] = (inner, hidden)
        names[f"{mlp}.{down}"] = (hidden, inner)
        norms = ["operator_norm", "ffn_norm"] if lfm2 else []
        norms = norms or ["input_layernorm", "post_attention_layernorm"]
        if gemma:
            norms += ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
        names.update(dict.fromkeys(norms, (hidden,)))
        shapes.update({f"model.layers.{i}.{n}.weight": shape for n, shape in names.items()})
    return RandomWeights(config, shapes)


@pytest.fixture(scope="session")
def tiny() -> Callable[..., RandomWeights]:
    """``tiny("llama" | "gemma3" | "lfm2" | "qwen35", **config)``: small random weights of that
    family.
    """
    configs = {"llama": LLAMA, "gemma3": GEMMA3, "lfm2": LFM2, "qwen35": QWEN35}
    return lambda family, **more: tiny_weights({**configs[family], **more})
