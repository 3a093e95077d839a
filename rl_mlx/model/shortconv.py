"""The gated short convolution of LFM2."""

from __future__ import annotations

import mlx.core as mx

from rl_mlx.model.layers import Linear
from rl_mlx.model.step import Step


class ShortConv:
    """``out(c * conv(b * x))`` with ``b, c, x`` from one projection; causal, depthwise."""

    def __init__(
        self, layer: int, project: Linear, kernel: mx.array, bias: mx.array | None, out: Linear
    ) -> None:
        """``kernel`` is ``[hidden, taps, 1]``, as ``mx.conv1d`` takes it."""
        self._layer = layer
        self._project = project
        self._taps = kernel[:, :, 0].T  # [taps, hidden]
        mx.eval(self._taps)
        self._bias = bias
        self._out = out

    def __call__(self, x: mx.array, step: Step) -> mx.array:
        """``[B, S, hidden]`` to the same."""
        b, c, x = mx.split(self._project(x), 3, axis=-1)
        length = x.shape[1]
        padded = step.history(self._layer, b * x)
        y = convolved(padded, self._taps, length)
        return self._out(c * (y if self._bias is None else y + self._bias))


def convolved(padded: mx.array, taps: mx.array, length: int) -> mx.array:
    """A causal, depthwise convolution: ``[B, length, width]`` of ``[B, taps - 1 + length, width]``.

    With a handful of ``taps`` ``[taps, width]`` a sum of shifted products is as good as a
    convolution call.
    """
    y = padded[:, :length] * taps[0]
    for i in range(1, taps.shape[0]):
        y = y + padded[:, i : i + length] * taps[i]
    return y
