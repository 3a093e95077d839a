"""Mamba (Gu and Dao 2023, arXiv:2312.00752)."""

from __future__ import annotations

import mlx.core as mx

from rl_mlx.model.layers import Linear, activated
from rl_mlx.model.plan import SelectivePlan
from rl_mlx.model.shortconv import convolved
from rl_mlx.model.step import Step


class Mamba:
    """A memory of ``state`` numbers a channel, each of which decays at its own rate."""

    def __init__(
        self,
        layer: int,
        plan: SelectivePlan,
        linears: tuple[Linear, Linear, Linear, Linear],
        kernel: tuple[mx.array, mx.array | None],
        log_rate: mx.array,
        skip: mx.array,
    ) -> None:
        """``linears``: in, to steps and B and C, from steps to channels, out. ``kernel`` is
        ``[inner, taps, 1]`` with its bias; ``log_rate`` ``[inner, state]`` and ``skip`` ``[inner]``
        are float32.
        """
        self._layer = layer
        self._plan = plan
        self._project, self._select, self._widen, self._out = linears
        self._taps, self._kernel_bias = kernel[0][:, :, 0].T, kernel[1]
        self._rate, self._skip = -mx.exp(log_rate), skip
        mx.eval(self._taps, self._rate)

    def __call__(self, x: mx.array, step: Step) -> mx.array:
        """``[B, S, hidden]`` to the same."""
        p = self._plan
        u, z = mx.split(self._project(x), 2, axis=-1)
        u = convolved(step.history(self._layer, u), self._taps, x.shape[1])
        u = activated("silu", u if self._kernel_bias is None else u + self._kernel_bias)
        cuts = [p.step_rank, p.step_rank + p.state]
        parts = list(mx.split(self._select(u), cuts, axis=-1))
        if p.inner_norm is not None:
            parts = [mx.fast.rms_norm(part, None, p.inner_norm) for part in parts]
        dt = mx.logaddexp(self._widen(parts[0]).astype(mx.float32), 0.0)
        b, c = (part.astype(mx.float32) for part in parts[1:])
        u = u.astype(mx.float32)
        y = step.scan(self._layer, (u * dt, b, c, dt), self._advance) + u * self._skip
        return self._out((y * activated("silu", z.astype(mx.float32))).astype(x.dtype))

    def _advance(self, memory: mx.array, inputs: tuple[mx.array, ...]) -> tuple[mx.array, mx.array]:
        """Answers ``[B, S, inner]`` and the memory ``[B, inner, state]``, token by token.

        Every number of the memory has a rate of its own, so that no products of matrices do it.
        """
        u, b, c, dt = inputs
        answers = []
        for i in range(u.shape[1]):
            decay = mx.exp(dt[:, i, :, None] * self._rate)
            memory = memory * decay + u[:, i, :, None] * b[:, i, None]
            answers.append(memory @ c[:, i, :, None])
        return mx.stack(answers, axis=1).squeeze(-1), memory
