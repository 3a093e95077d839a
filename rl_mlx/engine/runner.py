"""Runs steps on the device: which tokens go in, which rows they belong to, what is sampled."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from rl_mlx.cache.arena import Arena, Piece
from rl_mlx.cache.disk import DiskTier
from rl_mlx.cache.governor import Governor
from rl_mlx.cache.packed import forward
from rl_mlx.cache.prefix import BLOCK, PrefixTree
from rl_mlx.engine.sequence import Sequence
from rl_mlx.errors import RlMlxError
from rl_mlx.model.device import on_cpu
from rl_mlx.model.model import Model
from rl_mlx.sample.sampler import Row, Sampled, Sampler
from rl_mlx.sample.verify import Draft
from rl_mlx.settings import DENSE_KV, KVFormat
from rl_mlx.types import Matcher, TokenLogprob

RESERVED = 256
"""Tokens of its answer that every sequence must have room for before another one starts."""


@dataclass(frozen=True)
class Forward:
    """A forward, first built and then started: who gets a token of it, in the order of rows, and
    the arrays that are there when it is done.
    """

    batch: tuple[Sequence, ...]
    sampled: Sampled | None
    arrays: list[mx.array]

    def read(self) -> list[tuple[int, TokenLogprob | None]]:
        """A token for each of ``batch``; waits for the device."""
        if self.sampled is None:
            mx.eval(self.arrays)
            return []
        return self.sampled.read([s.request.params for s in self.batch])


class Runner:
    """The device side of the engine.

    Running sequences own the rows ``0 ..``, those being read the ones after them. At most ``chunk``
    prompt tokens are read in a step, a multiple of the prefix tree's blocks.
    """

    def __init__(
        self,
        model: Model,
        governor: Governor,
        chunk: int = 512,
        kv: KVFormat = DENSE_KV,
        disk: DiskTier | None = None,
    ) -> None:
        """``disk`` is where the prefix tree comes from, and where it is kept."""
        assert chunk % BLOCK == 0, "a chunk is whole blocks"
        self._model = model
        self._governor = governor
        self._chunk = chunk
        self._kv = kv
        self._owners: list[Sequence] = []
        self._sampling: tuple[tuple[Sequence, ...], Sampler] | None = None
        self.tree: PrefixTree[Piece] = PrefixTree()
        self.arena = self._new_arena()
        self.beside: Callable[[int, int], int] = lambda _rows, _length: 0
        """Bytes of another cache (a draft model's) beside an arena of such rows."""
        self.runs_ahead = not on_cpu()
        """Whether the device works by itself once a forward was started: not on a CPU, where MLX
        hands it out no faster than it is computed.
        """
        self._disk = disk
        if disk is not None:
            disk.restore(self.tree, governor.room // 2)

    @property
    def packs(self) -> bool:
        """Whether streams can go on in the forward that reads prompts, and several prompts be read
        in one.
        """
        return self._model.packs

    def _new_arena(self) -> Arena:
        return Arena(self._model.cache_specs, self._model.dtype, self._chunk, self._kv)

    def make_room(self, rows: int, length: int) -> bool:
        """Whether ``rows`` rows of up to ``length`` tokens fit; evicts prefixes to that end."""
        arena = self.arena
        if arena.covers(rows, length):
            return True
        for give_back in (False, True):  # moving the arena is the last resort
            if give_back:
                arena.shrink()
            if self._fits(self.bytes_for(rows, length)):
                return True
        return False

    def bytes_for(self, rows: int, length: int) -> int:
        """Bytes of the caches, but for the prefix tree, once there were such rows."""
        return self.arena.bytes_for(rows, length) + self.beside(*self.arena.size_for(rows, length))

    def _fits(self, needed: int) -> bool:
        return self._governor.make_room(needed, self.tree.nbytes, self._evict)

    def _evict(self, limit: int) -> int:
        self.tree.evict(limit)
        return self.tree.nbytes

    def admits(self, sequence: Sequence) -> bool:
        """Whether there is room for one more row, and for some of every answer that goes on.

        Preemption sees to the rest; without that much, a newcomer would be thrown out at once.
        """
        if not self._owners:
            return True
        ahead = [
            s.known + min(RESERVED, s.limit - len(s.answer)) for s in [*self._owners, sequence]
        ]
        return self.make_room(self.arena.rows + 1, max(ahead))

    def next_length(self, sequence: Sequence, tokens: int) -> int:
        """Tokens in the row of a sequence being read, after at most ``tokens`` more."""
        last = min(sequence.cached + tokens, sequence.known)
        if last < sequence.known or self.arena.has_memory:
            # What ends blocks ends there: a sliding window would else lose one before it is saved,
            # and a memory is known where steps end, for the next prompt that begins so.
            whole = last - last % BLOCK
            return whole if whole > sequence.cached else last
        return last

    def enter(self, sequence: Sequence, crowd: int) -> None:
        """Give a sequence a row, and start it with what the prefix tree knows of its tokens.

        ``crowd`` rows will be wanted soon: they are made together where there is room beside what
        the tree has. Growing row by row, the arena would be copied for each.
        """
        if self.bytes_for(crowd, sequence.known) + self.tree.nbytes <= self._governor.room:
            self.arena.reserve(sequence.known, crowd)
        row = sequence.row = self.arena.add_row()
        self._owners.append(sequence)
        self.arena.reserve(sequence.known)  # growing beside running streams, they would wait
        tokens = sequence.tokens(
            0, sequence.known - 1
        )  # the last one is always run, for its logits
        wants_state = self.arena.is_recurrent
        path = self.tree.match(tokens, _has_state if wants_state else None)
        pieces = [(node.piece, count) for node, count in path if node.piece is not None]
        if pieces:
            self.arena.put(row, pieces)
        sequence.cached = sum(count for _, count in pieces)
        if not sequence.answer:
            sequence.reused = sequence.cached
            sequence.broke = sequence.cached if sequence.cached < len(tokens) else None
        whole = [node for node, count in path if count == self.tree.block]
        sequence.node = whole[-1] if whole else self.tree.root
        self.tree.pin(sequence.node)

    def build(
        self,
        batch: tuple[Sequence, ...],
        inputs: mx.array | None,
        reads: Seq[tuple[Sequence, int]],
    ) -> Forward:
        """One more token for each of ``batch``, whose ``inputs`` are their last tokens if those are
        still on the device; and of each sequence of ``reads`` what comes before token ``last``.
        """
        spans, tokens = [], []
        finished, places, end = [], list(range(len(batch))), len(batch)
        if batch:
            assert all(s.row == row for row, s in enumerate(batch)), "rows with gaps"
            spans.append((0, len(batch), 1))
            tokens.append(mx.array([s.answer[-1] for s in batch]) if inputs is None else inputs)
        for s, last in reads:
            assert s.row is not None, "reading without a row"
            spans.append((s.row, s.row + 1, last - s.cached))
            tokens.append(mx.array(s.tokens(s.cached, last)))
            end += last - s.cached
            if last == s.known:
                finished.append(s)
                places.append(end - 1)
        hidden = forward(self._model, self.arena, spans, tokens)
        for s, last in [*((s, s.cached + 1) for s in batch), *reads]:
            s.cached = last
            s.forwards += 1
        sampling = (*batch, *finished)
        if not sampling:
            return Forward((), None, self.arena.marks())
        if len(places) < len(hidden):
            hidden = hidden[mx.array(places)]
        sampled = self._sample(sampling, self._model.head(hidden))
        return Forward(sampling, sampled, sampled.arrays())

    def start(self, built: Forward) -> None:
        """Give a forward to the device; waits for nothing that is not nearly done."""
        self.arena.settle()
        mx.async_eval(*built.arrays)  # type: ignore[no-untyped-call]

    def verify(
        self, batch: tuple[Sequence, ...], draft: Draft
    ) -> tuple[list[int], list[list[tuple[int, TokenLogprob | None]]]]:
        """Check a draft in one forward: how many each accepts, and the tokens that each gets."""
        self.arena.settle()
        last = mx.array([[s.answer[-1]] for s in batch])
        length = draft.tokens.shape[1]
        step = self.arena.begin(0, len(batch), length + 1)
        hidden = self._model.forward(mx.concatenate([last, draft.tokens], axis=1), step)
        sampler = self._sampler(batch)
        guesses = np.array(draft.tokens).tolist() if sampler.needs_tokens else None
        rows = [
            _draft_rows(s, guesses[b] if guesses else None, length + 1) for b, s in enumerate(batch)
        ]
        accepted, sampled = sampler.verify(self._model.head(hidden), draft, rows)
        mx.eval(accepted, *sampled.arrays())
        counts = np.array(accepted).tolist()
        self.arena.advance(0, [count + 1 for count in counts])
        read = sampled.read([s.request.params for s in batch for _ in range(length + 1)])
        tokens = []
        for b, (s, count) in enumerate(zip(batch, counts)):
            s.cached += count + 1
            s.forwards += 1
            tokens.append(read[b * (length + 1) :][: count + 1])
        return counts, tokens

    def needs_tokens(self, batch: tuple[Sequence, ...]) -> bool:
        """Whether sampling for this batch has to see all earlier tokens on the host."""
        return self._sampler(batch).needs_tokens

    def save(self, sequence: Sequence, *, tail: bool = False) -> None:
        """Put what was computed into the prefix tree: whole blocks, and with ``tail`` the rest."""
        if sequence.row is None:
            return
        known = min(sequence.cached, sequence.known)
        while sequence.node.end + self.tree.block <= known:
            if not self._save(sequence, sequence.node.end + self.tree.block):
                return
        rest = sequence.tokens(sequence.node.end, known)
        if tail and rest and not self.tree.covers(sequence.node, rest) and self._keeps(len(rest)):
            first = sequence.node.end
            self.tree.add(sequence.node, rest, self.arena.take(sequence.row, first, known))

    def _keeps(self, tokens: int) -> bool:
        """Whether there is room in the tree for so many more."""
        return self._fits(self.bytes_for(0, 0) + self.arena.piece_bytes(tokens))

    def _save(self, sequence: Sequence, last: int) -> bool:
        """One whole block, on whose node the sequence stands from now on; False without room."""
        assert sequence.row is not None, "saving without a row"
        node, first = sequence.node, sequence.node.end
        tokens = sequence.tokens(first, last)
        child = self.tree.find(node, tokens)
        if child is None:
            if not self._keeps(last - first):
                return False
            child = self.tree.add(node, tokens, self.arena.take(sequence.row, first, last))
        self.tree.pin(child)
        self.tree.unpin(node)
        sequence.node = child
        return True

    def leave(self, sequence: Sequence) -> None:
        """Give the row back, its tokens to the tree. Rows stay without gaps, running ones first."""
        self.save(sequence, tail=True)
        hole, owners = sequence.row, self._owners
        if hole is None:
            return
        if self._disk is not None:
            self._disk.keep(sequence.node)
        last = len(owners) - 1
        last_running = max((i for i, o in enumerate(owners) if o.is_running), default=last)
        for source in (last_running, last):
            if source > hole:
                self.arena.copy_row(source, hole)
                owners[hole] = owners[source]
                owners[hole].row = hole
                hole = source
        owners.pop()
        self.arena.drop_row()
        self._forget(sequence)
        self._fits(self.bytes_for(0, 0))

    def reset(self) -> None:
        """Drop all rows: what is in them cannot be trusted any more."""
        for owner in self._owners:
            self._forget(owner)
        self._owners = []
        self._sampling = None
        self.arena = self._new_arena()

    def _forget(self, sequence: Sequence) -> None:
        self.tree.unpin(sequence.node)
        sequence.row = sequence.node = None
        sequence.cached = 0

    def _sampler(self, batch: tuple[Sequence, ...]) -> Sampler:
        if self._sampling is None or self._sampling[0] != batch:
            self._sampling = batch, Sampler([s.request.params for s in batch])
        return self._sampling[1]

    def _sample(self, batch: tuple[Sequence, ...], logits: mx.array) -> Sampled:
        rows = [
            Row(
                s.request.params,
                s.seed,
                s.prompt,
                s.answer,
                len(s.answer) + s.in_flight,
                s.request.matcher,
            )
            for s in batch
        ]
        sampler = self._sampler(batch)
        if sampler.needs_tokens:  # it has the logits computed while it makes a grammar's masks
            self.arena.settle()
        sampled = sampler.sample(logits, rows)
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


def _draft_rows(s: Sequence, guess: Seq[int] | None, count: int) -> list[Row]:
    """What the sampler needs to know at each position of a draft; ``guess`` if it looks at it."""
    rows = []
    matcher = s.request.matcher
    for place in range(count):
        answer = s.answer if guess is None else [*s.answer, *guess[:place]]
        at = len(s.answer) + place
        rows.append(Row(s.request.params, s.seed, s.prompt, answer, at, matcher))
        if matcher is not None and guess is not None and place < len(guess):
            matcher = _after(matcher, guess[place])
    return rows


def _after(matcher: Matcher, token: int) -> Matcher | None:
    """The grammar after one more token; None where that ends it or is not allowed, and rejected."""
    try:
        copy = matcher.copy()
        copy.advance(token)
    except RlMlxError:
        return None
    return None if copy.done else copy


def _has_state(piece: Piece) -> bool:
    return piece.has_state
