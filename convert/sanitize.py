"""From Hugging Face names and layouts to the canonical ones, without reading a tensor.

Experts that lie one by one are stacked, fused gate and up projections are split, gpt-oss' MXFP4
blocks become MLX's words. What is canonical already (an MLX folder) stays as it is.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from rl_mlx.convert.experts import split_experts, stacked
from rl_mlx.convert.families import FAMILIES
from rl_mlx.convert.lazy import Arrays, Lazy
from rl_mlx.errors import FormatError


def sanitize(config: Mapping[str, Any], arrays: Mapping[str, Lazy]) -> Arrays:
    """Canonical names for ``arrays``, for a family that ``layout.knows``.

    Raises ``FormatError`` where experts are missing or differ.
    """
    found = dict(arrays)
    if not any(
        name.startswith("model.") for name in found
    ):  # a bare decoder, as of embedding models
        found = {
            name if name.startswith("lm_head.") else f"model.{name}": a for name, a in found.items()
        }
    tied = bool(config.get("tie_word_embeddings"))
    found = {n: a for n, a in found.items() if not _is_derived(n) and not (tied and _is_head(n))}
    family = config["model_type"]
    if family in FAMILIES:
        return FAMILIES[family].sanitize(config, found)
    if family in {"mixtral", "qwen3_moe"}:
        parent = "block_sparse_moe" if family == "mixtral" else "mlp"
        return stacked(split_experts(found, parent), parent)
    if family == "gpt_oss":
        return _gpt_oss(found)
    if family == "lfm2":
        return {n: _conv(a) if n.endswith("conv.conv.weight") else a for n, a in found.items()}
    return found


def _is_derived(name: str) -> bool:
    return name.endswith(("rotary_emb.inv_freq", "rotary_emb.cos_cached", "rotary_emb.sin_cached"))


def _is_head(name: str) -> bool:
    return name.startswith("lm_head.")


_GPT_OSS = re.compile(
    r"(model\.layers\.\d+\.mlp\.experts)\.(gate_up_proj|down_proj)(_blocks|_scales|_bias|)"
)
_SUFFIXES = {"_blocks": "weight", "_scales": "scales", "_bias": "bias", "": "weight"}


def _gpt_oss(arrays: Arrays) -> Arrays:
    """Even rows of ``gate_up_proj`` are the gate's, odd ones up's; plain ones are columns."""
    split: Arrays = {}
    for name, array in arrays.items():
        match = _GPT_OSS.fullmatch(name)
        if not match:
            split[name] = array
            continue
        at, module, kind = match.groups()
        suffix = _SUFFIXES[kind]
        if kind == "_blocks":
            array = _words(name, array)
        elif not kind:
            array = array.transposed()
        if module == "down_proj":
            split[f"{at}.down_proj.{suffix}"] = array
            continue
        axis = -1 if kind == "_bias" else -2
        split[f"{at}.gate_proj.{suffix}"] = array.cut(axis, 0, None, 2)
        split[f"{at}.up_proj.{suffix}"] = array.cut(axis, 1, None, 2)
    return split


def _words(name: str, blocks: Lazy) -> Lazy:
    """Blocks of 16 bytes, ``[..., blocks, 16]``, as rows of uint32: MLX's own nibble order."""
    *lead, count, octets = blocks.shape
    if blocks.dtype != "U8" or octets != 16:
        raise FormatError(f"tensor {name!r} must hold blocks of 16 bytes, not {blocks.shape[-1]}")
    return blocks.seen(
        (*lead, count * 4), lambda a: a.reshape(*lead, count * 16).view("<u4"), "U32"
    )


def _conv(kernel: Lazy) -> Lazy:
    """A depthwise kernel ``[channels, 1, taps]`` as MLX has it, ``[channels, taps, 1]``."""
    return kernel.transposed() if len(kernel.shape) == 3 and kernel.shape[1] == 1 else kernel
