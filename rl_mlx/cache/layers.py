"""What one layer of the arena keeps: keys and values, or the state of a recurrence."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from rl_mlx.cache.codec import Codec, Plain, Planes, Quantized
from rl_mlx.model.attention import attend, attend_by
from rl_mlx.model.plan import KVSpec, StateSpec
from rl_mlx.model.step import Advance, Mask
from rl_mlx.settings import KVFormat


class Ring:
    """Vectors ``[slots, heads, capacity, D]`` in a codec's planes; position p lies at p mod
    capacity.

    With a capacity beyond every length, p lies at p.
    """

    def __init__(self, codec: Codec, heads: int, dim: int, dtype: mx.Dtype) -> None:
        self.codec = codec
        self.planes = [mx.zeros((0, heads, 0, w), t) for w, t in codec.planes(dim, dtype)]

    @property
    def capacity(self) -> int:
        """Positions a row can hold."""
        return int(self.planes[0].shape[2])

    def grow(self, slots: int, capacity: int) -> None:
        """Make room; never shrinks."""
        have = self.planes[0].shape
        more = max(0, slots - have[0]), max(0, capacity - have[2])
        if any(more):
            widths = [(0, more[0]), (0, 0), (0, more[1]), (0, 0)]
            self.planes = [mx.pad(p, widths) for p in self.planes]

    def shrink(self, slots: int, capacity: int) -> None:
        """Keep no more than this."""
        self.planes = [mx.contiguous(p[:slots, :, :capacity]) for p in self.planes]

    def token_bytes(self) -> int:
        """Bytes of one token in one row."""
        return sum(p.shape[1] * p.shape[3] * p.dtype.size for p in self.planes)

    def write(self, start: int, offsets: Sequence[int], x: mx.array) -> None:
        """Put ``[B, heads, S, D]`` into rows ``start ...`` at each row's offset."""
        self.put(start, offsets, self.codec.encode(x))

    def put(self, start: int, offsets: Sequence[int], planes: Planes) -> None:
        """As ``write``, of what is encoded already."""
        count, capacity = planes[0].shape[2], self.capacity
        at = offsets[0] % capacity
        if at + count <= capacity and all(o == offsets[0] for o in offsets):
            rows = slice(start, start + len(offsets))
            for kept, new in zip(self.planes, planes):
                kept[rows, :, at : at + count] = new
            return
        places = (mx.array(list(offsets))[:, None] + mx.arange(count)) % capacity
        each = mx.arange(start, start + len(offsets))[:, None]
        for kept, new in zip(self.planes, planes):
            kept[each, :, places] = new.transpose(0, 2, 1, 3)

    def view(self, start: int, stop: int, first: int, last: int) -> Planes:
        """Slots ``first .. last - 1`` of rows ``start .. stop - 1``."""
        return [p[start:stop, :, first:last] for p in self.planes]

    def take(self, row: int, first: int, last: int) -> Planes:
        """Positions ``first .. last - 1`` of a row, as arrays of their own."""
        capacity = self.capacity
        if last <= capacity:
            return [mx.contiguous(p[row, :, first:last]) for p in self.planes]
        places = mx.arange(first, last) % capacity
        return [mx.take(p[row], places, axis=1) for p in self.planes]

    def copy_row(self, source: int, target: int, length: int) -> Planes:
        """Make row ``target`` what the ``length`` tokens of ``source`` are; returns those, which
        are to be there before the planes can be written in place.
        """
        seen = slice(min(length, self.capacity))
        return _copied(self.planes, (source, slice(None), seen), (target, slice(None), seen))


@dataclass(frozen=True)
class KVPiece:
    """Keys and values of a stretch of tokens, taken out of a row: planes ``[heads, n, width]``.

    ``head`` are those of its tokens that the cache holds unquantized, if any.
    """

    keys: Planes
    values: Planes
    head: tuple[Planes, Planes] | None = None

    def arrays(self) -> list[mx.array]:
        """All that is held."""
        head = [*self.head[0], *self.head[1]] if self.head else []
        return [*self.keys, *self.values, *head]


