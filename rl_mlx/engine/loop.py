"""The engine loop: one thread that owns the device.

A forward is built, and started where it can be, before the one before it is read, so that the
device works while the host builds and hands tokens out. A sequence that turns out to have ended has
then one token too many under way, which is dropped.
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
from rl_mlx.engine.runner import Forward, Runner
from rl_mlx.engine.scheduler import Scheduler, Work
from rl_mlx.engine.sequence import Sequence
from rl_mlx.engine.speculate import Speculator
from rl_mlx.errors import EngineError, OutOfMemory, RlMlxError

T = TypeVar("T")
log = logging.getLogger(__name__)
_TOO_SMALL = OutOfMemory(
    "the memory budget cannot hold this request's KV cache; set a larger one, use kv_bits, or "
    "shorten the request"
)


Parts = tuple[Runner, Scheduler, Speculator]


@dataclass(frozen=True)
class _Step:
    """A forward that was started and is not read yet, and the prompts that it reads, each up to a
    token.
    """

    work: Work
    forward: Forward
    reads: tuple[tuple[Sequence, int], ...]
    prompt_tokens: int


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
        running = len(scheduler.running) + len(scheduler.reading)
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
        self._admit()
        batch = self._scheduler.batch
        wants_draft = bool(batch) and self._speculator.wants(batch)
        work = self._scheduler.plan(together=self._runner.packs and not wants_draft)
        if work is None:
            self._collect()
        elif work.batch and self._blocks(work.batch, wants_draft):
            self._collect()  # its tokens decide what is to run: plan again
        else:
            self._run(work, wants_draft=wants_draft and not work.reads)

    def _admit(self) -> None:
        """Give rows to those that can be read now."""
        scheduler, runner = self._scheduler, self._runner
        while (sequence := scheduler.entering()) is not None:
            if not self._make_room(runner.arena.rows + 1, sequence.known, sequence):
                return
            sequence.started = sequence.started or time.perf_counter()
            runner.enter(sequence, scheduler.crowd)

    def _blocks(self, batch: tuple[Sequence, ...], wants_draft: bool) -> bool:
        """Whether the step under way must be read before these sequences go on."""
        pending = self._pending
        return pending is not None and (
            pending.forward.batch != batch or wants_draft or self._runner.needs_tokens(batch)
        )

    def _run(self, work: Work, *, wants_draft: bool) -> None:
        runner, batch = self._runner, work.batch
        reads = tuple((r.sequence, runner.next_length(r.sequence, r.tokens)) for r in work.reads)
        ahead = 1 + (LONGEST if wants_draft else 0)
        lengths = [n + ahead for n in runner.arena.lengths[: len(batch)]]
        longest = max([*lengths, *(last for _, last in reads)])
        if not self._make_room(runner.arena.rows, longest, reads[-1][0] if reads else batch[-1]):
            return
        if wants_draft and self._verify(batch):
            self._scheduler.started(work)
            return
        self._speculator.rest(batch)
        self._start(work, reads)

    def _start(self, work: Work, reads: tuple[tuple[Sequence, int], ...]) -> None:
        """A plain forward; the one before it is read."""
        runner, before = self._runner, self._pending
        if before is None:
            self._lap()
        count = sum(last - s.cached for s, last in reads)
        inputs = None
        if before is not None and before.forward.sampled is not None:
            inputs = before.forward.sampled.tokens  # of this batch, where there is one
        forward = runner.build(work.batch, inputs, reads)
        self._scheduler.started(work)
        if before is not None and (before.forward.sampled is None or not runner.runs_ahead):
            self._collect()
        runner.start(forward)
        for sequence, _ in reads:
            runner.save(sequence, tail=sequence.is_running)
        self._collect()
        self._pending = _Step(work, forward, reads, count)

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
        self._scheduler.chunks.decoded(len(batch), seconds)
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
        if step is None:
            return
        tokens = step.forward.read()
        self._measure(step, self._lap())
        for sequence, last in step.reads:
            sequence.progress(last)
        for sequence, (token, logprob) in zip(step.forward.batch, tokens):
            sequence.in_flight -= 1
            sequence.take(token, logprob)
        for sequence in step.forward.batch:
            self._settle(sequence)

    def _measure(self, step: _Step, seconds: float) -> None:
        streams, chunks = len(step.work.batch), self._scheduler.chunks
        if step.reads:
            chunks.read(step.prompt_tokens, step.work.tokens, seconds, decoding=streams)
        else:
            self._speculator.observe_plain(streams, seconds)
            chunks.decoded(streams, seconds)

    def _lap(self) -> float:
        """Seconds since the last lap, which began when the device had nothing else to do."""
        now = time.perf_counter()
        seconds, self._free_at = now - self._free_at, now
        return seconds

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
