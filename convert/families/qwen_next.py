"""Qwen3-Next and Qwen 3.5, with and without experts."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np

from rl_mlx.convert import floats
from rl_mlx.convert.families import qwen_moe
from rl_mlx.convert.families.words import ATTENTION, DENSE, read_attention, read_experts
from rl_mlx.convert.family import Family
from rl_mlx.convert.gguf.changes import Change, Order
from rl_mlx.convert.gguf.keys import Keys
from rl_mlx.convert.gguf.writer import Fields
from rl_mlx.convert.lazy import FLOATS, Arrays, Lazy
from rl_mlx.convert.shapes import (
    Config,
    Shapes,
    Sizes,
    head_norms,
    linear,
    mlp,
    norms,
    pre_norms,
    size,
)
from rl_mlx.errors import FormatError, UnsupportedModel

_AT = "linear_attn"


class _Heads:
    """The sizes of a gated delta net."""

    def __init__(self, config: Config) -> None:
        self.keys, self.values = (
            size(config, f"linear_num_{kind}_heads") for kind in ("key", "value")
        )
        self.key_dim, self.value_dim = (
            size(config, f"linear_{kind}_head_dim") for kind in ("key", "value")
        )
        self.each, rest = divmod(self.values, self.keys)
        if rest:
            raise FormatError(f"{self.values} value heads cannot share {self.keys} key heads")
        self.width = self.keys * self.key_dim
        self.inner = self.values * self.value_dim


def _block(config: Config, layer: int) -> Shapes:
    s = Sizes.of({"intermediate_size": config.get("moe_intermediate_size"), **config})
    is_sparse = config.get("num_experts") and qwen_moe.is_sparse(config, layer)
    feed = qwen_moe.sparse(config, s.hidden) if is_sparse else mlp(s)
    is_full = config["layer_types"][layer] == "full_attention"
    return pre_norms(s) | feed | (_attention(config, s) if is_full else _delta(config, s))


def _attention(config: Config, s: Sizes) -> Shapes:
    bias, width, keys = bool(config.get("attention_bias")), s.heads * s.head_dim, s.kv_heads
    return (
        linear("self_attn.q_proj", 2 * width, s.hidden, bias=bias)
        | linear("self_attn.k_proj", keys * s.head_dim, s.hidden, bias=bias)
        | linear("self_attn.v_proj", keys * s.head_dim, s.hidden, bias=bias)
        | linear("self_attn.o_proj", s.hidden, width, bias=bias)
        | head_norms(s)
    )


def _delta(config: Config, s: Sizes) -> Shapes:
    h = _Heads(config)
    channels = 2 * h.width + h.inner
    return (
        linear(f"{_AT}.in_proj_qkv", channels, s.hidden)
        | linear(f"{_AT}.in_proj_z", h.inner, s.hidden)
        | linear(f"{_AT}.in_proj_b", h.values, s.hidden)
        | linear(f"{_AT}.in_proj_a", h.values, s.hidden)
        | {f"{_AT}.conv1d.weight": (channels, size(config, "linear_conv_kernel_dim"), 1)}
        | {f"{_AT}.A_log": (h.values,), f"{_AT}.dt_bias": (h.values,)}
        | norms(h.value_dim, f"{_AT}.norm")
        | linear(f"{_AT}.out_proj", s.hidden, h.inner)
    )


_PREFIXES = (  # of mlx-lm, with the "model." that bare decoders get, and of transformers
    ("model.language_model.lm_head.", "lm_head."),
    ("model.language_model.model.", "model."),
    ("language_model.lm_head.", "lm_head."),
    ("language_model.model.", "model."),
    ("model.language_model.", "model."),
)
_DROPPED = ("model.visual.", "visual.", "vision_tower.", "mtp.", "language_model.mtp.")
_NORMS = ("layernorm.weight", "model.norm.weight", ".q_norm.weight", ".k_norm.weight")


def _sanitize(config: Config, arrays: Arrays) -> Arrays:
    """The text's tensors alone, its norms with their 1, its projections apart."""
    found: Arrays = {}
    for name, array in arrays.items():
        for old, new in _PREFIXES:
            if name.startswith(old):
                name = new + name.removeprefix(old)
                break
        tied_head = name.startswith("lm_head.") and config.get("tie_word_embeddings")
        if not (tied_head or name.removeprefix("model.").startswith(_DROPPED)):
            found[name] = array
    kernels = [a for n, a in found.items() if n.endswith("conv1d.weight")]
    is_raw = any(len(a.shape) == 3 and a.shape[1] == 1 < a.shape[2] for a in kernels)
    made: Arrays = {}
    for name, array in qwen_moe.stack(config, found).items():
        if is_raw and name.endswith("conv1d.weight"):
            array = array.transposed()
        elif is_raw and name.endswith(_NORMS):
            array = _plus_one(array)
        made |= _apart(config, name, array)
    return made


