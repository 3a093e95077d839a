"""One forward over steps of different lengths: streams that go on, and prompts that are read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import cast

import mlx.core as mx

from rl_mlx.cache.arena import Arena, ArenaStep
from rl_mlx.model.model import Model
from rl_mlx.model.rope import Offset
from rl_mlx.model.step import Step

Span = tuple[int, int, int]
"""Rows, from the first up to one, and how many new tokens each of them has."""


def forward(model: Model, arena: Arena, spans: Sequence[Span], tokens: list[mx.array]) -> mx.array:
    """Hidden states ``[N, hidden]`` of the ``tokens`` of each span, one after the other; the arena
    has them afterwards. More than one span is for a model that ``packs``.
    """
    steps = [arena.begin(*span) for span in spans]
    if len(steps) == 1:
        hidden = model.forward(tokens[0].reshape(steps[0].rows, -1), steps[0])
    else:
        packed = cast(Step, PackedStep(steps))  # as much of one as such a model needs
        hidden = model.forward(mx.concatenate(tokens)[:, None], packed)
    for (start, stop, count), ids in zip(spans, tokens, strict=True):
        assert ids.size == (stop - start) * count
        arena.advance(start, [count] * (stop - start))
    return hidden.reshape(-1, hidden.shape[-1])


class PackedStep:
    """Steps one after the other, each of their tokens a row of its own.

    So the products of all of them are one, without padding, and only attention is each step's own.
    For models whose layers ask a ``Step`` for nothing else (``Model.packs``).
    """

    def __init__(self, steps: Sequence[ArenaStep]) -> None:
        self._steps = steps
        positions = [p for step in steps for p in step.positions()]
        self.offset: Offset = mx.array(positions, mx.int32)

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
        """See ``Step.attend``; ``[N, heads, 1, D]`` of N tokens."""
        for step, (new_keys, new_values) in zip(self._steps, self._parts(keys, values)):
            step.write(layer, new_keys, new_values)
        # Only then: what is being looked at could not be written in place.
        return mx.concatenate(
            [
                _together(step.look(layer, q, scale=scale, softcap=softcap, sinks=sinks))
                for step, (q,) in zip(self._steps, self._parts(queries))
            ]
        )

    def _parts(self, *arrays: mx.array) -> Iterator[list[mx.array]]:
        """Each step's part of ``[N, heads, 1, D]``, as it wants them."""
        first = 0
        for step in self._steps:
            last = first + step.rows * step.count
            yield [_apart(x[first:last], step.count) for x in arrays]
            first = last


def _apart(x: mx.array, count: int) -> mx.array:
    """``[rows * count, heads, 1, D]`` as ``[rows, heads, count, D]``."""
    if count == 1:
        return x
    _, heads, _, dim = x.shape
    return x.reshape(-1, count, heads, dim).swapaxes(1, 2)


def _together(x: mx.array) -> mx.array:
    """Back."""
    rows, heads, count, dim = x.shape
    return x if count == 1 else x.swapaxes(1, 2).reshape(rows * count, heads, 1, dim)
