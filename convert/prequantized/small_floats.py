"""FP8 and FP4 weights: MLX's block-float modes where those are the same, else plain floats.

FP8 E4M3 under a scale a tensor, a row or a block of 128 x 128 (DeepSeek-V3's report) has no
container in MLX, nor has NVFP4 under a second scale a tensor. They are multiplied out in float32
and rounded to the type of the model's floats: by 2 ** -9 of a weight at most in bfloat16, where the
formats themselves err by 2 ** -4 and more.
"""

from __future__ import annotations

import math

import numpy as np

from rl_mlx.convert.bits import unpack
from rl_mlx.convert.lazy import Arrays, Lazy
from rl_mlx.convert.prequantized.parts import F32, U8, Module, dense, others
from rl_mlx.convert.quantize import levels
from rl_mlx.errors import FormatError

_GROUP = 16


def fp8(module: Module) -> Arrays:
    """``weight`` float8 [out, in] times ``weight_scale`` or ``weight_scale_inv``."""
    weight = module["weight"]
    if len(weight.shape) != 2:
        raise module.unsupported(f"float8 of shape {list(weight.shape)}")
    out, columns = weight.shape
    name = "weight_scale_inv" if "weight_scale_inv" in module.parts else "weight_scale"
    scale = module[name]
    tall, wide = _tile(module, weight, scale, name)

    def values(start: int, stop: int) -> F32:
        factors = module.floats(name).reshape(-(-out // tall), -(-columns // wide))
        rows = np.arange(start, stop) // tall
        found: F32 = levels("mxfp8")[weight.read()[start:stop]]
        found *= np.repeat(factors[rows], wide, axis=1)[:, :columns]
        return found

    rest = others(module, "weight", name)
    return dense(module, (out, columns), values, module.dtype) | rest


def _tile(module: Module, weight: Lazy, scale: Lazy, name: str) -> tuple[int, int]:
    """Rows and columns under one scale."""
    out, columns = weight.shape
    shape = scale.shape
    if math.prod(shape) == 1:
        return out, columns
    if shape in {(out,), (out, 1)}:
        return 1, columns
    tile = module.settings.get("weight_block_size") or _block_structure(module) or (128, 128)
    tall, wide = int(tile[0]), int(tile[1])
    if min(tall, wide) < 1 or shape != (-(-out // tall), -(-columns // wide)):
        raise FormatError(
            f"tensor '{module.name}.{name}' of shape {list(shape)} does not scale blocks of "
            f"{tall} x {wide} of {list(weight.shape)}"
        )
    return tall, wide


def _block_structure(module: Module) -> list[int] | None:
    """The block of compressed-tensors' scheme, which all its groups share."""
    for group in (module.settings.get("config_groups") or {}).values():
        found = (group.get("weights") or {}).get("block_structure")
        if found:
            return [int(n) for n in found]
    return None


def nvfp4(module: Module) -> Arrays:
    """NVFP4 of modelopt (``weight``) or compressed-tensors (``weight_packed``).

    It is uint8 [out, in / 2], the first of two weights in the low nibble. modelopt's second scale
    multiplies, that of compressed-tensors divides. Where it is 1, or there is none, it is MLX's
    mode as it is.
    """
    part = "weight_packed" if "weight_packed" in module.parts else "weight"
    second = "weight_global_scale" if part == "weight_packed" else "weight_scale_2"
    packed, out, columns = module[part], module[part].shape[0], 2 * module[part].shape[-1]
    if len(packed.shape) != 2 or columns % 32:
        raise module.unsupported(f"NVFP4 of shape {list(packed.shape)}")
    scales = module.expect("weight_scale", out, columns // _GROUP)
    rest = others(module, part, second, "weight_scale")
    whole = 1.0
    if second in module.parts:
        whole = float(module.floats(second).reshape(-1)[0])
        if not (math.isfinite(whole) and whole > 0):
            raise FormatError(f"tensor '{module.name}.{second}' cannot be {whole}")
    if whole == 1.0:
        return _block_float(module, packed, scales) | rest
    factor = np.float32(whole) if part == "weight" else np.float32(1) / np.float32(whole)

    def values(start: int, stop: int) -> F32:
        rows = np.ascontiguousarray(packed.read()[start:stop]).view(np.uint32)
        numbers = levels("nvfp4")[unpack(rows, 4)].reshape(stop - start, -1, _GROUP)
        numbers *= (levels("mxfp8")[scales.read()[start:stop]] * factor)[..., None]
        return numbers.reshape(stop - start, columns)

    return dense(module, (out, columns), values, module.dtype) | rest


def mxfp4(module: Module) -> Arrays:
    """compressed-tensors' MXFP4: uint8 [out, in / 2], a power of two for each 32, as in MLX."""
    packed = module["weight_packed"]
    out, columns = packed.shape[0], 2 * packed.shape[-1]
    if len(packed.shape) != 2 or columns % 32:
        raise module.unsupported(f"MXFP4 of shape {list(packed.shape)}")
    scales = module.expect("weight_scale", out, columns // 32)
    return _block_float(module, packed, scales) | others(module, "weight_packed", "weight_scale")


def _block_float(module: Module, packed: Lazy, scales: Lazy) -> Arrays:
    out, octets = packed.shape

    def words(start: int, stop: int) -> U8:
        return np.ascontiguousarray(packed.read()[start:stop]).view(np.uint32)

    return {
        f"{module.name}.weight": Lazy((out, octets // 4), "U32", lambda: words(0, out), take=words),
        f"{module.name}.scales": Lazy(scales.shape, "U8", scales.read),
    }