def _plus_one(array: Lazy) -> Lazy:
    kind = FLOATS.get(array.dtype)
    if kind is None:
        return array
    return array.seen(array.shape, lambda a: (floats.widen(a, kind) + 1).astype(np.float32), "F32")


def _apart(config: Config, name: str, array: Lazy) -> Arrays:
    """Qwen3-Next's fused projections as Qwen 3.5 has them; they lie key head by key head."""
    at, fused, kind = name.partition(f"{_AT}.in_proj_")
    module, _, suffix = kind.partition(".")
    h = _Heads(config)
    if not fused or module not in {"qkvz", "ba"} or array.shape[0] != _fused_rows(h, module):
        return {name: array}
    rows = _rows_of_fused(h)
    parts = ("qkv", "z") if module == "qkvz" else ("b", "a")
    return {f"{at}{_AT}.in_proj_{part}.{suffix}": array.taken(rows[part]) for part in parts}


def _fused_rows(h: _Heads, module: str) -> int:
    return 2 * h.width + 2 * h.inner if module == "qkvz" else 2 * h.values


def _rows_of_fused(h: _Heads) -> dict[str, Order]:
    """Where the rows of the parts lie in ``in_proj_qkvz`` and ``in_proj_ba``."""
    own = h.each * h.value_dim
    run = np.arange(h.keys * (2 * h.key_dim + 2 * own)).reshape(h.keys, -1)
    q, k, v, z = np.split(run, np.cumsum([h.key_dim, h.key_dim, own]), axis=1)
    pairs = np.arange(2 * h.values).reshape(h.keys, 2, h.each)
    return {
        "qkv": np.concatenate([q.reshape(-1), k.reshape(-1), v.reshape(-1)]),
        "z": z.reshape(-1),
        "b": pairs[:, 0].reshape(-1),
        "a": pairs[:, 1].reshape(-1),
    }


def _change(config: Config, name: str) -> Change | None:
    """Value heads lie in turns: the first of each key head, the second of each, and so on."""
    if (found := qwen_moe.shared_gate(config, name)) or _AT not in name:
        return found
    h, module = _Heads(config), name.partition(f"{_AT}.")[2]
    heads = np.arange(h.values).reshape(h.each, h.keys).T.reshape(-1)
    rows = (heads[:, None] * h.value_dim + np.arange(h.value_dim)).reshape(-1)
    keys = np.concatenate([np.arange(2 * h.width), 2 * h.width + rows])
    return {
        "in_proj_qkv.weight": Change(rows=keys),
        "in_proj_z.weight": Change(rows=rows),
        "in_proj_b.weight": Change(rows=heads),
        "in_proj_a.weight": Change(rows=heads),
        "conv1d.weight": Change(rows=keys, shape=(len(keys), config["linear_conv_kernel_dim"])),
        "A_log": Change(rows=heads, value=_logarithm, back=_rate),
        "dt_bias": Change(rows=heads),
        "out_proj.weight": Change(columns=heads),
    }.get(module)


def _change_of_next(config: Config, name: str) -> Change | None:
    """A Qwen3-Next file has heads in order, and betas and decays in one tensor."""
    if (found := qwen_moe.shared_gate(config, name)) or _AT not in name:
        return found
    h, module = _Heads(config), name.partition(f"{_AT}.")[2]
    if module in {"in_proj_b.weight", "in_proj_a.weight"}:
        block = f"blk.{name.split('.')[2]}.ssm_ba.weight"
        rows = _rows_of_fused(h)[module[8]]
        shape = (2 * h.values, config["hidden_size"])
        return Change(rows=rows, run=2 * h.values, shape=shape, source=block)
    if module == "conv1d.weight":
        return Change(shape=(2 * h.width + h.inner, config["linear_conv_kernel_dim"]))
    return Change(value=_logarithm, back=_rate) if module == "A_log" else None


def _older_next(config: Config, name: str) -> Change | None:
    """The first Qwen3-Next files had the fused projection as it was trained."""
    h, module = _Heads(config), name.partition(f"{_AT}.")[2]
    if module not in {"in_proj_qkv.weight", "in_proj_z.weight"}:
        return _change_of_next(config, name) if "in_proj_" in module else None
    run = _fused_rows(h, "qkvz")
    rows = _rows_of_fused(h)["z" if module.startswith("in_proj_z") else "qkv"]
    source = f"blk.{name.split('.')[2]}.ssm_in.weight"
    return Change(rows=rows, run=run, shape=(run, config["hidden_size"]), source=source)


def _logarithm(rate: np.ndarray[Any, Any]) -> Any:
    return np.log(-rate)


def _rate(logarithm: np.ndarray[Any, Any]) -> Any:
    return -np.exp(logarithm)


