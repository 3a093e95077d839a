"""The gated delta net of Qwen3-Next and Qwen 3.5 (Yang et al. 2024, arXiv:2412.06464)."""

from __future__ import annotations

import mlx.core as mx

from rl_mlx.model.layers import FusedLinear, Linear, activated
from rl_mlx.model.plan import DeltaPlan
from rl_mlx.model.shortconv import convolved
from rl_mlx.model.step import Step

# Tokens that are worked on at once: their products are matrices, the memory moves on once.
_CHUNK = 64


class GatedDelta:
    """A memory ``[key_dim, value_dim]`` a head, which forgets and is corrected at each token."""

    def __init__(
        self,
        layer: int,
        plan: DeltaPlan,
        project: FusedLinear,
        kernel: mx.array,
        decay: tuple[mx.array, mx.array],
        norm: mx.array,
        eps: float,
        out: Linear,
    ) -> None:
        """``project`` gives queries, keys and values as one, their gate, betas and decays.

        ``kernel`` is ``[channels, taps, 1]``; ``decay`` the logarithm of A and the bias of the
        step, float32, one a value head; ``norm`` ``[value_dim]``.
        """
        self._layer = layer
        self._plan = plan
        self._project = project
        self._taps = kernel[:, :, 0].T
        self._rate = -mx.exp(decay[0])
        self._bias = decay[1]
        mx.eval(self._taps, self._rate)
        self._norm, self._eps = norm, eps
        self._out = out

    def __call__(self, x: mx.array, step: Step) -> mx.array:
        """``[B, S, hidden]`` to the same."""
        p = self._plan
        rows, length, _ = x.shape
        qkv, z, b, a = self._project(x)
        padded = step.history(self._layer, qkv)
        qkv = activated("silu", convolved(padded, self._taps, length)).astype(mx.float32)
        width = p.key_heads * p.key_dim
        q, k, v = mx.split(qkv, [width, 2 * width], axis=-1)
        q = _unit(q.reshape(rows, length, p.key_heads, p.key_dim)) * p.key_dim**-0.5
        k = _unit(k.reshape(rows, length, p.key_heads, p.key_dim))
        each = p.value_heads // p.key_heads  # value heads that share a key head
        q, k = (mx.repeat(t, each, axis=2) for t in (q, k)) if each > 1 else (q, k)
        v = v.reshape(rows, length, p.value_heads, p.value_dim)
        decay = self._rate * mx.logaddexp(a.astype(mx.float32) + self._bias, 0.0)
        beta = mx.sigmoid(b.astype(mx.float32))
        y = step.scan(self._layer, (q, k, v, decay, beta), advance)
        y = mx.fast.rms_norm(y, self._norm, self._eps)
        y = y * activated("silu", z.reshape(y.shape).astype(mx.float32))
        return self._out(y.reshape(rows, length, -1).astype(x.dtype))


def advance(memory: mx.array, inputs: tuple[mx.array, ...]) -> tuple[mx.array, mx.array]:
    """Answers ``[B, S, heads, value_dim]`` and the memory after ``S`` tokens; all float32.

    ``memory`` is ``[B, heads, key_dim, value_dim]``; ``inputs`` are queries, keys, values
    ``[B, S, heads, dim]``, log decays and betas ``[B, S, heads]``. Zeros change nothing.
    """
    q, k, v, decay, beta = (t.swapaxes(1, 2) for t in inputs)
    length = q.shape[2]
    if length == 1:
        return _one(memory, q, k, v, decay, beta)
    chunk = min(_CHUNK, 1 << (length - 1).bit_length())
    missing = -length % chunk
    if missing:
        q, k, v = (mx.pad(t, [(0, 0), (0, 0), (0, missing), (0, 0)]) for t in (q, k, v))
        decay, beta = (mx.pad(t, [(0, 0), (0, 0), (0, missing)]) for t in (decay, beta))
    y, memory = _many(memory, q, k, v, decay, beta, chunk)
    return y[:, :, :length].swapaxes(1, 2), memory


def _one(
    memory: mx.array, q: mx.array, k: mx.array, v: mx.array, decay: mx.array, beta: mx.array
) -> tuple[mx.array, mx.array]:
    """The rule itself: forget, look up, correct, answer."""
    memory = memory * mx.exp(decay)[..., None]
    missing = (v - k @ memory) * beta[..., None]
    memory = memory + k.swapaxes(-1, -2) @ missing
    return (q @ memory).swapaxes(1, 2), memory


def _many(
    memory: mx.array,
    q: mx.array,
    k: mx.array,
    v: mx.array,
    decay: mx.array,
    beta: mx.array,
    chunk: int,
) -> tuple[mx.array, mx.array]:
    """The same, chunk by chunk (the UT transform of Yang et al., section 3.3)."""
    rows, heads = q.shape[:2]
    q, k, v = (t.reshape(rows, heads, -1, chunk, t.shape[-1]) for t in (q, k, v))
    decay, beta = (t.reshape(rows, heads, -1, chunk) for t in (decay, beta))
    passed = mx.cumsum(decay, axis=-1)
    lower = mx.tril(mx.ones((chunk, chunk), mx.bool_))
    between = passed[..., :, None] - passed[..., None, :]
    between = mx.exp(mx.where(lower, between, mx.array(-mx.inf)))
    kept = mx.exp(passed)[..., None]
    again = k * beta[..., None]
    system = mx.tril((again @ k.swapaxes(-1, -2)) * between, k=-1)
    solved = _inverse(system) @ mx.concatenate([v * beta[..., None], again * kept], axis=-1)
    new, seen = mx.split(solved, [v.shape[-1]], axis=-1)
    within = (q @ k.swapaxes(-1, -2)) * between
    rest = mx.exp(passed[..., -1:] - passed)[..., None]
    asked, written, end = q * kept, (k * rest).swapaxes(-1, -2), kept[..., -1:, :]
    answers = []
    for i in range(q.shape[2]):
        change = new[:, :, i] - seen[:, :, i] @ memory
        answers.append(asked[:, :, i] @ memory + within[:, :, i] @ change)
        memory = memory * end[:, :, i] + written[:, :, i] @ change
    return mx.concatenate(answers, axis=2), memory


def _inverse(lower: mx.array) -> mx.array:
    """Of ``1 + lower``, strictly lower triangular ``[..., n, n]``, n a power of two.

    By blocks of twice the size each time: forward substitution, and as stable, in log2(n) products.
    """
    *lead, n, _ = lower.shape
    found = mx.ones((*lead, n, 1, 1), lower.dtype)
    size = 1
    while size < n:
        count = n // (2 * size)
        blocks = lower.reshape(*lead, count, 2, size, count, 2, size)[..., 1, :, :, 0, :]
        at = mx.arange(count)
        corner = mx.moveaxis(blocks, -2, -3)[..., at, at, :, :]
        pairs = found.reshape(*lead, count, 2, size, size)
        first, second = pairs[..., 0, :, :], pairs[..., 1, :, :]
        below = mx.concatenate([-(second @ corner @ first), second], axis=-1)
        above = mx.concatenate([first, mx.zeros_like(first)], axis=-1)
        found = mx.concatenate([above, below], axis=-2)
        size *= 2
    return found.squeeze(-3)


def _unit(x: mx.array) -> mx.array:
    """Of length one along the last axis."""
    return x * mx.rsqrt((x * x).sum(axis=-1, keepdims=True) + 1e-6)
