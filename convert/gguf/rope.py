"""What a GGUF file says of rotary embeddings, as transformers 5 writes it (``rope_parameters``).

GGUF keeps Llama 3's scaling as a tensor of its effect, ``rope_freqs.weight``: one divisor a
frequency. The parameters are found again where round ones give that tensor; else the tensor itself
is kept, under its own name.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from rl_mlx.convert.gguf.blocks import block
from rl_mlx.convert.gguf.reader import GGUFFile
from rl_mlx.errors import FormatError, UnsupportedModel

FREQS = "rope_freqs.weight"
_LONG, _SHORT = "rope_factors_long.weight", "rope_factors_short.weight"
LONGROPE = (_LONG, _SHORT)
"""Tensors of what LongRoPE's config says."""


def short(value: float) -> float:
    """The shortest decimal that is the same float32: what the model's config said before."""
    return float(str(np.float32(value))) if float(np.float32(value)) == value else value


def rope_parameters(
    file: GGUFFile, arch: str, head_dim: int, base: float = 10000.0
) -> dict[str, Any]:
    """The rope settings of the model (of its full-attention layers).

    Raises ``FormatError`` for values that cannot be and ``UnsupportedModel`` for a kind of scaling
    that is not known.
    """
    theta = short(file.float(f"{arch}.rope.freq_base", base))
    dims = file.int(f"{arch}.rope.dimension_count", head_dim)
    if not (math.isfinite(theta) and theta > 0 and 0 < dims <= head_dim and dims % 2 == 0):
        raise FormatError(
            f"{file.paths[0]}: rope over {dims} of {head_dim} with base {theta} cannot be"
        )
    parameters: dict[str, Any] = {"rope_type": "default", "rope_theta": theta}
    if dims != head_dim:
        parameters["partial_rotary_factor"] = _fraction(dims, head_dim)
    if _LONG in file.tensors or _SHORT in file.tensors:
        return parameters | _longrope(file, arch, dims)
    scaling = _scaling(file, arch)
    if FREQS not in file.tensors:
        return parameters | scaling
    if scaling:
        raise UnsupportedModel(
            f"{file.paths[0]}: rope scaled by {scaling['rope_type']!r} and by {FREQS!r} at once is "
            "not supported on MLX; try --backend llama.cpp"
        )
    return parameters | (llama3(factors(file, FREQS, dims), theta) or {})


