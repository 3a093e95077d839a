"""What a decoder needs of the KV cache during one forward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import mlx.core as mx

from rl_mlx.model.rope import Offset

Mask = None | str | mx.array
Advance = Callable[[mx.array, tuple[mx.array, ...]], tuple[mx.array, mx.array]]
"""From a memory ``[B, ...]`` and inputs ``[B, S, ...]`` to outputs ``[B, S, ...]`` and the memory
after them. Inputs of zeros leave it as it is.
"""


class Step(Protocol):
    """One forward of ``S`` new tokens for each of ``B`` rows."""

    @property
    def offset(self) -> Offset:
        """Position of each row's first new token: one int where all are the same, else int32
        ``[B]``.
        """

    def attend(
        self,
        layer: int,
        queries: mx.array,
        keys: mx.array,
        values: mx.array,
        *,
        scale: float,
        softcap: float | None,
        sinks: mx.array | None,
    ) -> mx.array:
        """Keep the new keys and values ``[B, kv_heads, S, D]``; attend from ``queries`` ``[B,
        heads, S, D]``.

        Causal, within the layer's window. Returns ``[B, heads, S, D]``.
        """

    def update(self, layer: int, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Keep the new keys and values; return all that are kept, ``[B, kv_heads, L, D]``."""

    def mask(self, layer: int, window: int | None = None) -> Mask:
        """What each new token may look at: boolean ``[B, 1, S, L]``, or None (all), or
        ``causal``. ``window`` counts for a layer that keeps everything.
        """

    def seen(self, layer: int) -> int:
        """That ``L``."""

    def history(self, layer: int, inputs: mx.array) -> mx.array:
        """Keep the new inputs ``[B, S, width]`` of a recurrent layer; return them after the ones it
        kept.

        The result is ``[B, taps - 1 + S, width]``.
        """

    def scan(self, layer: int, inputs: tuple[mx.array, ...], advance: Advance) -> mx.array:
        """Move a recurrent layer's memory on by ``advance``; return its outputs."""
