"""The arena: the KV cache of all running sequences, a row each.

Rows are left-aligned and know their own length, so joining, leaving, forking and taking tokens back
are a length change or one row copy, never a re-padding. Rows in use are always ``0 .. rows - 1``
and a step runs over a range of them, so that attention reads the arena in place.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from rl_mlx.cache.layers import KVLayer, StateLayer
from rl_mlx.model.attention import Mask, attend
from rl_mlx.model.plan import CacheSpec, KVSpec
from rl_mlx.model.rope import Offset

GROWTH = 256
"""Tokens by which the rows grow."""


class Arena:
    """Rows of every layer. ``longest_step`` bounds the tokens of a row in one step (a prefill
    chunk).
    """

    def __init__(
        self, specs: Sequence[CacheSpec], dtype: mx.Dtype, longest_step: int = 512
    ) -> None:
        self.lengths: list[int] = []
        self.longest_step = longest_step
        self._specs = specs
        self._dtype = dtype
        self._layers = self._empty()

    def _empty(self) -> list[KVLayer | StateLayer]:
        return [
            KVLayer(s, self.longest_step, self._dtype)
            if isinstance(s, KVSpec)
            else StateLayer(s, self._dtype)
            for s in self._specs
        ]

    @property
    def rows(self) -> int:
        """Rows in use."""
        return len(self.lengths)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(int(a.nbytes) for a in self.arrays())

    def arrays(self) -> list[mx.array]:
        """All arrays held, for evaluation."""
        return [a for layer in self._layers for a in layer.arrays()]

    def add_row(self) -> int:
        """Take an empty row into use; it is the last one."""
        self.lengths.append(0)
        row = self.rows - 1
        for layer in self._layers:
            layer.grow(self.rows, 0)
            layer.clear_row(row)
        return row

    def copy_row(self, source: int, target: int) -> None:
        """Make ``target`` a copy of ``source``: a fork, or a move before ``drop_row``."""
        if source != target:
            self.lengths[target] = self.lengths[source]
            for layer in self._layers:
                layer.copy_row(source, target)

    def drop_row(self) -> None:
        """Give the last row back. With none left, the memory goes too."""
        self.lengths.pop()
        if not self.lengths:
            self._layers = self._empty()

    def begin(self, start: int, stop: int, count: int) -> ArenaStep:
        """A step of ``count`` new tokens for each of the rows ``start .. stop - 1``."""
        assert 0 < count <= self.longest_step, (
            "a step is at least one token and at most the longest"
        )
        offsets = self.lengths[start:stop]
        needed = -(-(max(offsets) + count) // GROWTH) * GROWTH
        for layer in self._layers:
            layer.grow(self.rows, needed)
        return ArenaStep(self._layers, start, offsets, count)

    def advance(self, start: int, counts: Sequence[int]) -> None:
        """Keep the first ``counts[b]`` tokens of the step just run over rows ``start ...``."""
        for b, count in enumerate(counts):
            self.lengths[start + b] += count
        for layer in self._layers:
            if isinstance(layer, StateLayer):
                layer.commit(start, counts)


class ArenaStep:
    """One forward over a range of rows: the ``Step`` that the decoder sees."""

    def __init__(
        self, layers: Sequence[KVLayer | StateLayer], start: int, offsets: Sequence[int], count: int
    ) -> None:
        self._layers = layers
        self._start = start
        self._offsets = offsets
        self._count = count
        self._even = all(o == offsets[0] for o in offsets)
        self._masks: dict[tuple[int | None, int], Mask] = {}
        self.offset: Offset = offsets[0] if self._even else mx.array(list(offsets), mx.int32)

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
        """See ``Step.attend``."""
        keys, values = self.update(layer, keys, values)
        mask = self.mask(layer)
        return attend(queries, keys, values, mask, scale=scale, softcap=softcap, sinks=sinks)

    def update(self, layer: int, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """See ``Step.update``."""
        kept = self._kv(layer)
        kept.write(self._start, self._offsets, keys, values)
        return kept.view(self._start, self._start + len(self._offsets), self._end)

    def mask(self, layer: int, window: int | None = None) -> Mask:
        """See ``Step.mask``."""
        kept = self._kv(layer)
        key = kept.spec.window or window, kept.capacity
        if key not in self._masks:
            self._masks[key] = self._mask(*key)
        return self._masks[key]

    def history(self, layer: int, inputs: mx.array) -> mx.array:
        """See ``Step.history``."""
        kept = self._layers[layer]
        assert isinstance(kept, StateLayer), "a recurrent layer that keeps no state"
        return kept.extend(self._start, inputs)

    def seen(self, layer: int) -> int:
        """See ``Step.seen``."""
        return min(self._end, self._kv(layer).capacity)

    def _kv(self, layer: int) -> KVLayer:
        kept = self._layers[layer]
        assert isinstance(kept, KVLayer), "attention over a layer that keeps no keys"
        return kept

    @property
    def _end(self) -> int:
        return max(self._offsets) + self._count

    def _mask(self, window: int | None, capacity: int) -> Mask:
        """What each new token may look at; None or ``causal`` where that says it all."""
        if self._even and (window is None or self._end <= window):
            return None if self._count == 1 else "causal"
        last = mx.array(list(self._offsets))[:, None] + (self._count - 1)
        slots = mx.arange(min(self._end, capacity))[None]
        # The newest position that lies in a slot; below 0 where the slot is still empty.
        held = last - (last - slots) % capacity
        queries = (last + mx.arange(1 - self._count, 1)[None])[:, :, None]
        visible = (held[:, None] <= queries) & (held[:, None] >= 0)
        if window is not None:
            visible = visible & (held[:, None] > queries - window)
        return visible[:, None]
