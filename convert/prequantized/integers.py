"""GPTQ, AWQ and compressed-tensors' integers into MLX's affine containers.

GPTQ: Frantar et al. 2022, layout of AutoGPTQ and GPTQModel; AWQ: Lin et al. 2023, layout ``gemm``
of AutoAWQ; compressed-tensors: ``compressors`` of neuralmagic/compressed-tensors.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from rl_mlx.convert.bits import WIDTHS, pack, unpack
from rl_mlx.convert.lazy import Arrays
from rl_mlx.convert.prequantized.parts import (
    F32,
    FLOATS,
    U8,
    Module,
    affine,
    dense,
    group_of,
    others,
)
from rl_mlx.errors import FormatError

Words = npt.NDArray[np.uint32]
_GPTQ_BITS = (2, 3, 4, 8)
# Which of eight columns each nibble of a word is, the lowest first.
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def gptq(module: Module) -> Arrays:
    """``qweight`` [in * bits / 32, out] is MLX's words, transposed.

    ``qzeros`` [groups, out * bits / 32] lack 1 in the first version of the format. With act-order a
    column's group is any: where the columns of a group lie apart (``g_idx``) the weights come as
    plain floats of the scales' type, which rounds them by 2 ** -11 (float16) at most.
    """
    bits, version = module.settings.get("bits"), module.settings.get("checkpoint_format", "gptq")
    if module.settings.get("is_marlin_format"):
        version = "marlin"
    if bits not in _GPTQ_BITS or version not in {"gptq", "gptq_v2"}:
        raise module.unsupported(f"GPTQ of {bits} bits, {version}")
    packed, scales = module["qweight"], module["scales"]
    groups, out = scales.shape
    columns = packed.shape[0] * 32 // bits
    if out % 32 or columns % 32:
        raise module.unsupported(f"{out} rows of {columns} weights")
    module.expect("qweight", columns * bits // 32, out)
    module.expect("qzeros", groups, out * bits // 32)
    size = _group_size(module, columns, groups)
    offset = np.uint8(version == "gptq")

    def words(start: int, stop: int) -> Words:
        return np.ascontiguousarray(packed.read()[:, start:stop].T).view(np.uint32)

    def scale() -> F32:
        return np.ascontiguousarray(module.floats("scales").T)

    def zero() -> U8:
        zeros = unpack(module["qzeros"].read().view(np.uint32), bits)
        return ((zeros + offset) & np.uint8((1 << bits) - 1)).T

    rest = others(module, "qweight", "qzeros", "scales", "g_idx")
    places = _places(module, columns, size, "g_idx")
    group = group_of(size, columns)
    if places is None and group is not None:
        return affine(module, (out, columns), bits, group, words, scale, zero) | rest
    return _scattered(module, (out, columns), bits, words, scale, zero, places, size) | rest


def awq(module: Module) -> Arrays:
    """``qweight`` [in, out / 8]: nibbles of eight columns, interleaved; zeros as they are."""
    version = str(module.settings.get("version", "gemm")).lower()
    if module.settings.get("bits", 4) != 4 or version != "gemm":
        raise module.unsupported(f"AWQ of {module.settings.get('bits')} bits, {version}")
    packed, scales = module["qweight"], module["scales"]
    groups, out = scales.shape
    columns = packed.shape[0]
    if out % 8 or columns % 32:
        raise module.unsupported(f"{out} rows of {columns} weights")
    module.expect("qweight", columns, out // 8)
    module.expect("qzeros", groups, out // 8)
    size = _group_size(module, columns, groups)
    group = group_of(size, columns)

    def words(start: int, stop: int) -> Words:
        first, last = start // 8, -(-stop // 8)
        codes = _awq_codes(packed.read()[:, first:last])
        return pack(np.ascontiguousarray(codes[:, start - 8 * first : stop - 8 * first].T), 4)

    def scale() -> F32:
        return np.ascontiguousarray(module.floats("scales").T)

    def zero() -> U8:
        return _awq_codes(module["qzeros"].read()).T

    rest = others(module, "qweight", "qzeros", "scales")
    if group is not None:
        return affine(module, (out, columns), 4, group, words, scale, zero) | rest
    return _scattered(module, (out, columns), 4, words, scale, zero, None, size) | rest


def _awq_codes(words: npt.NDArray[Any]) -> U8:
    """Codes [rows, n * 8] of int32 [rows, n]."""
    wide = np.ascontiguousarray(words).view(np.uint32)[..., None]
    codes = np.empty((*words.shape, 8), np.uint8)
    codes[..., _AWQ_ORDER] = (wide >> np.arange(0, 32, 4, dtype=np.uint32)) & np.uint32(15)
    return codes.reshape(len(words), -1)


def packed_integers(module: Module) -> Arrays:
    """compressed-tensors' ``pack-quantized``: MLX's words as they are, the middle code for zero.

    ``weight_zero_point``, packed along the rows, moves it.
    """
    packed, scales = module["weight_packed"], module["weight_scale"]
    out = packed.shape[0]
    columns = int(module["weight_shape"].read()[1])
    bits, padding = divmod(packed.shape[1] * 32, max(columns, 1))
    if bits not in WIDTHS or padding or columns % 32 or len(scales.shape) != 2:
        raise module.unsupported(f"packed integers of {bits} bits, {columns} in a row")
    groups = scales.shape[1]
    module.expect("weight_packed", out, columns * bits // 32)
    module.expect("weight_scale", out, groups)
    size = _group_size(module, columns, groups)
    point = module.get("weight_zero_point")
    if point is not None and point.dtype == "I32":
        if out % 32:
            raise module.unsupported(f"packed zero points of {out} rows")
        module.expect("weight_zero_point", out * bits // 32, groups)

    def words(start: int, stop: int) -> Words:
        return np.ascontiguousarray(packed.read()[start:stop]).view(np.uint32)

    def zero() -> npt.NDArray[Any]:
        if point is None:
            return np.full((1, 1), 1 << (bits - 1), np.int16)
        if point.dtype == "I32":
            return unpack(np.ascontiguousarray(point.read().T).view(np.uint32), bits).T
        return point.read().astype(np.int16) + np.int16(1 << (bits - 1))

    def scale() -> F32:
        return module.floats("weight_scale")

    used = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx")
    rest = others(module, *used)
    places = _places(module, columns, size, "weight_g_idx")
    group = group_of(size, columns)
    if places is None and group is not None:
        return affine(module, (out, columns), bits, group, words, scale, zero) | rest
    return _scattered(module, (out, columns), bits, words, scale, zero, places, size) | rest


def whole_integers(module: Module) -> Arrays:
    """compressed-tensors' ``int-quantized``: int8 [out, in], which 128 more makes codes."""
    weight, scales = module["weight"], module["weight_scale"]
    out, columns = weight.shape
    groups = scales.shape[1] if len(scales.shape) == 2 else 1
    size = _group_size(module, columns, groups)
    group = group_of(size, columns)
    point = module.get("weight_zero_point")

    def words(start: int, stop: int) -> Words:
        codes = weight.read()[start:stop].view(np.uint8) ^ np.uint8(128)
        return np.ascontiguousarray(codes).view(np.uint32)

    def zero() -> npt.NDArray[Any]:
        if point is None:
            return np.full((1, 1), 128, np.int16)
        return point.read().astype(np.int16).reshape(-1, groups) + np.int16(128)

    def scale() -> F32:
        return module.floats("weight_scale").reshape(-1, groups)

    rest = others(module, "weight", "weight_scale", "weight_zero_point")
    if group is not None:
        return affine(module, (out, columns), 8, group, words, scale, zero) | rest
    raise module.unsupported(f"rows of {columns} weights")


