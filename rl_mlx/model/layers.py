"""Weights that multiply: dense and quantized linear layers, embeddings, norms, and their fusing.

MLX's own ``nn`` activations and modules are not used: many are wrapped in ``mx.compile``, which
needs a C++ compiler at run time on Linux.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

from rl_mlx.convert.weights import Mode
from rl_mlx.model.device import on_cpu
from rl_mlx.model.plan import Activation


def laid_out(weight: mx.array) -> mx.array:
    """The same ``[..., out, in]``, lying in memory as products with its transpose want it.

    MLX's BLAS on a plain CPU is twice as fast where the inputs' axis is the outer one.
    """
    if not on_cpu():
        return weight
    return mx.contiguous(weight.swapaxes(-1, -2)).swapaxes(-1, -2)


@dataclass(frozen=True)
class DenseMatrix:
    """``[..., out, in]`` of floats."""

    weight: mx.array

    def multiply(self, x: mx.array) -> mx.array:
        """``x`` times the matrix's transpose; of matrices of heads, each head's with its own."""
        return x @ self.weight.swapaxes(-1, -2)

    def gather(self, x: mx.array, experts: mx.array, *, ordered: bool) -> mx.array:
        """``x`` times the matrix of the expert named for each row."""
        transposed = self.weight.swapaxes(-1, -2)
        return mx.gather_mm(x, transposed, rhs_indices=experts, sorted_indices=ordered)

    def rows(self, ids: mx.array) -> mx.array:
        """Rows by index."""
        return self.weight[ids]

    def join(self, others: Sequence[Matrix]) -> DenseMatrix | None:
        """One matrix of all their rows, or None where they do not go together."""
        if not all(isinstance(o, DenseMatrix) for o in others):
            return None
        weights = [self.weight, *(o.weight for o in others)]
        return DenseMatrix(laid_out(mx.concatenate(weights, axis=-2)))

    def arrays(self) -> list[mx.array]:
        """All that is held."""
        return [self.weight]

    @property
    def out(self) -> int:
        """Rows."""
        return int(self.weight.shape[-2])


@dataclass(frozen=True)
class QuantizedMatrix:
    """``[..., out, in]`` in one of MLX's quantized containers."""

    weight: mx.array
    scales: mx.array
    biases: mx.array | None
    group_size: int
    bits: int
    mode: Mode

    def multiply(self, x: mx.array) -> mx.array:
        """``x @ weight.T`` without unpacking the weight."""
        return mx.quantized_matmul(
            x, self.weight, self.scales, self.biases, transpose=True,
            group_size=self.group_size, bits=self.bits, mode=self.mode,
        )  # fmt: skip

    def gather(self, x: mx.array, experts: mx.array, *, ordered: bool) -> mx.array:
        """``x`` times the matrix of the expert named for each row."""
        return mx.gather_qmm(
            x, self.weight, self.scales, self.biases, rhs_indices=experts, transpose=True,
            group_size=self.group_size, bits=self.bits, mode=self.mode, sorted_indices=ordered,
        )  # fmt: skip

    def unpacked(self, dtype: mx.Dtype) -> DenseMatrix:
        """The same numbers as floats."""
        dense = DenseMatrix(laid_out(self.rows(slice(None)).astype(dtype)))
        mx.eval(dense.weight)
        return dense

    def rows(self, ids: mx.array | slice) -> mx.array:
        """Rows by index, unpacked."""
        biases = None if self.biases is None else self.biases[ids]
        return mx.dequantize(
            self.weight[ids], self.scales[ids], biases,
            group_size=self.group_size, bits=self.bits, mode=self.mode,
        )  # fmt: skip

    def join(self, others: Sequence[Matrix]) -> QuantizedMatrix | None:
        """One matrix of all their rows, or None where they do not go together."""
        parts = [self]
        for o in others:
            if not isinstance(o, QuantizedMatrix) or o._container != self._container:
                return None
            parts.append(o)
        biases = [p.biases for p in parts if p.biases is not None]
        return QuantizedMatrix(
            mx.concatenate([p.weight for p in parts], axis=-2),
            mx.concatenate([p.scales for p in parts], axis=-2),
            mx.concatenate(biases, axis=-2) if biases else None,
            *self._container[:3],
        )

    def arrays(self) -> list[mx.array]:
        """All that is held."""
        return [self.weight, self.scales, *([] if self.biases is None else [self.biases])]

    @property
    def _container(self) -> tuple[int, int, Mode, mx.Dtype, bool]:
        return self.group_size, self.bits, self.mode, self.scales.dtype, self.biases is None

    @property
    def out(self) -> int:
        """Rows."""
        return int(self.weight.shape[-2])


