"""The decoder: embedding, blocks, final norm, head."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from rl_mlx.model.attention import Attention
from rl_mlx.model.layers import Linear, Matrix, RMSNorm
from rl_mlx.model.mlp import MLP, MoE
from rl_mlx.model.plan import CacheSpec, DecoderPlan, cache_specs
from rl_mlx.model.shortconv import ShortConv
from rl_mlx.model.step import Step


class Block:
    """``x + mixer(norm(x))``, then ``x + mlp(norm(x))``; Gemma norms the branches on their way out
    too.
    """

    def __init__(
        self,
        mixer: Attention | ShortConv,
        mlp: MLP | MoE,
        norms: tuple[RMSNorm, RMSNorm],
        post_norms: tuple[RMSNorm, RMSNorm] | None,
    ) -> None:
        self._mixer = mixer
        self._mlp = mlp
        self._norms = norms
        self._post_norms = post_norms

    def __call__(self, x: mx.array, step: Step) -> mx.array:
        """``[B, S, hidden]`` to the same."""
        mixed = self._mixer(self._norms[0](x), step)
        if self._post_norms is not None:
            mixed = self._post_norms[0](mixed)
        x = x + mixed
        fed = self._mlp(self._norms[1](x))
        if self._post_norms is not None:
            fed = self._post_norms[1](fed)
        return x + fed


class Decoder:
    """A language model: ``forward`` to hidden states, ``head`` from them to logits."""

    def __init__(
        self,
        plan: DecoderPlan,
        embedding: Matrix,
        blocks: Sequence[Block],
        norm: RMSNorm,
        head: Linear,
        dtype: mx.Dtype,
    ) -> None:
        self.plan = plan
        self.dtype = dtype
        self._embedding = embedding
        self._blocks = blocks
        self._norm = norm
        self._head = head

    @property
    def cache_specs(self) -> tuple[CacheSpec, ...]:
        """What each layer keeps."""
        return cache_specs(self.plan)

    def forward(self, tokens: mx.array, step: Step) -> mx.array:
        """Hidden states ``[B, S, hidden]``, normed, of token ids ``[B, S]``."""
        x = self._embedding.rows(tokens).astype(self.dtype)
        if self.plan.embed_scale != 1.0:
            x = x * mx.array(self.plan.embed_scale, self.dtype)
        for block in self._blocks:
            x = block(x, step)
        return self._norm(x)

    def head(self, hidden: mx.array) -> mx.array:
        """Logits ``[..., vocab]`` of hidden states ``[..., hidden]``."""
        logits = self._head(hidden)
        cap = self.plan.logit_softcap
        return logits if cap is None else mx.tanh(logits / cap) * cap
