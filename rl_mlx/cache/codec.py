"""How keys and values are held: as they are, or quantized along the head dimension.

A codec turns ``[..., D]`` into planes, arrays whose last axis alone differs, and multiplies with
them as they lie.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import mlx.core as mx

from rl_mlx.errors import InvalidRequest

Planes = Sequence[mx.array]


class Codec(Protocol):
    """A way of holding vectors."""

    def planes(self, dim: int, dtype: mx.Dtype) -> list[tuple[int, mx.Dtype]]:
        """Width and type of each plane of vectors of ``dim``."""

    def encode(self, x: mx.array) -> Planes:
        """``[..., D]`` as planes."""

    def scores(self, queries: mx.array, planes: Planes) -> mx.array:
        """``queries @ x.T`` of planes of ``x``."""

    def mix(self, weights: mx.array, planes: Planes) -> mx.array:
        """``weights @ x`` of planes of ``x``."""


class Plain:
    """Vectors as they are."""

    def planes(self, dim: int, dtype: mx.Dtype) -> list[tuple[int, mx.Dtype]]:
        """One, the vectors."""
        return [(dim, dtype)]

    def encode(self, x: mx.array) -> Planes:
        """The vectors."""
        return [x]

    def scores(self, queries: mx.array, planes: Planes) -> mx.array:
        """A product."""
        return queries @ planes[0].swapaxes(-1, -2)

    def mix(self, weights: mx.array, planes: Planes) -> mx.array:
        """A product."""
        return weights @ planes[0]


class Quantized:
    """MLX's affine quantization of each vector, in groups of 64 numbers, or 32 where 64 does not
    divide.
    """

    def __init__(self, bits: int, dim: int) -> None:
        """Raises ``InvalidRequest`` for a head size that no group divides."""
        group = next((g for g in (64, 32) if dim % g == 0), None)
        if group is None:
            raise InvalidRequest(
                f"kv_bits={bits} needs a head size that 32 divides, and this model's is {dim}; "
                "leave kv_bits out"
            )
        self._bits = bits
        self._group = group

    def planes(self, dim: int, dtype: mx.Dtype) -> list[tuple[int, mx.Dtype]]:
        """Codes, scales and biases."""
        groups = dim // self._group
        return [(dim * self._bits // 32, mx.uint32), (groups, dtype), (groups, dtype)]

    def encode(self, x: mx.array) -> Planes:
        """Quantized."""
        return mx.quantize(x, group_size=self._group, bits=self._bits)

    def scores(self, queries: mx.array, planes: Planes) -> mx.array:
        """A product with what stays packed."""
        return self._multiply(queries, planes, transpose=True)

    def mix(self, weights: mx.array, planes: Planes) -> mx.array:
        """A product with what stays packed."""
        return self._multiply(weights, planes, transpose=False)

    def _multiply(self, x: mx.array, planes: Planes, *, transpose: bool) -> mx.array:
        codes, scales, biases = planes
        return mx.quantized_matmul(
            x, codes, scales, biases,
            transpose=transpose, group_size=self._group, bits=self._bits,
        )  # fmt: skip
