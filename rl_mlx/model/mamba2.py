"""Mamba 2 (Dao and Gu 2024, arXiv:2405.21060)."""

from __future__ import annotations

import mlx.core as mx

from rl_mlx.model.layers import Linear, activated
from rl_mlx.model.plan import MambaPlan
from rl_mlx.model.shortconv import convolved
from rl_mlx.model.step import Step

# Tokens that are worked on at once: their products are matrices, the memory moves on once.
_CHUNK = 64


class Mamba2:
    """A memory ``[state, head_dim]`` a head, which decays and is added to at each token."""

    def __init__(
        self,
        layer: int,
        plan: MambaPlan,
        project: Linear,
        kernel: tuple[mx.array, mx.array | None],
        heads: tuple[mx.array, mx.array, mx.array],
        norm: mx.array | None,
        eps: float,
        out: Linear,
    ) -> None:
        """``kernel`` is ``[channels, taps, 1]`` with its bias; ``heads`` the logarithm of A, the
        bias of the step and D, float32, one a head; ``norm`` ``[inner]``.
        """
        self._layer = layer
        self._plan = plan
        self._project = project
        self._taps, self._kernel_bias = kernel[0][:, :, 0].T, kernel[1]
        self._rate = -mx.exp(heads[0])
        self._bias, self._skip = heads[1], heads[2][:, None]
        mx.eval(self._taps, self._rate)
        self._norm, self._eps = norm, eps
        self._out = out

    def __call__(self, x: mx.array, step: Step) -> mx.array:
        """``[B, S, hidden]`` to the same."""
        p = self._plan
        rows, length, _ = x.shape
        z, mixed, dt = mx.split(self._project(x), [p.inner, p.inner + p.channels], axis=-1)
        mixed = convolved(step.history(self._layer, mixed), self._taps, length)
        if self._kernel_bias is not None:
            mixed = mixed + self._kernel_bias
        mixed = activated("silu", mixed).astype(mx.float32)
        u, b, c = mx.split(mixed, [p.inner, p.inner + p.groups * p.state], axis=-1)
        u = u.reshape(rows, length, p.heads, p.head_dim)
        b, c = (
            mx.repeat(t.reshape(rows, length, p.groups, p.state), p.heads // p.groups, axis=2)
            for t in (b, c)
        )
        dt = mx.logaddexp(dt.astype(mx.float32) + self._bias, 0.0)
        dt = mx.clip(dt, *p.step_limit)
        y = step.scan(self._layer, (u * dt[..., None], b, c, dt * self._rate), advance)
        y = (y + u * self._skip).reshape(rows, length, p.inner)
        y = y * activated("silu", z.astype(mx.float32))
        if self._norm is not None:  # each group by itself
            grouped = y.reshape(rows, length, p.groups, -1)
            y = mx.fast.rms_norm(grouped, None, self._eps).reshape(y.shape) * self._norm
        return self._out(y.astype(x.dtype))


def advance(memory: mx.array, inputs: tuple[mx.array, ...]) -> tuple[mx.array, mx.array]:
    """Answers ``[B, S, heads, head_dim]`` and the memory after ``S`` tokens; all float32.

    ``memory`` is ``[B, heads, state, head_dim]``; ``inputs`` are what is added, ``[B, S, heads,
    head_dim]``, B and C ``[B, S, heads, state]`` and log decays ``[B, S, heads]``. Zeros change
    nothing. Chunk by chunk, as section 6 of the paper has it.
    """
    u, b, c, decay = (t.swapaxes(1, 2) for t in inputs)
    answers = []
    for start in range(0, u.shape[2], _CHUNK):
        part = slice(start, start + _CHUNK)
        y, memory = _chunk(memory, u[:, :, part], b[:, :, part], c[:, :, part], decay[:, :, part])
        answers.append(y)
    return mx.concatenate(answers, axis=2).swapaxes(1, 2), memory


def _chunk(
    memory: mx.array, u: mx.array, b: mx.array, c: mx.array, decay: mx.array
) -> tuple[mx.array, mx.array]:
    passed = mx.cumsum(decay, axis=-1)
    lower = mx.tril(mx.ones((u.shape[2], u.shape[2]), mx.bool_))
    between = passed[..., :, None] - passed[..., None, :]
    between = mx.exp(mx.where(lower, between, mx.array(-mx.inf)))
    kept = mx.exp(passed)[..., None]
    y = (c * kept) @ memory + ((c @ b.swapaxes(-1, -2)) * between) @ u
    rest = mx.exp(passed[..., -1:] - passed)[..., None]
    return y, memory * kept[..., -1:, :] + (b * rest).swapaxes(-1, -2) @ u
