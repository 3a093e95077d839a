"""Runs steps on the device: which tokens go in, which rows they belong to, what is sampled."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import Protocol

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from rl_mlx.cache.arena import Arena
from rl_mlx.engine.sequence import Sequence
from rl_mlx.model.plan import CacheSpec
from rl_mlx.model.step import Step
from rl_mlx.sample.sampler import Row, Sampled, Sampler


class Model(Protocol):
    """What the runner needs of a model: ours, or one of mlx-lm's through the adapter."""

    dtype: mx.Dtype

    @property
    def cache_specs(self) -> Seq[CacheSpec]:
        """What each layer keeps."""

    def forward(self, tokens: mx.array, step: Step) -> mx.array:
        """Hidden states ``[B, S, hidden]`` of tokens ``[B, S]``."""

    def head(self, hidden: mx.array) -> mx.array:
        """Logits ``[..., vocab]`` of hidden states."""


class Runner:
    """The device side of the engine. Running sequences own rows ``0 ..``; the one being prefilled
    the last.
    """

    def __init__(self, model: Model, chunk: int) -> None:
        self._model = model
        self._chunk = chunk
        self._sampling: tuple[tuple[Sequence, ...], Sampler] | None = None
        self._owners: list[Sequence] = []
        self.arena = self._new_arena()

    def _new_arena(self) -> Arena:
        return Arena(self._model.cache_specs, self._model.dtype, self._chunk)

    def prefill(self, sequence: Sequence, count: int) -> None:
        """Start reading ``count`` more prompt tokens; waits for nothing."""
        if sequence.row is None:
            sequence.row = self.arena.add_row()
            self._owners.append(sequence)
        row = sequence.row
        tokens = mx.array(sequence.prompt[sequence.cached : sequence.cached + count])[None]
        self._hidden = self._model.forward(tokens, self.arena.begin(row, row + 1, count))
        self.arena.advance(row, [count])
        sequence.cached += count
        sequence.forwards += 1
        mx.async_eval(*self.arena.arrays())  # type: ignore[no-untyped-call]

    def first(self, sequence: Sequence) -> Sampled:
        """The answer's first token, from the last chunk's last position."""
        logits = self._model.head(self._hidden[:, -1])
        return self._sample((sequence,), logits)

    def decode(self, batch: tuple[Sequence, ...], inputs: mx.array | None) -> Sampled:
        """Start one more token each; ``inputs`` are their last tokens if still on the device."""
        if inputs is None:
            inputs = mx.array([s.answer[-1] for s in batch])
        hidden = self._model.forward(inputs[:, None], self.arena.begin(0, len(batch), 1))
        self.arena.advance(0, [1] * len(batch))
        for s in batch:
            s.cached += 1
            s.forwards += 1
        return self._sample(batch, self._model.head(hidden[:, -1]))

    def needs_tokens(self, batch: tuple[Sequence, ...]) -> bool:
        """Whether sampling for this batch has to see all earlier tokens on the host."""
        return self._sampler(batch).needs_tokens

    def release(self, sequence: Sequence) -> None:
        """Give a sequence's row back. Rows stay without gaps, the running ones before the one being
        prefilled.
        """
        hole, owners = sequence.row, self._owners
        if hole is None:
            return
        last = len(owners) - 1
        last_running = last if owners[last].prefilled else last - 1
        for source in (last_running, last):
            if source > hole:
                self.arena.copy_row(source, hole)
                owners[hole] = owners[source]
                owners[hole].row = hole
                hole = source
        owners.pop()
        self.arena.drop_row()
        sequence.row = None

    def reset(self) -> None:
        """Drop all rows: what is in them cannot be trusted any more."""
        for owner in self._owners:
            owner.row = None
        self._owners = []
        self._sampling = None
        self.arena = self._new_arena()

    def _sampler(self, batch: tuple[Sequence, ...]) -> Sampler:
        if self._sampling is None or self._sampling[0] != batch:
            self._sampling = batch, Sampler([s.request.params for s in batch])
        return self._sampling[1]

    def _sample(self, batch: tuple[Sequence, ...], logits: mx.array) -> Sampled:
        rows = [
            Row(s.request.params, s.seed, s.prompt, s.answer, len(s.answer) + s.in_flight)
            for s in batch
        ]
        sampled = self._sampler(batch).sample(logits, rows)
        mx.async_eval(*sampled.arrays())  # type: ignore[no-untyped-call]
        for s in batch:
            s.in_flight += 1
        return sampled

    def hidden(self, ids: Seq[int]) -> mx.array:
        """Hidden states ``[1, len(ids), hidden]`` of a sequence of its own, outside the arena."""
        arena = self._new_arena()
        row = arena.add_row()
        parts = []
        for start in range(0, len(ids), self._chunk):
            chunk = mx.array(list(ids[start : start + self._chunk]))[None]
            count = chunk.shape[1]
            parts.append(self._model.forward(chunk, arena.begin(row, row + 1, count)))
            arena.advance(row, [count])
            mx.eval(parts[-1], *arena.arrays())
        return mx.concatenate(parts, axis=1)

    def logits(self, ids: Seq[int]) -> npt.NDArray[np.float32]:
        """Logits of every position, float32 ``[len(ids), vocab]``."""
        hidden = self.hidden(ids)
        chunks = [
            np.array(self._model.head(hidden[0, i : i + self._chunk]).astype(mx.float32))
            for i in range(0, len(ids), self._chunk)
        ]
        return np.concatenate(chunks)
