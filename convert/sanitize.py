"""From Hugging Face names and layouts to the canonical ones, without reading a tensor.

Experts that lie one by one are stacked, fused gate and up projections are split, gpt-oss' MXFP4
blocks become MLX's words. What is canonical already (an MLX folder) stays as it is.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from rl_mlx.errors import FormatError

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Lazy:
    """An array of a file that is not read yet. ``dtype`` is as safetensors names it."""

    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], Array]
    parts: tuple[Lazy, ...] = ()
    """Of an array that is stacked from others, these: some of it can be read without the rest."""
    take: Callable[[int, int], Array] | None = None
    """Some rows of an array that is made when it is read, where that is less work than all."""

    def rows(self, start: int, stop: int) -> Array:
        """Rows ``[stop - start, last axis]``, where all axes but the last count as one."""
        if self.take is not None:
            return self.take(start, stop)
        if not self.parts:
            width = self.shape[-1] if self.shape else 1
            return self.read().reshape(-1, width)[start:stop]
        each = math.prod(self.parts[0].shape[:-1])
        touched = range(start // each, -(-stop // each))
        found = [
            self.parts[i].rows(max(start - i * each, 0), min(stop - i * each, each))
            for i in touched
        ]
        return found[0] if len(found) == 1 else np.concatenate(found)

    def seen(self, shape: tuple[int, ...], view: Callable[[Array], Array], dtype: str = "") -> Lazy:
        """The same array through ``view``, which makes it of ``shape``."""
        return Lazy(shape, dtype or self.dtype, lambda: view(self.read()))

    def cut(self, axis: int, start: int, stop: int | None, step: int = 1) -> Lazy:
        """A slice along ``axis``, which counts from the last one (-1)."""
        count = len(range(*slice(start, stop, step).indices(self.shape[axis])))
        shape = list(self.shape)
        shape[axis] = count
        index = (..., slice(start, stop, step), *[slice(None)] * (-1 - axis))
        return self.seen(tuple(shape), lambda a: a[index])

    def transposed(self) -> Lazy:
        """The last two axes the other way round."""
        *lead, rows, columns = self.shape
        return self.seen((*lead, columns, rows), lambda a: a.swapaxes(-1, -2))


Arrays = dict[str, Lazy]


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
    if family in {"mixtral", "qwen3_moe"}:
        parent = "block_sparse_moe" if family == "mixtral" else "mlp"
        return _stacked(_split_experts(found, parent), parent)
    if family == "gpt_oss":
        return _gpt_oss(found)
    if family == "lfm2":
        return {n: _conv(a) if n.endswith("conv.conv.weight") else a for n, a in found.items()}
    return found


def _is_derived(name: str) -> bool:
    return name.endswith(("rotary_emb.inv_freq", "rotary_emb.cos_cached", "rotary_emb.sin_cached"))


def _is_head(name: str) -> bool:
    return name.startswith("lm_head.")


_EXPERT = re.compile(
    r"(model\.layers\.\d+)\.(?:mlp|block_sparse_moe)\.experts\.(\d+)\.(\w+)\.(weight|scales|biases)"
)
_PROJECTIONS = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}


def _stacked(arrays: Arrays, parent: str) -> Arrays:
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
        stacked[name] = _stack(name, experts)
    return stacked


def _stack(name: str, parts: Mapping[int, Lazy]) -> Lazy:
    missing = next((i for i in range(len(parts)) if i not in parts), None)
    if missing is not None:
        raise FormatError(
            f"expert {missing} of tensor {name!r} is missing; download the model again"
        )
    arrays = [parts[i] for i in range(len(parts))]
    shape, dtype = arrays[0].shape, arrays[0].dtype
    for i, array in enumerate(arrays):
        if (array.shape, array.dtype) != (shape, dtype):
            raise FormatError(
                f"expert {i} of tensor {name!r} is {array.dtype} {list(array.shape)}, "
                f"but expert 0 is {dtype} {list(shape)}"
            )
    read = lambda: np.stack([a.read() for a in arrays])  # noqa: E731
    return Lazy((len(arrays), *shape), dtype, read, tuple(arrays))


_FUSED = re.compile(
    r"(model\.layers\.\d+)\.(?:mlp|block_sparse_moe)\.experts\.(gate_up_proj|down_proj)"
)
_ROUTER = re.compile(r"(model\.layers\.\d+)\.(?:mlp|block_sparse_moe)\.gate\.(\w+)")


def _split_experts(arrays: Arrays, parent: str) -> Arrays:
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