Matrix = DenseMatrix | QuantizedMatrix


class Linear:
    """``x @ weight.T + bias``."""

    def __init__(self, matrix: Matrix, bias: mx.array | None = None) -> None:
        self.matrix = matrix
        self.bias = bias

    def __call__(self, x: mx.array) -> mx.array:
        """``[..., in]`` to ``[..., out]``."""
        y = self.matrix.multiply(x)
        return y if self.bias is None else y + self.bias


class FusedLinear:
    """Several linear layers of one input, as one product where their containers allow it."""

    def __init__(self, parts: Sequence[Linear]) -> None:
        self._parts: Sequence[Linear] = parts
        self._cuts: list[int] = []
        joined = parts[0].matrix.join([p.matrix for p in parts[1:]])
        biases = [p.bias for p in parts if p.bias is not None]
        if joined is None or len(biases) not in {0, len(parts)}:
            return
        sizes = [p.matrix.out for p in parts]
        self._cuts = [sum(sizes[: i + 1]) for i in range(len(sizes) - 1)]
        self._parts = [Linear(joined, mx.concatenate(biases, axis=-1) if biases else None)]
        mx.eval(*joined.arrays(), *([] if not biases else [self._parts[0].bias]))

    def __call__(self, x: mx.array) -> list[mx.array]:
        """One output for each part."""
        if self._cuts:
            return list(mx.split(self._parts[0](x), self._cuts, axis=-1))
        return [part(x) for part in self._parts]


class SplitLinear:
    """One linear layer whose output is several, cut at ``cuts`` (weights stored fused)."""

    def __init__(self, linear: Linear, cuts: Sequence[int]) -> None:
        self._linear = linear
        self._cuts = list(cuts)

    def __call__(self, x: mx.array) -> list[mx.array]:
        """The pieces."""
        return list(mx.split(self._linear(x), self._cuts, axis=-1))


class RMSNorm:
    """Root mean square norm (Zhang and Sennrich 2019) over the last axis, by weights or by none."""

    def __init__(self, weight: mx.array | None, eps: float) -> None:
        self._weight = weight
        self._eps = eps

    def __call__(self, x: mx.array) -> mx.array:
        """Of the same shape."""
        return mx.fast.rms_norm(x, self._weight, self._eps)


class LayerNorm:
    """Layer norm (Ba et al. 2016) over the last axis; ``weight`` ``[heads, dim]`` is one a head."""

    def __init__(self, weight: mx.array, bias: mx.array | None, eps: float) -> None:
        self._weight = weight
        self._bias = bias
        self._eps = eps

    def __call__(self, x: mx.array) -> mx.array:
        """Of the same shape."""
        if self._weight.ndim == 1:
            return mx.fast.layer_norm(x, self._weight, self._bias, self._eps)
        return mx.fast.layer_norm(x, None, None, self._eps) * self._weight


Norm = RMSNorm | LayerNorm


def gated(kind: Activation, gate: mx.array, up: mx.array) -> mx.array:
    """The gated activation of a feed-forward layer: ``f(gate) * up``."""
    if kind == "swiglu_oai":  # gpt-oss: clamped, steeper, and up + 1
        gate = mx.minimum(gate, 7.0)
        return gate * mx.sigmoid(1.702 * gate) * (mx.clip(up, -7.0, 7.0) + 1)
    return activated(kind, gate) * up


def activated(kind: Activation, x: mx.array) -> mx.array:
    """The activation of a feed-forward layer without a gate: ``f(x)``."""
    if kind == "silu":
        return x * mx.sigmoid(x)
    if kind == "relu2":
        return mx.square(mx.maximum(x, 0))
    if kind == "gelu":
        return 0.5 * x * (1 + mx.erf(x / 1.4142135623730951))
    assert kind == "gelu_tanh", f"{kind} needs a gate"
    inner = 0.7978845608028654 * (x + 0.044715 * x * x * x)  # sqrt(2 / pi)
    return 0.5 * x * (1 + mx.tanh(inner))