class KVLayer:
    """Keys and values of every row.

    A sliding layer's capacity stops at its window plus the longest step: what a step overwrites is
    out of the window of all it may look at, even when most of the step is taken back afterwards.
    With a ``KVFormat`` that starts past a position, the tokens before it are kept unquantized in a
    ring of their own.
    """

    def __init__(self, spec: KVSpec, longest_step: int, dtype: mx.Dtype, kv: KVFormat) -> None:
        self.spec = spec
        self._most = None if spec.window is None else spec.window + longest_step
        key_codec = Quantized(kv.keys, spec.key_dim) if kv.keys else Plain()
        value_codec = Quantized(kv.values, spec.value_dim) if kv.values else Plain()
        self._is_plain = kv.keys is None and kv.values is None
        self.keys = Ring(key_codec, spec.heads, spec.key_dim, dtype)
        self.values = Ring(value_codec, spec.heads, spec.value_dim, dtype)
        # A sliding layer is small as it is, and its first tokens leave the window anyway.
        self._start = 0 if spec.window is not None or self._is_plain else kv.start
        self._head = (
            Ring(Plain(), spec.heads, spec.key_dim, dtype),
            Ring(Plain(), spec.heads, spec.value_dim, dtype),
        )

    @property
    def capacity(self) -> int:
        """Tokens a row can hold."""
        return self.keys.capacity

    def capacity_for(self, length: int) -> int:
        """The capacity a row of ``length`` tokens wants."""
        return length if self._most is None else min(length, self._most)

    def bytes_for(self, slots: int, length: int) -> int:
        """Bytes that ``slots`` rows of ``length`` tokens take."""
        capacity = max(self.capacity, self.capacity_for(length))
        head = self._start + 1 if self._start else 0
        a_head = sum(ring.token_bytes() for ring in self._head)
        return slots * (capacity * self.piece_bytes(1) + head * a_head)

    def piece_bytes(self, tokens: int) -> int:
        """Bytes of the keys and values of so many tokens."""
        return tokens * (self.keys.token_bytes() + self.values.token_bytes())

    def shrink(self, slots: int, length: int) -> None:
        """Give back all but ``slots`` rows of ``length``; a ring that turns keeps its size."""
        capacity = self.capacity if self.capacity == self._most else self.capacity_for(length)
        self.keys.shrink(slots, capacity)
        self.values.shrink(slots, capacity)
        for ring in self._head:
            ring.shrink(slots, ring.capacity)

    def grow(self, slots: int, length: int) -> None:
        """Make room for ``slots`` rows of ``length`` tokens."""
        capacity = self.capacity_for(length)
        self.keys.grow(slots, capacity)
        self.values.grow(slots, capacity)
        if self._start:
            for ring in self._head:
                ring.grow(slots, self._start + 1)  # the last slot takes what lies past the start

    def write(self, start: int, offsets: Sequence[int], keys: mx.array, values: mx.array) -> None:
        """Put ``[B, kv_heads, S, D]`` into rows ``start ...`` at each row's ``offsets``."""
        self.keys.write(start, offsets, keys)
        self.values.write(start, offsets, values)
        if min(offsets) < self._start:
            each = mx.arange(start, start + len(offsets))[:, None]
            places = mx.array(list(offsets))[:, None] + mx.arange(keys.shape[2])
            places = mx.minimum(places, self._start)
            for ring, new in zip(self._head, (keys, values)):
                ring.planes[0][each, :, places] = new.transpose(0, 2, 1, 3)

    def view(self, start: int, stop: int, length: int) -> tuple[mx.array, mx.array]:
        """Plain keys and values of rows ``start .. stop - 1`` that hold up to ``length`` tokens."""
        assert self._is_plain, "a quantized cache has no plain view"
        seen = min(length, self.capacity)
        return self.keys.view(start, stop, 0, seen)[0], self.values.view(start, stop, 0, seen)[0]

    def attend(
        self,
        queries: mx.array,
        start: int,
        length: int,
        mask: Mask,
        *,
        scale: float,
        softcap: float | None,
        sinks: mx.array | None,
    ) -> mx.array:
        """Attention of ``[B, heads, S, D]`` over rows ``start ...`` that hold up to ``length``
        tokens.
        """
        stop = start + queries.shape[0]
        if self._is_plain:
            keys, values = self.view(start, stop, length)
            return attend(queries, keys, values, mask, scale=scale, softcap=softcap, sinks=sinks)
        seen, head = min(length, self.capacity), min(length, self._start)
        parts = [(ring, 0, head) for ring in self._head] if head else []
        parts += [(ring, head, seen) for ring in (self.keys, self.values)] if seen > head else []
        views = [(r.codec, r.view(start, stop, a, b), b - a) for r, a, b in parts]

        def scores(grouped: mx.array) -> mx.array:
            found = [c.scores(grouped, _grouped(v)) for c, v, _ in views[::2]]
            return mx.concatenate(found, axis=-1) if len(found) > 1 else found[0]

        def mix(weights: mx.array) -> mx.array:
            cuts = mx.split(weights, [views[1][2]], axis=-1) if len(views) > 2 else [weights]
            mixed = [c.mix(w, _grouped(v)) for w, (c, v, _) in zip(cuts, views[1::2])]
            return mixed[0] if len(mixed) == 1 else mixed[0] + mixed[1]

        return attend_by(
            scores, mix, queries, self.spec.heads, seen, mask,
            scale=scale, softcap=softcap, sinks=sinks,
        )  # fmt: skip

    def take(self, row: int, first: int, last: int) -> KVPiece:
        """What is kept of the tokens ``first .. last - 1`` of a row."""
        head = None
        if first < self._start:
            end = min(last, self._start)
            head = self._head[0].take(row, first, end), self._head[1].take(row, first, end)
        return KVPiece(self.keys.take(row, first, last), self.values.take(row, first, last), head)

    def put(self, row: int, first: int, piece: KVPiece, count: int) -> None:
        """Put the first ``count`` tokens of a piece into a row, from position ``first`` on."""
        for ring, planes in ((self.keys, piece.keys), (self.values, piece.values)):
            ring.put(row, [first], [p[None, :, :count] for p in planes])
        if piece.head is not None:
            for ring, planes in zip(self._head, piece.head):
                ring.put(row, [first], [p[None, :, :count] for p in planes])

    def copy_row(self, source: int, target: int, length: int) -> Planes:
        """See ``Ring.copy_row``."""
        rings = (self.keys, self.values, *self._head)
        return [c for ring in rings if ring.capacity for c in ring.copy_row(source, target, length)]

    def arrays(self) -> list[mx.array]:
        """All that is held."""
        return [p for ring in (self.keys, self.values, *self._head) for p in ring.planes]


