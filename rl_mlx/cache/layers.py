"""What one layer of the arena keeps: keys and values by position, or the last inputs of a
convolution.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from rl_mlx.model.plan import KVSpec, StateSpec


class KVLayer:
    """Keys and values ``[slots, kv_heads, capacity, head_dim]``; the token at position p lies at p
    mod capacity.

    A layer that sees everything has a capacity beyond every length, so p lies at p. A sliding
    layer's capacity stops at its window plus the longest step: what a step overwrites is out of the
    window of all it may look at, even when most of the step is taken back afterwards.
    """

    def __init__(self, spec: KVSpec, longest_step: int, dtype: mx.Dtype) -> None:
        self.spec = spec
        self._most = None if spec.window is None else spec.window + longest_step
        self.keys = mx.zeros((0, spec.heads, 0, spec.key_dim), dtype)
        self.values = mx.zeros((0, spec.heads, 0, spec.value_dim), dtype)

    @property
    def capacity(self) -> int:
        """Tokens a row can hold."""
        return int(self.keys.shape[2])

    def capacity_for(self, length: int) -> int:
        """The capacity a row of ``length`` tokens wants."""
        return length if self._most is None else min(length, self._most)

    def grow(self, slots: int, length: int) -> None:
        """Make room for ``slots`` rows of ``length`` tokens; never shrinks."""
        have, _, capacity, _ = self.keys.shape
        slots, length = max(0, slots - have), max(0, self.capacity_for(length) - capacity)
        if slots or length:
            more = [(0, slots), (0, 0), (0, length), (0, 0)]
            self.keys, self.values = mx.pad(self.keys, more), mx.pad(self.values, more)

    def write(self, start: int, offsets: Sequence[int], keys: mx.array, values: mx.array) -> None:
        """Put ``[B, kv_heads, S, D]`` into rows ``start ...`` at each row's ``offsets``."""
        count, capacity = keys.shape[2], self.capacity
        at = offsets[0] % capacity
        if at + count <= capacity and all(o == offsets[0] for o in offsets):
            rows = slice(start, start + len(offsets))
            self.keys[rows, :, at : at + count] = keys
            self.values[rows, :, at : at + count] = values
            return
        places = (mx.array(list(offsets))[:, None] + mx.arange(count)) % capacity
        rows_ = mx.arange(start, start + len(offsets))[:, None]
        self.keys[rows_, :, places] = keys.transpose(0, 2, 1, 3)
        self.values[rows_, :, places] = values.transpose(0, 2, 1, 3)

    def view(self, start: int, stop: int, length: int) -> tuple[mx.array, mx.array]:
        """Keys and values of rows ``start .. stop`` that hold up to ``length`` tokens."""
        seen = min(length, self.capacity)
        return self.keys[start:stop, :, :seen], self.values[start:stop, :, :seen]

    def copy_row(self, source: int, target: int) -> None:
        """Make row ``target`` what ``source`` is."""
        self.keys[target] = self.keys[source]
        self.values[target] = self.values[source]

    def clear_row(self, row: int) -> None:
        """Nothing: what lies past a row's length is never seen."""

    def arrays(self) -> list[mx.array]:
        """All that is held."""
        return [self.keys, self.values]


class StateLayer:
    """The last ``taps - 1`` inputs of a causal convolution, ``[slots, taps - 1, width]``."""

    def __init__(self, spec: StateSpec, dtype: mx.Dtype) -> None:
        self.spec = spec
        self.state = mx.zeros((0, spec.taps - 1, spec.width), dtype)
        self._pending: mx.array | None = None

    def grow(self, slots: int, length: int) -> None:  # noqa: ARG002  (a state has no length)
        """Make room for ``slots`` rows."""
        missing = slots - self.state.shape[0]
        if missing > 0:
            self.state = mx.pad(self.state, [(0, missing), (0, 0), (0, 0)])

    def extend(self, start: int, inputs: mx.array) -> mx.array:
        """``inputs`` ``[B, S, width]`` after the kept ones; ``commit`` decides how many of them are
        kept.
        """
        kept = self.state[start : start + inputs.shape[0]]
        self._pending = mx.concatenate([kept, inputs], axis=1)
        return self._pending

    def commit(self, start: int, counts: Sequence[int]) -> None:
        """Keep the first ``counts[b]`` new inputs of each row."""
        assert self._pending is not None, "commit without a step"
        keep = self.spec.taps - 1
        if all(c == counts[0] for c in counts):
            state = self._pending[:, counts[0] : counts[0] + keep]
        else:
            places = mx.array(list(counts))[:, None] + mx.arange(keep)
            state = mx.take_along_axis(self._pending, places[..., None], axis=1)
        self.state[start : start + len(counts)] = state
        self._pending = None

    def copy_row(self, source: int, target: int) -> None:
        """Make row ``target`` what ``source`` is."""
        self.state[target] = self.state[source]

    def clear_row(self, row: int) -> None:
        """A new sequence starts from silence."""
        self.state[row] = mx.zeros(self.state.shape[1:], self.state.dtype)

    def arrays(self) -> list[mx.array]:
        """All that is held."""
        return [self.state]
