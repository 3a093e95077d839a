"""What families share: GGUF's names of their tensors, and metadata of their experts."""

from __future__ import annotations

from typing import Any

import numpy as np

from rl_mlx.convert.gguf.keys import Keys
from rl_mlx.convert.gguf.writer import Fields
from rl_mlx.convert.shapes import Config, Shapes, linear
from rl_mlx.errors import FormatError

ATTENTION = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
}
DENSE = {"mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}
PRE_NORMS = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}


LAYER_TYPES = ("full_attention", "sliding_attention")


def expert_names(at: str, router: str) -> dict[str, str]:
    """Of stacked experts below ``at`` and the layer that chooses among them."""
    return {
        router: "ffn_gate_inp",
        f"{at}.gate_proj": "ffn_gate_exps",
        f"{at}.up_proj": "ffn_up_exps",
        f"{at}.down_proj": "ffn_down_exps",
    }


def shared_names(at: str) -> dict[str, str]:
    """Of the expert that answers for every token."""
    return {
        f"{at}.gate_proj": "ffn_gate_shexp",
        f"{at}.up_proj": "ffn_up_shexp",
        f"{at}.down_proj": "ffn_down_shexp",
    }


def gated(at: str, inner: int, hidden: int) -> Shapes:
    """A gated feed-forward layer below ``at``."""
    return (
        linear(f"{at}.gate_proj", inner, hidden)
        | linear(f"{at}.up_proj", inner, hidden)
        | linear(f"{at}.down_proj", hidden, inner)
    )


def read_attention(keys: Keys) -> dict[str, Any]:
    """Heads of keys and values."""
    return {"num_key_value_heads": keys.uniform("attention.head_count_kv", keys.heads)}


def read_experts(keys: Keys, count: str, used: str) -> dict[str, Any]:
    """How many experts there are, and how many a token goes to, under a config's own words.

    Raises ``FormatError`` where more are used than there are.
    """
    experts, chosen = keys.count("expert_count"), keys.count("expert_used_count")
    if chosen > experts:
        raise FormatError(f"{keys.path}: {chosen} experts of {experts} cannot be used")
    return {count: experts, used: chosen}


def read_dense(keys: Keys) -> dict[str, Any]:
    """Heads of keys and values, and the width of the feed-forward layers."""
    return {
        "num_key_value_heads": keys.uniform("attention.head_count_kv", keys.heads),
        "intermediate_size": keys.uniform("feed_forward_length"),
    }


def read_windows(keys: Keys, period: int) -> dict[str, Any]:
    """Which layers see a window; ``period`` where the file does not say."""
    if not keys.has("attention.sliding_window"):
        return {"sliding_window": None, "layer_types": layer_types(keys.layers, 1)}
    key = "attention.sliding_window_pattern"
    if isinstance(keys.file.get(f"{keys.arch}.{key}"), np.ndarray):
        kinds = ["sliding_attention" if w else "full_attention" for w in keys.per_layer(key)]
    else:
        kinds = layer_types(keys.layers, keys.count(key, period))
    return {"sliding_window": keys.count("attention.sliding_window"), "layer_types": kinds}


def write_windows(config: Config, period: int | None) -> Fields:
    """Windows of a family where every ``period``-th layer has none; None where all have one."""
    window = config.get("sliding_window")
    kinds = config.get("layer_types") or []
    if not window or (kinds and "sliding_attention" not in kinds):
        return {}
    windowed = [kind == "sliding_attention" for kind in kinds]
    if period and kinds and windowed != [(i + 1) % period != 0 for i in range(len(kinds))]:
        return {
            "attention.sliding_window": window,
            "attention.sliding_window_pattern": np.array(windowed),
        }
    return {"attention.sliding_window": window}


def layer_types(count: int, period: int) -> list[str]:
    """Every ``period``-th of ``count`` layers sees all, the others a window."""
    return [LAYER_TYPES[(i + 1) % period != 0] for i in range(count)]


def has_bias(keys: Keys, tensor: str) -> bool:
    """Whether a matrix of the first layer has a bias."""
    return f"blk.0.{tensor}.bias" in keys.file.tensors


def scales(config: Config, **names: str) -> Fields:
    """Numbers under GGUF's names, ``config's word="GGUF's key"``; those not given are left out."""
    given = {names[word]: config.get(word) for word in names}
    return {key: float(value) for key, value in given.items() if value is not None}
