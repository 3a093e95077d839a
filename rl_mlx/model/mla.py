"""Multi-head latent attention: keys and values of all heads out of one small vector a token."""

from __future__ import annotations

import mlx.core as mx

from rl_mlx.model.layers import Linear, Matrix, RMSNorm
from rl_mlx.model.plan import LatentPlan
from rl_mlx.model.rope import Rope
from rl_mlx.model.step import Step


class Queries:
    """Queries of all heads, by one matrix or by two with a norm between them."""

    def __init__(self, down: tuple[Linear, RMSNorm] | None, up: Linear) -> None:
        self._down = down
        self._up = up

    def __call__(self, x: mx.array) -> mx.array:
        """``[B, S, hidden]`` to ``[B, S, heads * dim]``."""
        if self._down is not None:
            x = self._down[1](self._down[0](x))
        return self._up(x)


class LatentAttention:
    """DeepSeek's attention (DeepSeek-AI 2024, arXiv:2405.04434), in its absorbed form.

    Every head's key is a matrix times the latent vector, so the matrix goes to the query instead,
    and all heads look at the latents themselves: attention with one key head. What is kept of a
    token is its latent vector and one rotated key that the heads share.
    """

    def __init__(
        self,
        layer: int,
        plan: LatentPlan,
        queries: Queries,
        compress: Linear,
        norm: RMSNorm,
        heads: tuple[Matrix, Matrix],
        out: Linear,
        rope: Rope,
    ) -> None:
        """``heads``: ``[heads, latent, nope_dim]`` takes queries to the latent space, and
        ``[heads, value_dim, latent]`` latents to values.
        """
        self._layer = layer
        self._plan = plan
        self._queries = queries
        self._compress = compress
        self._norm = norm
        self._enter, self._leave = heads
        self._out = out
        self._rope = rope

    def __call__(self, x: mx.array, step: Step) -> mx.array:
        """``[B, S, hidden]`` to the same."""
        p = self._plan
        rows, length, _ = x.shape
        q = self._queries(x).reshape(rows, length, p.heads, -1).transpose(0, 2, 1, 3)
        plain, turned = mx.split(q, [p.nope_dim], axis=-1)
        latent, key = mx.split(self._compress(x), [p.latent], axis=-1)
        latent, key = self._norm(latent)[:, None], self._rope(key[:, None], step.offset)
        queries = [self._enter.multiply(plain), self._rope(turned, step.offset)]
        y = step.attend(
            self._layer,
            mx.concatenate(queries, axis=-1), mx.concatenate([latent, key], axis=-1), latent,
            scale=p.scale, softcap=None, sinks=None,
        )  # fmt: skip
        y = self._leave.multiply(y)
        return self._out(y.transpose(0, 2, 1, 3).reshape(rows, length, -1))
