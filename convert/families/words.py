"""What families share: GGUF's names of their tensors, and metadata of their experts."""

from __future__ import annotations

from typing import Any

from rl_mlx.convert.gguf.keys import Keys
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


def inner_width(config: Config) -> int:
    """The width of dense layers, or of experts where there are none."""
    found: int = config.get("intermediate_size") or config["moe_intermediate_size"]
    return found
