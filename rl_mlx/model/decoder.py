"""The decoder: embedding, blocks, final norm, head."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from rl_mlx.model.attention import Attention
from rl_mlx.model.gated_delta import GatedDelta
from rl_mlx.model.layers import Linear, Matrix, Norm
from rl_mlx.model.mamba import Mamba
from rl_mlx.model.mamba2 import Mamba2
from rl_mlx.model.mla import LatentAttention
from rl_mlx.model.mlp import MLP, MoE, PlainMLP
from rl_mlx.model.plan import CacheSpec, DecoderPlan, KVSpec, cache_specs
from rl_mlx.model.shortconv import ShortConv
from rl_mlx.model.step import Step


class Both:
    """Attention and a Mamba of one input, added (Falcon-H1)."""

    def __init__(self, attention: Attention, mamba: Mamba2) -> None:
        self._attention = attention
        self._mamba = mamba

    def __call__(self, x: mx.array, step: Step) -> mx.array:
        """``[B, S, hidden]`` to the same."""
        return self._attention(x, step) + self._mamba(x, step)


Mixer = Attention | LatentAttention | ShortConv | GatedDelta | Mamba | Mamba2 | Both


class Block:
    """``x + mixer(norm(x))``, then ``x + mlp(norm(x))``, or both from the same ``x``.

    ``norms`` are those on the way into a branch, ``post_norms`` those on the way out.
    """

    def __init__(
        self,
        plan: DecoderPlan,
        mixer: Mixer,
        mlp: MLP | PlainMLP | MoE | None,
        norms: tuple[Norm | None, Norm | None],
        post_norms: tuple[Norm | None, Norm | None],
    ) -> None:
        self._parallel = plan.parallel
        self._scale = plan.residual_scale
        self._mixer = mixer
        self._mlp = mlp
        self._norms = norms
        self._post_norms = post_norms

    def __call__(self, x: mx.array, step: Step) -> mx.array:
        """``[B, S, hidden]`` to the same."""
        normed = _normed(self._norms[0], x)
        mixed = self._added(self._mixer(normed, step), self._post_norms[0])
        if self._mlp is None:
            return x + mixed
        if self._parallel:
            start = normed if self._norms[1] is None else self._norms[1](x)
            return x + mixed + self._added(self._mlp(start), self._post_norms[1])
        x = x + mixed
        return x + self._added(self._mlp(_normed(self._norms[1], x)), self._post_norms[1])

    def _added(self, branch: mx.array, norm: Norm | None) -> mx.array:
        branch = _normed(norm, branch)
        return branch if self._scale == 1.0 else branch * self._scale


def _normed(norm: Norm | None, x: mx.array) -> mx.array:
    return x if norm is None else norm(x)


class Decoder:
    """A language model: ``forward`` to hidden states, ``head`` from them to logits."""

    def __init__(
        self,
        plan: DecoderPlan,
        embedding: Matrix,
        blocks: Sequence[Block],
        norm: Norm,
        head: Linear,
        dtype: mx.Dtype,
        positions: Matrix | None = None,
    ) -> None:
        self.plan = plan
        self.dtype = dtype
        self._embedding = embedding
        self.blocks = tuple(blocks)
        self._norm = norm
        self._head = head
        self._positions = positions
        self.packs = all(isinstance(spec, KVSpec) for spec in self.cache_specs)

    @property
    def cache_specs(self) -> tuple[CacheSpec, ...]:
        """What each layer keeps."""
        return cache_specs(self.plan)

    def forward(self, tokens: mx.array, step: Step) -> mx.array:
        """Hidden states ``[B, S, hidden]``, normed, of token ids ``[B, S]``."""
        return self.through(self.embed(tokens, step), step)

    def embed(self, tokens: mx.array, step: Step) -> mx.array:
        """What goes into the first block, ``[B, S, hidden]``."""
        x = self._embedding.rows(tokens).astype(self.dtype)
        if self.plan.embed_scale != 1.0:
            x = x * mx.array(self.plan.embed_scale, self.dtype)
        if self._positions is not None:
            at = mx.array(step.offset).reshape(-1, 1) + mx.arange(tokens.shape[1])
            at = mx.minimum(at, self._positions.out - 1)  # a row's padding may lie behind the last
            x = x + self._positions.rows(at).astype(self.dtype)
        return x

    def through(self, x: mx.array, step: Step, first: int = 0) -> mx.array:
        """What goes into the block ``first``, taken through it and all after it, and normed."""
        for block in self.blocks[first:]:
            x = block(x, step)
        return self._norm(x)

    def with_blocks(self, blocks: Sequence[Block]) -> Decoder:
        """One with these blocks; all else is shared."""
        return Decoder(
            self.plan, self._embedding, blocks, self._norm, self._head, self.dtype, self._positions
        )

    def head(self, hidden: mx.array) -> mx.array:
        """Logits ``[..., vocab]`` of hidden states ``[..., hidden]``."""
        logits = self._head(hidden)
        if self.plan.logit_scale != 1.0:
            logits = logits * self.plan.logit_scale
        cap = self.plan.logit_softcap
        return logits if cap is None else mx.tanh(logits / cap) * cap
