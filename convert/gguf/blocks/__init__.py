"""GGML's tensor types, one class each: ``block(GGMLType.Q4_K).decode(raw)``."""

from __future__ import annotations

from types import MappingProxyType

from rl_mlx.convert.gguf.blocks import fp4, iq, k, legacy, plain, ternary
from rl_mlx.convert.gguf.blocks.base import Block, Codes, Lattice, Plain
from rl_mlx.convert.gguf.blocks.fp4 import BlockFloat
from rl_mlx.convert.gguf.types import GGMLType
from rl_mlx.errors import UnsupportedModel

__all__ = ["BLOCKS", "Block", "BlockFloat", "Codes", "Lattice", "Plain", "block"]

_CLASSES: tuple[type[Block], ...] = (
    plain.Float32,
    plain.Float16,
    plain.BFloat16,
    plain.Float64,
    plain.Int8,
    plain.Int16,
    plain.Int32,
    plain.Int64,
    legacy.Q4_0,
    legacy.Q4_1,
    legacy.Q5_0,
    legacy.Q5_1,
    legacy.Q8_0,
    legacy.Q1_0,
    k.Q2_K,
    k.Q3_K,
    k.Q4_K,
    k.Q5_K,
    k.Q6_K,
    iq.IQ1_S,
    iq.IQ1_M,
    iq.IQ2_XXS,
    iq.IQ2_XS,
    iq.IQ2_S,
    iq.IQ3_XXS,
    iq.IQ3_S,
    iq.IQ4_NL,
    iq.IQ4_XS,
    ternary.TQ1_0,
    ternary.TQ2_0,
    ternary.Q2_0,
    fp4.MXFP4,
    fp4.NVFP4,
)

BLOCKS = MappingProxyType({cls.type: cls() for cls in _CLASSES})


def block(ggml_type: GGMLType) -> Block:
    """The block type of a tensor; ``UnsupportedModel`` where nobody here can read it."""
    found = BLOCKS.get(ggml_type)
    if found is None:
        raise UnsupportedModel(
            f"tensors of type {ggml_type.name} cannot be read; use a file of another type"
        )
    return found
