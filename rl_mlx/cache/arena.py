"""The arena: the KV cache of all running sequences, a row each.

Rows are left-aligned and know their own length, so joining, leaving, forking and taking tokens back
are a length change or one row copy, never a re-padding. Rows in use are always ``0 .. rows - 1``
and a step runs over a range of them, so that attention reads the arena in place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

from rl_mlx.cache.layers import KVLayer, KVPiece, State, StateLayer
from rl_mlx.model.plan import CacheSpec, KVSpec, StateSpec
from rl_mlx.model.rope import Offset
from rl_mlx.model.step import Advance, Mask
from rl_mlx.settings import DENSE_KV, KVFormat

GROWTH = 256
"""Tokens by which the rows grow."""


@dataclass(frozen=True)
class Piece:
    """What every layer keeps of a stretch of a row's tokens, in arrays of its own.

    A recurrent layer's part is its state after the last of them, or None where that was not at
    hand.
    """

    layers: tuple[KVPiece | State | None, ...]

    def arrays(self) -> list[mx.array]:
        """All that is held."""
        found: list[mx.array] = []
        for part in self.layers:
            if isinstance(part, KVPiece):
                found += part.arrays()
            elif part is not None:
                found += part
        return found

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(int(a.nbytes) for a in self.arrays())

    @property
    def has_state(self) -> bool:
        """Whether a row can go on from the end of it."""
        return all(part is not None for part in self.layers)


class Arena:
    """Rows of every layer. ``longest_step`` bounds a row's tokens in one step (a prefill chunk)."""

    def __init__(
        self,
        specs: Sequence[CacheSpec],
        dtype: mx.Dtype,
        longest_step: int = 512,
        kv: KVFormat = DENSE_KV,
    ) -> None:
        """Raises ``InvalidRequest`` where ``kv`` asks for what these layers cannot do."""
        self.lengths: list[int] = []
        self.longest_step = longest_step
        self._specs = specs
        self._dtype = dtype
        self._kv = kv
        self._layers = self._empty()
        self._recent: tuple[int, Sequence[int]] = (0, ())
        self._reserved = (0, 0)
        self._copies: list[mx.array] = []
        self._moved = False

    def _empty(self) -> list[KVLayer | StateLayer]:
        return [
            KVLayer(s, self.longest_step, self._dtype, self._kv)
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

    @property
    def is_recurrent(self) -> bool:
        """Whether some layer keeps a state, which cannot be cut at any token."""
        return any(isinstance(layer, StateLayer) for layer in self._layers)

    @property
    def has_memory(self) -> bool:
        """Whether some layer's state is known where steps end, and nowhere else."""
        return any(isinstance(s, StateSpec) and s.memory is not None for s in self._specs)

    def size_for(self, rows: int, length: int) -> tuple[int, int]:
        """Rows and their length in tokens once there were ``rows`` of up to ``length``."""
        return max(rows, self._reserved[0]), max(_grown(length), self._reserved[1])

    def bytes_for(self, rows: int, length: int) -> int:
        """Bytes that this arena takes once it has had ``rows`` rows of up to ``length`` tokens."""
        rows, length = self.size_for(rows, length)
        return sum(
            layer.bytes_for(rows, length) if isinstance(layer, KVLayer) else layer.bytes_for(rows)
            for layer in self._layers
        )

    def covers(self, rows: int, length: int) -> bool:
        """Whether a step that takes rows to ``length`` tokens needs no more memory."""
        return rows <= self._reserved[0] and length <= self._reserved[1]

    def arrays(self) -> list[mx.array]:
        """All arrays held, for evaluation."""
        return [a for layer in self._layers for a in layer.arrays()]

    def marks(self) -> list[mx.array]:
        """Empty arrays that are there once all has been written that was begun."""
        return [a[:0] for a in self.arrays()]

    def settle(self) -> None:
        """Wait for copies that are being taken out: until they are there, what they are copied
        from cannot be written in place. To be called before a step is given to the device.
        """
        mx.eval(self._copies)
        self._copies.clear()
        self._moved = False

    def _settle_moves(self) -> None:
        """Before anything is evaluated: that would write rows that were moved."""
        if self._moved:
            self.settle()

    def add_row(self) -> int:
        """Take an empty row into use; it is the last one."""
        self.lengths.append(0)
        for layer in self._layers:
            if isinstance(layer, StateLayer):
                layer.grow(self.rows)
                layer.clear_row(self.rows - 1)
        self.reserve(self._reserved[1])
        return self.rows - 1

    def copy_row(self, source: int, target: int) -> None:
        """Make ``target`` a copy of ``source``: a fork, or a move before ``drop_row``."""
        if source == target:
            return
        self._settle_moves()
        length = self.lengths[target] = self.lengths[source]
        copies = [c for layer in self._layers for c in layer.copy_row(source, target, length)]
        mx.async_eval(*copies)  # type: ignore[no-untyped-call]
        self._copies += copies
        self._moved = True

    def drop_row(self) -> None:
        """Give the last row back. With none left, the memory goes too."""
        self.lengths.pop()
        if not self.lengths:
            self._layers = self._empty()
            self._reserved = (0, 0)

    def begin(self, start: int, stop: int, count: int) -> ArenaStep:
        """A step of ``count`` new tokens for each of the rows ``start .. stop - 1``."""
        assert 0 < count <= self.longest_step, "a step has between one and longest_step tokens"
        offsets = self.lengths[start:stop]
        self.reserve(max(offsets) + count)
        self._recent = start, offsets
        return ArenaStep(self._layers, start, offsets, count)

    def advance(self, start: int, counts: Sequence[int]) -> None:
        """Keep the first ``counts[b]`` tokens of the step just run over rows ``start ...``."""
        for b, count in enumerate(counts):
            self.lengths[start + b] += count
        for layer in self._layers:
            if isinstance(layer, StateLayer):
                layer.commit(start, counts)

    def reserve(self, length: int, rows: int = 0) -> None:
        """Make room for ``length`` tokens in every row, those in use and ``rows`` at least; steps
        that need more do it themselves.
        """
        rows = max(rows, self.rows)
        if self.covers(rows, length):
            return
        self._reserved = max(rows, self._reserved[0]), max(_grown(length), self._reserved[1])
        for layer in self._layers:
            if isinstance(layer, KVLayer):
                layer.grow(*self._reserved)

    def shrink(self) -> None:
        """Give back what the rows in use do not need."""
        self._reserved = self.rows, _grown(max(self.lengths, default=0))
        for layer in self._layers:
            layer.shrink(*self._reserved)
        mx.eval(self.arrays())

    def piece_bytes(self, tokens: int) -> int:
        """Bytes that a piece of so many tokens takes."""
        return sum(layer.piece_bytes(tokens) for layer in self._layers)

    def take(self, row: int, first: int, last: int) -> Piece:
        """Start copying the tokens ``first .. last - 1`` of a row out; the row keeps them."""
        assert first < last <= self.lengths[row], "only tokens that are there can be taken"
        self._settle_moves()
        piece = Piece(
            tuple(
                layer.take(row, first, last)
                if isinstance(layer, KVLayer)
                else self._state(layer, row, last)
                for layer in self._layers
            )
        )
        mx.async_eval(*piece.arrays())  # type: ignore[no-untyped-call]
        self._copies += piece.arrays()
        return piece

    def put(self, row: int, pieces: Sequence[tuple[Piece, int]]) -> None:
        """Fill an empty row with the first ``count`` tokens of each piece, one after the other.

        Where layers are recurrent the last piece must be whole and have its state.
        """
        total = sum(count for _, count in pieces)
        self.reserve(total)
        for i, layer in enumerate(self._layers):
            if isinstance(layer, StateLayer):
                state = pieces[-1][0].layers[i]
                assert isinstance(state, tuple), "a row cannot go on without its state"
                layer.put(row, state)
                continue
            first = 0
            for piece, count in pieces:
                part = piece.layers[i]
                assert isinstance(part, KVPiece), "a piece of other layers"
                if first + count > total - layer.capacity:  # the rest is out of every window
                    layer.put(row, first, part, count)
                first += count
        self.lengths[row] = total

    def _state(self, layer: StateLayer, row: int, position: int) -> State | None:
        """A recurrent layer's state at ``position``, where it is now or passed in the last step."""
        if position == self.lengths[row]:
            return layer.take(row)
        start, offsets = self._recent
        b = row - start
        if 0 <= b < len(offsets) and offsets[b] < position:
            return layer.passed(b, position - offsets[b])
        return None


def _grown(length: int) -> int:
    return -(-length // GROWTH) * GROWTH


class ArenaStep:
    """One forward over a range of rows: the ``Step`` that the decoder sees."""

    def __init__(
        self, layers: Sequence[KVLayer | StateLayer], start: int, offsets: Sequence[int], count: int
    ) -> None:
        self._layers = layers
        self._start = start
        self._offsets = offsets
        self.rows, self.count = len(offsets), count
        self._even = all(o == offsets[0] for o in offsets)
        self._masks: dict[tuple[int | None, int, bool], Mask] = {}
        self.offset: Offset = offsets[0] if self._even else mx.array(list(offsets), mx.int32)

    def positions(self) -> list[int]:
        """Of all new tokens, row by row."""
        return [at + i for at in self._offsets for i in range(self.count)]

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
        self.write(layer, keys, values)
        return self.look(layer, queries, scale=scale, softcap=softcap, sinks=sinks)

    def write(self, layer: int, keys: mx.array, values: mx.array) -> None:
        """Keep the new keys and values."""
        self._kv(layer).write(self._start, self._offsets, keys, values)

    def look(
        self,
        layer: int,
        queries: mx.array,
        *,
        scale: float,
        softcap: float | None,
        sinks: mx.array | None,
    ) -> mx.array:
        """Attention over all that is kept."""
        return self._kv(layer).attend(
            queries, self._start, self._end, self.mask(layer),
            scale=scale, softcap=softcap, sinks=sinks,
        )  # fmt: skip

    def update(self, layer: int, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """See ``Step.update``."""
        self.write(layer, keys, values)
        return self._kv(layer).view(self._start, self._start + self.rows, self._end)

    def mask(self, layer: int, window: int | None = None) -> Mask:
        """See ``Step.mask``."""
        kept = self._kv(layer)
        key = kept.spec.window or window, kept.capacity, kept.spec.chunked
        if key not in self._masks:
            self._masks[key] = self._mask(*key)
        return self._masks[key]

    def history(self, layer: int, inputs: mx.array) -> mx.array:
        """See ``Step.history``."""
        kept = self._layers[layer]
        assert isinstance(kept, StateLayer), "a recurrent layer that keeps no state"
        return kept.extend(self._start, inputs)

    def scan(self, layer: int, inputs: State, advance: Advance) -> mx.array:
        """See ``Step.scan``."""
        kept = self._layers[layer]
        assert isinstance(kept, StateLayer), "a recurrent layer that keeps no state"
        return kept.scan(self._start, inputs, advance)

    def seen(self, layer: int) -> int:
        """See ``Step.seen``."""
        return min(self._end, self._kv(layer).capacity)

    def _kv(self, layer: int) -> KVLayer:
        kept = self._layers[layer]
        assert isinstance(kept, KVLayer), "attention over a layer that keeps no keys"
        return kept

    @property
    def _end(self) -> int:
        return max(self._offsets) + self.count

    def _mask(self, window: int | None, capacity: int, chunked: bool) -> Mask:
        """What each new token may look at; None or ``causal`` where that says it all."""
        if self._even and (window is None or self._end <= window):
            return None if self.count == 1 else "causal"
        last = mx.array(list(self._offsets))[:, None] + (self.count - 1)
        slots = mx.arange(min(self._end, capacity))[None]
        # The newest position that lies in a slot; below 0 where the slot is still empty.
        held = last - (last - slots) % capacity
        queries = (last + mx.arange(1 - self.count, 1)[None])[:, :, None]
        visible = (held[:, None] <= queries) & (held[:, None] >= 0)
        if window is not None:
            first = queries // window * window if chunked else queries - window + 1
            visible = visible & (held[:, None] >= first)
        return visible[:, None]