def _read(keys: Keys) -> dict[str, Any]:
    heads, inner = keys.count("ssm.time_step_rank"), keys.count("ssm.inner_size")
    key = f"{keys.arch}.attention.recurrent_layers"
    if key in keys.file.metadata:
        recurrent = keys.per_layer("attention.recurrent_layers")
    else:
        period = keys.count("full_attention_interval", 4)
        recurrent = [int((i + 1) % period != 0) for i in range(keys.layers)]
    kinds = ["linear_attention" if r else "full_attention" for r in recurrent]
    found = {
        **read_attention(keys),
        "layer_types": kinds,
        "linear_num_key_heads": keys.count("ssm.group_count"),
        "linear_num_value_heads": heads,
        "linear_key_head_dim": keys.count("ssm.state_size"),
        "linear_value_head_dim": inner // heads,
        "linear_conv_kernel_dim": keys.count("ssm.conv_kernel"),
        "attention_bias": False,
    }
    if "full_attention" in kinds:
        found["full_attention_interval"] = kinds.index("full_attention") + 1
    return found


def _read_dense(keys: Keys) -> dict[str, Any]:
    return _read(keys) | {"intermediate_size": keys.uniform("feed_forward_length")}


def _read_sparse(keys: Keys) -> dict[str, Any]:
    width = keys.count("expert_feed_forward_length")
    return {
        **_read(keys),
        **read_experts(keys, "num_experts", "num_experts_per_tok"),
        "moe_intermediate_size": width,
        "shared_expert_intermediate_size": keys.count("expert_shared_feed_forward_length", width),
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }


def _write(config: Config) -> Fields:
    h = _Heads(config)
    kinds = config["layer_types"]
    period = kinds.index("full_attention") + 1 if "full_attention" in kinds else len(kinds) + 1
    if any((kind == "full_attention") != ((i + 1) % period == 0) for i, kind in enumerate(kinds)):
        raise UnsupportedModel("llama.cpp runs this family only with attention at regular places")
    if h.key_dim != h.value_dim or config.get("attention_bias"):
        raise UnsupportedModel("llama.cpp runs this family only with keys as wide as values")
    rope = config.get("rope_parameters") or {}
    partial = rope.get("partial_rotary_factor") or config.get("partial_rotary_factor", 0.25)
    dims = int(config["head_dim"] * partial)
    sections = rope.get("mrope_section") or _sections(dims // 2)
    return {
        "ssm.conv_kernel": config["linear_conv_kernel_dim"],
        "ssm.state_size": h.key_dim,
        "ssm.group_count": h.keys,
        "ssm.time_step_rank": h.values,
        "ssm.inner_size": h.inner,
        "full_attention_interval": period,
        "rope.dimension_count": dims,
        "rope.dimension_sections": np.array([*sections, *[0] * (4 - len(sections))], np.int32),
    }


def _sections(pairs: int) -> list[int]:
    """How many pairs turn by time, height and width; for text the three are the same."""
    third = pairs // 3
    return [pairs - 2 * third, third, third]


def _write_sparse(config: Config) -> Fields:
    if not config.get("norm_topk_prob", True):
        raise UnsupportedModel("llama.cpp runs this family only with norm_topk_prob")
    return _write(config) | qwen_moe.write_experts(config)


_DELTA = {
    f"{_AT}.in_proj_qkv": "attn_qkv",
    f"{_AT}.in_proj_z": "attn_gate",
    f"{_AT}.in_proj_b": "ssm_beta",
    f"{_AT}.in_proj_a": "ssm_alpha",
    f"{_AT}.conv1d": "ssm_conv1d",
    f"{_AT}.A_log": "ssm_a",
    f"{_AT}.dt_bias": "ssm_dt.bias",
    f"{_AT}.norm": "ssm_norm",
    f"{_AT}.out_proj": "ssm_out",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "post_attention_norm",
}
_SPARSE_NAMES = {**qwen_moe.NAMES, **_DELTA}
_DEFAULTS = MappingProxyType({"decoder_sparse_step": 1, "mlp_only_layers": []})

FAMILIES: Mapping[str, Family] = MappingProxyType({
    "qwen3_next": Family(
        architecture="qwen3next",
        class_name="Qwen3NextForCausalLM",
        block=_block,
        names=_SPARSE_NAMES,
        read=_read_sparse,
        write=_write_sparse,
        sanitize=_sanitize,
        change=_change_of_next,
        older=_older_next,
        defaults=_DEFAULTS,
        exported_as="qwen3_5_moe_text",
        mlx_type="qwen3_5_moe",
    ),
    "qwen3_5_text": Family(
        architecture="qwen35",
        class_name="Qwen3_5ForCausalLM",
        block=_block,
        names={**ATTENTION, **DENSE, **_DELTA},
        read=_read_dense,
        write=_write,
        sanitize=_sanitize,
        change=_change,
        mlx_type="qwen3_5",
    ),
    "qwen3_5_moe_text": Family(
        architecture="qwen35moe",
        class_name="Qwen3_5MoeForCausalLM",
        block=_block,
        names=_SPARSE_NAMES,
        read=_read_sparse,
        write=_write_sparse,
        sanitize=_sanitize,
        change=_change,
        defaults=_DEFAULTS,
        mlx_type="qwen3_5_moe",
    ),
})  # fmt: skip
