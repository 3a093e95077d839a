"""Experts of a Hugging Face folder, brought from any of their layouts to stacked ones."""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np

from rl_mlx.convert.lazy import Arrays, Lazy
from rl_mlx.errors import FormatError

_EXPERT = re.compile(
    r"(model\.layers\.\d+)\.(?:mlp|block_sparse_moe)\.experts\.(\d+)\.(\w+)\.(weight|scales|biases)"
)
_PROJECTIONS = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}


def stacked(arrays: Arrays, parent: str) -> Arrays:
    """Stack ``experts.N.gate_proj.weight`` of all N into ``switch_mlp.gate_proj.weight``."""
    stacked: Arrays = {}
    parts: dict[str, dict[int, Lazy]] = {}
    for name, array in arrays.items():
        match = _EXPERT.fullmatch(name)
        if match:
            layer, number, module, suffix = match.groups()
            module = _PROJECTIONS.get(module, module)
            target = f"{layer}.{parent}.switch_mlp.{module}.{suffix}"
            parts.setdefault(target, {})[int(number)] = array
        else:
            stacked[name] = array
    for name, experts in parts.items():
        stacked[name] = stack(name, experts)
    return stacked


def stack(name: str, parts: Mapping[int, Lazy], what: str = "expert") -> Lazy:
    """Tensors that lie one by one as one; ``FormatError`` where one is missing or differs."""
    missing = next((i for i in range(len(parts)) if i not in parts), None)
    if missing is not None:
        raise FormatError(
            f"{what} {missing} of tensor {name!r} is missing; download the model again"
        )
    arrays = [parts[i] for i in range(len(parts))]
    shape, dtype = arrays[0].shape, arrays[0].dtype
    for i, array in enumerate(arrays):
        if (array.shape, array.dtype) != (shape, dtype):
            raise FormatError(
                f"{what} {i} of tensor {name!r} is {array.dtype} {list(array.shape)}, "
                f"but {what} 0 is {dtype} {list(shape)}"
            )
    read = lambda: np.stack([a.read() for a in arrays])  # noqa: E731
    return Lazy((len(arrays), *shape), dtype, read, tuple(arrays))


_FUSED = re.compile(
    r"(model\.layers\.\d+)\.(?:mlp|block_sparse_moe)\.experts\.(gate_up_proj|down_proj)"
)
_ROUTER = re.compile(r"(model\.layers\.\d+)\.(?:mlp|block_sparse_moe)\.gate\.(\w+)")


def split_experts(arrays: Arrays, parent: str) -> Arrays:
    """What transformers 5 holds: ``gate_up_proj`` is ``[experts, gate's rows then up's, in]``."""
    split: Arrays = {}
    for name, array in arrays.items():
        if match := _FUSED.fullmatch(name):
            at = f"{match[1]}.{parent}.switch_mlp"
            if match[2] == "down_proj":
                split[f"{at}.down_proj.weight"] = array
                continue
            half = array.shape[-2] // 2
            split[f"{at}.gate_proj.weight"] = array.cut(-2, 0, half)
            split[f"{at}.up_proj.weight"] = array.cut(-2, half, None)
        elif match := _ROUTER.fullmatch(name):
            split[f"{match[1]}.{parent}.gate.{match[2]}"] = array
        else:
            split[name] = array
    return split
