"""Rotary position embedding: what a configuration asks for, and the module that does it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import mlx.core as mx

from rl_mlx.errors import UnsupportedModel
from rl_mlx.model.plan import RopePlan

Offset = int | mx.array


def rope_parameters(config: Mapping[str, Any], layer_type: str | None = None) -> dict[str, Any]:
    """The rope settings as transformers 5 writes them, whichever version wrote ``config``.

    ``layer_type`` selects among settings kept by layer type (``full_attention``,
    ``sliding_attention``).
    """
    parameters = config.get("rope_parameters") or {}
    if layer_type is not None and isinstance(parameters.get(layer_type), Mapping):
        parameters = parameters[layer_type]
    merged = {"rope_theta": config.get("rope_theta", 10000.0)}
    merged.update(config.get("rope_scaling") or {})
    merged.update(parameters)
    merged["rope_type"] = merged.get("rope_type") or merged.get("type") or "default"
    return merged


def rope_plan(
    config: Mapping[str, Any], head_dim: int, context: int, layer_type: str | None = None
) -> RopePlan:
    """The plan of a layer's rotary embedding, for sequences of up to ``context`` tokens.

    Raises ``UnsupportedModel`` for a scaling that is not known here.
    """
    p = rope_parameters(config, layer_type)
    partial = p.get("partial_rotary_factor", config.get("partial_rotary_factor")) or 1.0
    dims = int(head_dim * partial)
    base = float(p["rope_theta"])
    kind = p["rope_type"]
    if kind in {"default", "mrope"}:
        return RopePlan(dims=dims, base=base)
    if kind == "linear":
        return RopePlan(dims=dims, base=base, scale=1 / float(p["factor"]))
    if kind == "llama3":
        return RopePlan(dims=dims, base=base, periods=_llama3(p, base, dims))
    if kind == "yarn":
        original = p.get("original_max_position_embeddings") or config["max_position_embeddings"]
        return _yarn(p, base, dims, float(original))
    if kind in {"longrope", "su"}:
        return _longrope(p, config, base, dims, context)
    raise UnsupportedModel(
        f"rope scaling {kind!r} is not supported by the MLX backend; try --backend llama.cpp"
    )


def _geometric(base: float, dims: int) -> list[float]:
    return [base ** (i / dims) for i in range(0, dims, 2)]


def _llama3(p: Mapping[str, Any], base: float, dims: int) -> tuple[float, ...]:
    """Llama 3.1: long wavelengths are stretched by ``factor``, short ones kept, those between
    blended.
    """
    factor = float(p["factor"])
    low, high = float(p.get("low_freq_factor", 1.0)), float(p.get("high_freq_factor", 4.0))
    original = float(p.get("original_max_position_embeddings", 8192))
    periods = []
    for period in _geometric(base, dims):
        turns = original / (
            2 * math.pi * period
        )  # how often this pair turns in the original context
        smooth = min(max((turns - low) / (high - low), 0.0), 1.0)
        periods.append(period / ((1 - smooth) / factor + smooth))
    return tuple(periods)


def _yarn(p: Mapping[str, Any], base: float, dims: int, original: float) -> RopePlan:
    """YaRN (Peng et al. 2023), with the defaults of transformers."""
    factor = float(p["factor"])

    def correction(turns: float) -> float:
        return dims * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(base))

    def magnitude(scale: float, weight: float) -> float:
        return 1.0 if scale <= 1 else 0.1 * weight * math.log(scale) + 1.0

    low = correction(float(p.get("beta_fast") or 32))
    high = correction(float(p.get("beta_slow") or 1))
    if p.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dims - 1)
    if low == high:
        high += 0.001
    periods = []
    for i, period in enumerate(_geometric(base, dims)):
        stretched = min(max((i - low) / (high - low), 0.0), 1.0)
        periods.append(1 / ((1 - stretched) / period + stretched / (factor * period)))
    given = p.get("attention_factor")
    if given is None and p.get("mscale") and p.get("mscale_all_dim"):
        given = magnitude(factor, p["mscale"]) / magnitude(factor, p["mscale_all_dim"])
    return RopePlan(
        dims=dims,
        base=base,
        periods=tuple(periods),
        magnitude=magnitude(factor, 1.0) if given is None else float(given),
    )


def _longrope(
    p: Mapping[str, Any], config: Mapping[str, Any], base: float, dims: int, context: int
) -> RopePlan:
    """LongRoPE (Ding et al. 2024): one factor a pair; the long list only where the context needs
    it.
    """
    longest = int(config["max_position_embeddings"])
    original = int(
        p.get("original_max_position_embeddings")
        or config.get("original_max_position_embeddings")
        or longest
    )
    factors = p["long_factor" if context > original else "short_factor"]
    ratio = float(p.get("factor") or longest / original)
    magnitude = p.get("attention_factor")
    if magnitude is None:
        magnitude = 1.0 if ratio <= 1 else math.sqrt(1 + math.log(ratio) / math.log(original))
    periods = tuple(f * period for f, period in zip(factors, _geometric(base, dims)))
    return RopePlan(dims=dims, base=base, periods=periods, magnitude=float(magnitude))


class Rope:
    """Rotates ``[B, heads, S, head_dim]`` by the positions ``offset + 0 .. S - 1`` (an offset a
    row, or one).
    """

    def __init__(self, plan: RopePlan, factors: mx.array | None = None) -> None:
        """``factors`` divide the base frequencies (``rope_freqs.weight`` of a GGUF file)."""
        self._plan = plan
        self._periods = None
        if plan.periods is not None:
            self._periods = mx.array(plan.periods, mx.float32)
        elif factors is not None:
            geometric = mx.array(_geometric(plan.base, plan.dims), mx.float32)
            self._periods = geometric * factors.astype(mx.float32)
        if self._periods is not None:
            mx.eval(self._periods)

    def __call__(self, x: mx.array, offset: Offset) -> mx.array:
        """The rotated array, of the same shape and type."""
        p = self._plan
        if p.magnitude != 1.0:
            rotated = x[..., : p.dims] * p.magnitude
            x = (
                mx.concatenate([rotated, x[..., p.dims :]], axis=-1)
                if p.dims < x.shape[-1]
                else rotated
            )
        return mx.fast.rope(
            x,
            p.dims,
            traditional=p.interleaved,
            base=p.base if self._periods is None else None,
            scale=p.scale,
            offset=offset,
            freqs=self._periods,
        )