def _copied(arrays: Planes, source: Any, target: Any) -> Planes:
    """Copies of what lies at index ``source`` of each array, which are also put at ``target``."""
    copies = [mx.contiguous(array[source]) for array in arrays]
    for array, copy in zip(arrays, copies):
        array[target] = copy
    return copies


def _grouped(planes: Planes) -> Planes:
    """With an axis for the query heads that share a key head."""
    return [p[:, :, None] for p in planes]


State = tuple[mx.array, ...]
"""What a recurrent layer keeps of a row: its last inputs, and its memory where it has one."""


class StateLayer:
    """The last ``taps - 1`` inputs of a causal convolution, ``[slots, taps - 1, width]``, and the
    memory behind it, ``[slots, ...]``.
    """

    def __init__(self, spec: StateSpec, dtype: mx.Dtype) -> None:
        self.spec = spec
        self.state = mx.zeros((0, spec.taps - 1, spec.width), dtype)
        self.memory = None if spec.memory is None else mx.zeros((0, *spec.memory), mx.float32)
        self._recent: mx.array | None = None
        self._scan: _Scan | None = None

    def bytes_for(self, slots: int) -> int:
        """Bytes that ``slots`` rows take."""
        memory = math.prod(self.spec.memory) * 4 if self.spec.memory else 0
        return slots * ((self.spec.taps - 1) * self.spec.width * self.state.dtype.size + memory)

    def piece_bytes(self, tokens: int) -> int:  # noqa: ARG002  (a state has no length)
        """Bytes of a row's state."""
        return self.bytes_for(1)

    def shrink(self, slots: int, length: int) -> None:  # noqa: ARG002  (a state has no length)
        """Give back all but ``slots`` rows."""
        self.state = mx.contiguous(self.state[:slots])
        if self.memory is not None:
            self.memory = mx.contiguous(self.memory[:slots])

    def grow(self, slots: int) -> None:
        """Make room for ``slots`` rows."""
        missing = slots - self.state.shape[0]
        if missing > 0:
            self.state = _longer(self.state, missing)
            self.memory = None if self.memory is None else _longer(self.memory, missing)

    def extend(self, start: int, inputs: mx.array) -> mx.array:
        """``inputs`` ``[B, S, width]`` after the kept ones; ``commit`` says how many are kept."""
        kept = self.state[start : start + inputs.shape[0]]
        self._recent = mx.concatenate([kept, inputs], axis=1)
        return self._recent

    def scan(self, start: int, inputs: State, advance: Advance) -> mx.array:
        """Outputs of ``advance``; ``commit`` says of how many tokens the memory is kept."""
        assert self.memory is not None, "a layer without a memory"
        before = self.memory[start : start + inputs[0].shape[0]]
        outputs, after = advance(before, inputs)
        self._scan = _Scan(before, inputs, advance, after)
        return outputs

    def commit(self, start: int, counts: Sequence[int]) -> None:
        """Keep the first ``counts[b]`` new inputs of each row."""
        assert self._recent is not None, "commit without a step"
        rows = slice(start, start + len(counts))
        if all(c == counts[0] for c in counts):
            state = self._recent[:, counts[0] : counts[0] + self.spec.taps - 1]
        else:
            places = mx.array(list(counts))[:, None] + mx.arange(self.spec.taps - 1)
            state = mx.take_along_axis(self._recent, places[..., None], axis=1)
        self.state[rows] = state
        if self.memory is not None:
            assert self._scan is not None, "commit without a scan"
            self.memory[rows] = self._scan.memory(counts)
            self._scan = None  # its inputs are large

    def passed(self, row: int, count: int) -> State | None:
        """The state after ``count`` inputs of the step just run, of one of its rows; None of a
        layer with a memory, which is kept for the end of a step alone.
        """
        assert self._recent is not None, "no step was run"
        if self.memory is not None:
            return None
        return (mx.contiguous(self._recent[row, count : count + self.spec.taps - 1]),)

    def take(self, row: int) -> State:
        """A row's state, in arrays of its own."""
        kept = [self.state] if self.memory is None else [self.state, self.memory]
        return tuple(mx.contiguous(array[row]) for array in kept)

    def put(self, row: int, state: State) -> None:
        """Set a row's state."""
        self.state[row] = state[0]
        if self.memory is not None:
            self.memory[row] = state[1]

    def copy_row(self, source: int, target: int, length: int) -> Planes:  # noqa: ARG002
        """As ``Ring.copy_row``; a state has no length."""
        return _copied(self.arrays(), source, target)

    def clear_row(self, row: int) -> None:
        """A new sequence starts from silence."""
        for array in self.arrays():
            array[row] = mx.zeros(array.shape[1:], array.dtype)

    def arrays(self) -> list[mx.array]:
        """All that is held."""
        return [self.state] if self.memory is None else [self.state, self.memory]


@dataclass(frozen=True)
class _Scan:
    """The scan of a step, to be run again over fewer tokens where not all of them stay."""

    before: mx.array
    inputs: State
    advance: Advance
    after: mx.array

    def memory(self, counts: Sequence[int]) -> mx.array:
        """The memory of each row after its first ``counts[b]`` tokens."""
        length = self.inputs[0].shape[1]
        if all(count == length for count in counts):
            return self.after
        stays = mx.arange(length) < mx.array(list(counts))[:, None]
        inputs = tuple(
            mx.where(stays.reshape(*stays.shape, *[1] * (x.ndim - 2)), x, mx.zeros_like(x))
            for x in self.inputs
        )
        return self.advance(self.before, inputs)[1]


def _longer(array: mx.array, more: int) -> mx.array:
    return mx.pad(array, [(0, more), *[(0, 0)] * (array.ndim - 1)])