def factors(file: GGUFFile, name: str, dims: int) -> npt.NDArray[np.float32]:
    """The tensor ``name`` of ``dims / 2`` factors, float32; ``FormatError`` where it is none."""
    info = file.tensors.get(name)
    if info is None or info.shape != (dims // 2,):
        found = "missing" if info is None else f"{list(info.shape)}"
        raise FormatError(f"{file.paths[0]}: tensor {name!r} must be [{dims // 2}], but is {found}")
    values = block(info.type).decode(file.raw(name))
    if not (np.isfinite(values) & (values > 0)).all():
        raise FormatError(f"{file.paths[0]}: tensor {name!r} holds factors that cannot be")
    return values


def llama3(divisors: npt.NDArray[np.float32], base: float) -> dict[str, Any] | None:
    """Llama 3's parameters whose effect ``divisors`` are, or None where no round ones fit.

    A frequency that turns ``t`` times in the original context is divided by
    ``1 / ((1 - s) / factor + s)`` with ``s = (t - low) / (high - low)``, clipped to 0..1. Only the
    ratios of low, high and context show in the effect; low is 1 in every model there is.
    """
    found = divisors.astype(np.float64)
    factor = float(found.max())
    if factor <= 1:
        return None
    turns = base ** (-np.arange(found.size) / found.size) / (
        2 * math.pi
    )  # in a context of one token
    blend = (1 / found - 1 / factor) / (1 - 1 / factor)
    inner = (blend > 1e-4) & (blend < 1 - 1e-4)
    high, original = 4.0, 8192.0
    if inner.sum() > 1:
        slope, offset = np.polyfit(turns[inner], blend[inner], 1)
        if offset >= 0:
            return None
        high, original = 1 - 1 / offset, -slope / offset
    elif inner.any():
        original = float((blend[inner][0] * (high - 1) + 1) / turns[inner][0])
    high, original = round(high, 3), round(original)
    smooth = np.clip((original * turns - 1) / (high - 1), 0, 1)
    made = 1 / ((1 - smooth) / factor + smooth)
    if not np.allclose(made, found, rtol=1e-5, atol=0):
        return None
    return {
        "rope_type": "llama3",
        "factor": short(factor),
        "low_freq_factor": 1.0,
        "high_freq_factor": float(high),
        "original_max_position_embeddings": original,
    }


def _fraction(part: int, whole: int) -> float:
    """``part / whole``, such that ``int(whole * it)`` is ``part`` again."""
    fraction = part / whole
    return fraction if int(whole * fraction) == part else math.nextafter(fraction, 1)


def _scaling(file: GGUFFile, arch: str) -> dict[str, Any]:
    at = f"{arch}.rope.scaling."
    factor = short(file.float(f"{at}factor", file.float(f"{arch}.rope.scale_linear", 0.0)))
    kind = file.str(f"{at}type", "linear")
    if kind == "none" or (kind in {"linear", "longrope"} and factor in {0.0, 1.0}):
        return {}
    if not (math.isfinite(factor) and factor > 0):
        raise FormatError(f"{file.paths[0]}: rope scaling by {factor} cannot be")
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    if kind != "yarn" or short(file.float(f"{at}yarn_ext_factor", 1.0)) not in {1.0, -1.0}:
        raise UnsupportedModel(
            f"{file.paths[0]}: rope scaling {kind!r} of this kind is not supported; "
            "try --backend llama.cpp"
        )
    return _yarn(file, arch, factor)


def _yarn(file: GGUFFile, arch: str, factor: float) -> dict[str, Any]:
    """YaRN (Peng et al. 2023), as transformers has it, out of whose config these keys were written.

    llama.cpp passes over the betas and ``yarn_attn_factor`` of most architectures, and has a factor
    of its own, ``attn_factor``, on top of YaRN's magnitude.
    """
    at = f"{arch}.rope.scaling."
    context = file.int(f"{arch}.context_length", 0)
    yarn: dict[str, Any] = {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": file.int(f"{at}original_context_length", context),
        "beta_fast": short(file.float(f"{at}yarn_beta_fast", 32.0)),
        "beta_slow": short(file.float(f"{at}yarn_beta_slow", 1.0)),
    }
    if yarn["original_max_position_embeddings"] <= 0:
        raise FormatError(f"{file.paths[0]}: YaRN lacks its original context length")
    if f"{at}yarn_attn_factor" in file.metadata:
        yarn["attention_factor"] = short(file.float(f"{at}yarn_attn_factor"))
    elif f"{at}attn_factor" in file.metadata:
        magnitude = 0.1 * math.log(factor) + 1 if factor > 1 else 1.0
        yarn["attention_factor"] = magnitude * short(file.float(f"{at}attn_factor"))
    elif file.float(f"{at}yarn_log_multiplier", 0.0):
        yarn["mscale"] = 1.0
        yarn["mscale_all_dim"] = short(file.float(f"{at}yarn_log_multiplier"))
    return yarn


def _longrope(file: GGUFFile, arch: str, dims: int) -> dict[str, Any]:
    at = f"{arch}.rope.scaling."
    context = file.int(f"{arch}.context_length", 0)
    original = file.int(f"{at}original_context_length", context)
    if original <= 1:
        raise FormatError(f"{file.paths[0]}: LongRoPE lacks its original context length")
    long: dict[str, Any] = {
        "rope_type": "longrope",
        "long_factor": [short(float(f)) for f in factors(file, _LONG, dims)],
        "short_factor": [short(float(f)) for f in factors(file, _SHORT, dims)],
        "original_max_position_embeddings": original,
    }
    if f"{at}attn_factor" in file.metadata:
        long["attention_factor"] = short(file.float(f"{at}attn_factor"))
    return long