def _group_size(module: Module, columns: int, groups: int) -> int:
    if groups < 1 or columns % groups:
        raise FormatError(f"{module.name!r}: {columns} columns are not {groups} equal groups")
    return columns // groups


def _places(module: Module, columns: int, size: int, part: str) -> npt.NDArray[np.int32] | None:
    """The group of each column; None where groups lie one after the other."""
    found = module.get(part)
    if found is None:
        return None
    module.expect(part, columns)
    places = found.read()
    if (places < 0).all() or (places == np.arange(columns) // size).all():
        return None
    if places.min() < 0 or places.max() >= columns // size:
        raise FormatError(f"tensor '{module.name}.{part}' names groups that are not there")
    return places.astype(np.int32)


def _scattered(
    module: Module,
    shape: tuple[int, int],
    bits: int,
    words: Any,
    scale: Any,
    zero: Any,
    places: npt.NDArray[np.int32] | None,
    size: int,
) -> Arrays:
    """Plain floats of a module whose groups are none of MLX's."""
    out, columns = shape
    at = np.arange(columns) // size if places is None else places
    dtype = FLOATS[module["scales" if "scales" in module.parts else "weight_scale"].dtype]

    def values(start: int, stop: int) -> F32:
        factors, zeros = np.broadcast_arrays(scale(), zero())
        factors, zeros = (
            np.broadcast_to(x, (out, x.shape[1]))[start:stop, at] for x in (factors, zeros)
        )
        codes = unpack(words(start, stop), bits).astype(np.float32)
        found: F32 = (codes - zeros.astype(np.float32)) * factors
        return found

    return dense(module, shape, values, dtype)
