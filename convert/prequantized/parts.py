"""What a quantized module of a folder becomes: arrays under MLX's names, made when read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from rl_mlx.convert.floats import DTYPES, narrow, widen
from rl_mlx.convert.lazy import Array, Arrays, Lazy
from rl_mlx.convert.weights import FloatType
from rl_mlx.errors import FormatError, UnsupportedModel

F32 = npt.NDArray[np.float32]
U8 = npt.NDArray[np.uint8]
Rows = Callable[[int, int], npt.NDArray[Any]]
"""Rows ``start`` to ``stop`` of a matrix ``[out, in]``."""
GROUPS = (128, 64, 32)
FLOATS: Mapping[str, FloatType] = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_NAMES: Mapping[FloatType, str] = {dtype: name for name, dtype in FLOATS.items()}


@dataclass(frozen=True)
class Module:
    """The arrays of one module by the last part of their names, and what the folder says of it.

    ``dtype`` is that of the model's plain floats; ``settings`` is ``quantization_config``.
    """

    name: str
    parts: Mapping[str, Lazy]
    settings: Mapping[str, Any]
    dtype: FloatType

    def __getitem__(self, part: str) -> Lazy:
        """The array of a part; ``FormatError`` where it is missing."""
        if part not in self.parts:
            raise FormatError(f"tensor '{self.name}.{part}' is missing; download the model again")
        return self.parts[part]

    def get(self, part: str) -> Lazy | None:
        """The array of a part, where there is one."""
        return self.parts.get(part)

    def expect(self, part: str, *shape: int) -> Lazy:
        """The array of a part; ``FormatError`` where its shape is another."""
        found = self[part]
        if found.shape != shape:
            raise FormatError(
                f"tensor '{self.name}.{part}' must be {list(shape)} by the others of its module, "
                f"but is {list(found.shape)}"
            )
        return found

    def floats(self, part: str) -> F32:
        """An array of plain floats, as float32."""
        found = self[part]
        if found.dtype not in FLOATS:
            raise self.unsupported(f"{part} is {found.dtype}")
        return widen(found.read(), FLOATS[found.dtype])

    def unsupported(self, what: str) -> UnsupportedModel:
        """The error for a form that is not read."""
        return UnsupportedModel(
            f"{self.name!r} is quantized in a form that is not supported ({what}); "
            "use an unquantized, MLX or GGUF version of the model"
        )


def group_of(size: int, columns: int) -> int | None:
    """The largest group of MLX that groups of ``size`` are whole ones of, None where there is none.

    ``size`` below 1 is a whole row.
    """
    size = columns if size < 1 else size
    return next((g for g in GROUPS if size % g == 0 and columns % g == 0), None)


def affine(
    module: Module,
    shape: tuple[int, int],
    bits: int,
    group: int,
    words: Rows,
    scale: Callable[[], F32],
    zero: Callable[[], npt.NDArray[Any]],
) -> Arrays:
    """A module of MLX's affine mode: ``scale * (q - zero)``.

    ``words`` are uint32 ``[rows, in * bits / 32]``; ``scale`` and ``zero`` give ``[out, n]`` or
    ``[1, n]``, a number for each ``in / n`` columns. ``group`` is MLX's.
    """
    out, columns = shape
    groups = columns // group

    def spread(values: npt.NDArray[Any]) -> F32:
        wide = np.repeat(values, groups // values.shape[-1], axis=-1)
        return np.ascontiguousarray(np.broadcast_to(wide, (out, groups)), np.float32)

    def biases() -> F32:
        factors, zeros = np.broadcast_arrays(scale(), zero())
        return spread(factors * -zeros.astype(np.float32))

    packed = (out, columns * bits // 32)
    return {
        f"{module.name}.weight": Lazy(packed, "U32", lambda: words(0, out), take=words),
        f"{module.name}.scales": Lazy((out, groups), "F32", lambda: spread(scale())),
        f"{module.name}.biases": Lazy((out, groups), "F32", biases),
    }


def dense(module: Module, shape: tuple[int, int], values: Rows, dtype: FloatType) -> Arrays:
    """A module of plain floats: ``values`` gives float32 rows, rounded to ``dtype``."""

    def take(start: int, stop: int) -> Array:
        with np.errstate(over="ignore"):
            return narrow(values(start, stop), dtype)

    array = Lazy(shape, _NAMES[dtype], lambda: take(0, shape[0]), take=take)
    return {f"{module.name}.weight": array}


def others(module: Module, *used: str) -> Arrays:
    """The arrays of a module that are no part of its quantized matrix: its bias, say."""
    kept = module.parts.keys() - set(used) - _ACTIVATIONS
    return {f"{module.name}.{part}": module.parts[part] for part in kept}


# Scales for quantized activations and KV caches, which are not needed here.
_ACTIVATIONS = {
    "input_scale", "input_global_scale", "input_zero_point", "activation_scale",
    "activation_scale_inv", "output_scale", "k_scale", "v_scale", "q_scale", "kv_scale",
}  # fmt: skip


def float_type(config: Mapping[str, Any]) -> FloatType:
    """The type of a model's plain floats, bfloat16 where its config is silent."""
    found = str(config.get("torch_dtype") or config.get("dtype")).removeprefix("torch.")
    return next((dtype for dtype in DTYPES if found == dtype), "bfloat16")
