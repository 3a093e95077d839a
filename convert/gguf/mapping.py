"""How the tensors of a GGUF file relate to the canonical ones, whatever the family."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from rl_mlx.convert.families import FAMILIES
from rl_mlx.convert.gguf.changes import Change, Order, interleaved, moved, norms_from_one
from rl_mlx.convert.gguf.fields import ARCHITECTURES, INTERLEAVED
from rl_mlx.convert.quantize import dequantize
from rl_mlx.convert.shapes import Config
from rl_mlx.convert.weights import Dense, Packed, Tensor


def change(config: Config, name: str) -> Change | None:
    """What a GGUF file does to the tensor with the canonical ``name``, beside renaming it.

    Q and K lie in interleaved order where llama.cpp rotates them so, and Gemma's norms have the 1
    in them that is added to each.
    """
    family = config["model_type"]
    if family in FAMILIES:
        return FAMILIES[family].change(config, name)
    if family in INTERLEAVED:
        return interleaved(config, name)
    if family.startswith("gemma"):
        return norms_from_one(config, name)
    if name.endswith("conv.conv.weight"):  # LFM2's kernels have an axis less in the file
        return Change(shape=(config["hidden_size"], config["conv_L_cache"]))
    return None


def moved_columns(tensor: Tensor, order: Order) -> Tensor:
    """A tensor whose runs of columns are put in ``order``; decoded where groups straddle runs."""
    if isinstance(tensor, Packed):
        width, rest = divmod(tensor.shape[-1], len(order))
        if rest or width % tensor.group_size or width * tensor.bits % 32:
            tensor = Dense(dequantize(tensor), "float32")
    if isinstance(tensor, Dense):
        return replace(tensor, array=moved(tensor.array, order))
    return replace(
        tensor,
        weight=moved(tensor.weight, order),
        scales=moved(tensor.scales, order),
        biases=None if tensor.biases is None else moved(tensor.biases, order),
    )


def changed_back(piece: Dense | Packed, done: Change, *, is_vector: bool) -> Dense | Packed:
    """Whole runs of canonical rows ``[rows, columns]`` as the file has them."""
    if done.back is not None:
        piece = Dense(done.back(dequantize(piece)), "float32")
    if done.columns is not None:
        piece = moved_columns(piece, np.argsort(done.columns))
    if isinstance(piece, Dense):
        width = done.shape[-1] if done.shape and not is_vector else piece.array.shape[-1]
        # A vector comes as one row, a kernel as rows of one number.
        rows = piece.array.reshape(-1) if is_vector else piece.array.reshape(-1, width)
        return replace(piece, array=done.undone(rows).reshape(piece.array.shape))
    return replace(
        piece,
        weight=done.undone(piece.weight),
        scales=done.undone(piece.scales),
        biases=None if piece.biases is None else done.undone(piece.biases),
    )


def architecture(model_type: str) -> str:
    """``general.architecture`` of a family; ``KeyError`` for one that is not exported."""
    family = FAMILIES.get(model_type)
    return family.architecture if family else ARCHITECTURES[model_type]


def exported_config(config: dict[str, Any]) -> dict[str, Any]:
    """``config`` as that of the family whose GGUF files are made of its."""
    family = FAMILIES.get(config["model_type"])
    named = family.exported_as if family else None
    return {**config, "model_type": named} if named else config
