"""The engine loop: one thread that owns the device.

A step is started before the one before it is read, so that the device works while the host hands
tokens out. A sequence that turns out to have ended has then one token too many under way, which is
dropped.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

from rl_mlx.engine.mailbox import QUEUE_LIMIT, Mailbox
from rl_mlx.engine.pace import LONGEST
from rl_mlx.engine.runner import Runner
from rl_mlx.engine.scheduler import Decode, Prefill, Scheduler
from rl_mlx.engine.sequence import Sequence
from rl_mlx.engine.speculate import Speculator
from rl_mlx.errors import EngineError, OutOfMemory, RlMlxError
from rl_mlx.sample.sampler import Sampled

T = TypeVar("T")
log = logging.getLogger(__name__)
_TOO_SMALL = OutOfMemory(
    "the memory budget cannot hold this request's KV cache; set a larger one, use kv_bits, or "
    "shorten the request"
)


Parts = tuple[Runner, Scheduler, Speculator]


@dataclass(frozen=True)
class _Step:
    """A decode step that was started and is not read yet."""

    batch: tuple[Sequence, ...]
    sampled: Sampled


class Engine:
    """Runs ``start()``'s runner on a thread of its own; all else is asked for by message."""

    def __init__(self, start: Callable[[], Parts], queue_limit: int = QUEUE_LIMIT) -> None:
        """Waits until ``start`` has returned on the engine's thread; raises its exception."""
        self._queue_limit = queue_limit
        self._mailbox = Mailbox()
        self._sequences: dict[str, Sequence] = {}
        self._pending: _Step | None = None
        self._free_at = 0.0  # when the device had done all but what was started last
        ready: Future[None] = Future()
        self._thread = threading.Thread(
            target=self._main, args=(start, ready), name="rl-mlx-engine", daemon=True
        )
        self._thread.start()
        ready.result()

    # Called from any thread.

    def submit(self, sequence: Sequence) -> None:
        """Queue a sequence. Raises ``QueueFull``, or ``EngineError`` after ``close``."""
        waiting = len(self._scheduler.waiting)
        self._mailbox.post_request(lambda: self._add(sequence), waiting, self._queue_limit)

    def cancel(self, request_id: str) -> None:
        """End a request; unknown ids are ignored."""
        with suppress(EngineError):  # after the end there is nothing to cancel
            self._mailbox.post(lambda: self._cancel(request_id))

    def call(self, function: Callable[[Runner], T]) -> T:
        """``function(runner)`` on the engine's thread, between steps."""
        return self._mailbox.call(lambda: function(self._runner))

    def counts(self) -> tuple[int, int, int]:
        """Running, waiting, and bytes of all caches; a snapshot that may be a step old."""
        scheduler = self._scheduler
        running = len(scheduler.running) + (scheduler.prefilling is not None)
        held = self._runner.bytes_for(0, 0) + self._runner.tree.nbytes
        return running, len(scheduler.waiting), held

    def close(self) -> None:
        """Cancel everything and join the thread. Safe to call twice."""
        self._mailbox.close()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    # On the engine's thread.

    def _main(self, start: Callable[[], Parts], ready: Future[None]) -> None:
        try:
            self._runner, self._scheduler, self._speculator = start()
        except BaseException as error:  # noqa: BLE001  (the constructor's thread raises it)
            self._mailbox.close()
            ready.set_exception(error)
            return
        ready.set_result(None)
        while True:
            try:
                if not self._mailbox.listen(self._is_idle):
                    break
                self._step()
            except Exception as error:  # noqa: BLE001  (the loop outlives whatever a step does)
                self._fail_running(error)
        for sequence in self._scheduler.everything():
            self._end(sequence, lambda s: s.finish("cancelled"))
        self._runner.reset()
        del self._runner

    def _is_idle(self) -> bool:
        return self._scheduler.idle and self._pending is None

    def _add(self, sequence: Sequence) -> None:
        self._sequences[sequence.request.id] = sequence
        if sequence.limit == 0:
            self._end(sequence, lambda s: s.finish("length"))
            return
        self._scheduler.add(sequence)

    def _cancel(self, request_id: str) -> None:
        sequence = self._sequences.get(request_id)
        if sequence is not None:
            self._end(sequence, lambda s: s.finish("cancelled"))

    def _step(self) -> None:
        work = self._scheduler.plan()
        if isinstance(work, Prefill):
            self._prefill(work)
        elif isinstance(work, Decode):
            self._decode(work)
        else:
            self._collect()

    def _prefill(self, work: Prefill) -> None:
        self._collect()  # before the device is kept busy: streams wait for these tokens
        sequence, runner = work.sequence, self._runner
        sequence.started = sequence.started or time.perf_counter()
        if sequence.row is None:
            if not self._make_room(runner.arena.rows + 1, sequence.known, sequence):
                return
            runner.enter(sequence)
        first, last = sequence.cached, runner.next_length(sequence, work.tokens)
        if not self._make_room(runner.arena.rows, last, sequence):
            return
        self._lap()
        runner.prefill(sequence, last)
        runner.wait()
        self._scheduler.chunks.read(last - first, work.tokens, self._lap())
        if not sequence.answer:
            sequence.progress()
        if sequence.prefilled:
            self._scheduler.prefilled()
            self._read(_Step((sequence,), runner.first(sequence)))
        runner.save(sequence, tail=sequence.is_running)

    def _decode(self, work: Decode) -> None:
        pending, runner, batch = self._pending, self._runner, work.batch
        wants_draft = self._speculator.wants(batch)
        if pending is not None and (
            pending.batch != batch or wants_draft or runner.needs_tokens(batch)
        ):
            self._collect()  # its tokens decide what is to run: plan again
            return
        ahead = 1 + (LONGEST if wants_draft else 0)
        longest = max(runner.arena.lengths[: len(batch)])
        if not self._make_room(runner.arena.rows, longest + ahead, batch[-1]):
            return
        if wants_draft and self._verify(batch):
            return
        self._speculator.rest(batch)
        if pending is None:
            self._lap()
        inputs = None if pending is None else pending.sampled.tokens
        step = _Step(batch, runner.decode(batch, inputs))
        self._collect()
        self._pending = step

    def _verify(self, batch: tuple[Sequence, ...]) -> bool:
        """A step with a draft, if there is one."""
        self._lap()
        draft = self._speculator.draft(batch)
        if draft is None:
            self._speculator.spent(self._lap())
            return False
        accepted, tokens = self._runner.verify(batch, draft)
        seconds = self._lap()
        self._speculator.observe(batch, draft, accepted, seconds)
        self._scheduler.chunks.decoded(seconds)
        for sequence, came in zip(batch, tokens):
            for token, logprob in came:
                sequence.take(token, logprob)
            self._settle(sequence)
        return True

    def _make_room(self, rows: int, length: int, sequence: Sequence) -> bool:
        """Whether memory is there for the next step; if not, one sequence has given way for it.

        Where none can, the request of ``sequence`` fails.
        """
        if self._runner.make_room(rows, length):
            return True
        self._collect()
        victim = self._scheduler.victim()
        if victim is not None:
            self._runner.leave(victim)
            self._speculator.forget(victim)
            self._scheduler.preempt(victim)
        elif not sequence.done:
            self._end(sequence, lambda s: s.fail(_TOO_SMALL))
        return False

    def _collect(self) -> None:
        """Read the step under way, if there is one, and hand its tokens out."""
        step, self._pending = self._pending, None
        if step is not None:
            self._read(step)
            seconds = self._lap()
            self._speculator.observe_plain(len(step.batch), seconds)
            self._scheduler.chunks.decoded(seconds)

    def _lap(self) -> float:
        """Seconds since the last lap, which began when the device had nothing else to do."""
        now = time.perf_counter()
        seconds, self._free_at = now - self._free_at, now
        return seconds

    def _read(self, step: _Step) -> None:
        read = step.sampled.read([s.request.params for s in step.batch])
        for sequence, (token, logprob) in zip(step.batch, read):
            sequence.in_flight -= 1
            sequence.take(token, logprob)
            self._settle(sequence)

    def _settle(self, sequence: Sequence) -> None:
        """After new tokens: an ended sequence goes, the blocks of another are kept."""
        if sequence.done:
            self._forget(sequence)
        else:
            self._runner.save(sequence)

    def _end(self, sequence: Sequence, how: Callable[[Sequence], Any]) -> None:
        how(sequence)
        self._forget(sequence)

    def _forget(self, sequence: Sequence) -> None:
        """Free what an ended sequence holds. Its part of a step under way is dropped when that is
        read.
        """
        self._scheduler.remove(sequence)
        self._speculator.forget(sequence)
        self._sequences.pop(sequence.request.id, None)
        self._runner.leave(sequence)

    def _fail_running(self, error: Exception) -> None:
        """A step failed: those in it fail with its error, those waiting go on.

        Where none was in it, it failed over the one that was to be next.
        """
        log.warning("a step failed", exc_info=error)
        failure = error if isinstance(error, RlMlxError) else EngineError(f"a step failed: {error}")
        self._pending = None
        scheduler = self._scheduler
        active = [s for s in scheduler.everything() if s not in scheduler.waiting]
        self._runner.reset()
        for sequence in active or scheduler.waiting[:1]:
            self._end(sequence, lambda s: s.fail(failure))
