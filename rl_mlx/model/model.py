"""What the engine needs of a model: ours, or one of mlx-lm's through the adapter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import mlx.core as mx

from rl_mlx.model.plan import CacheSpec
from rl_mlx.model.step import Step


class Model(Protocol):
    """Tokens to hidden states, hidden states to logits."""

    dtype: mx.Dtype
    packs: bool
    """Whether a forward may be over a packed step, whose rows are tokens: where attention by
    ``Step.attend`` is all that brings tokens together.
    """

    @property
    def cache_specs(self) -> Sequence[CacheSpec]:
        """What each layer keeps."""

    def forward(self, tokens: mx.array, step: Step) -> mx.array:
        """Hidden states ``[B, S, hidden]`` of tokens ``[B, S]``."""

    def head(self, hidden: mx.array) -> mx.array:
        """Logits ``[..., vocab]`` of hidden states."""
