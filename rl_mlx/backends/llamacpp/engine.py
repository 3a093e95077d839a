"""Continuous batching over one llama.cpp context, on one thread.

A step is one batch: the last token (and its guesses) of every running sequence, then prompts in the
order they came, as far as there is room and running sequences may wait (``ChunkSize``). Finished
sequences stay in the cache as prefixes until their cells are needed.
"""

from __future__ import annotations

import logging
import threading
import time
from bisect import insort
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import TypeVar

from rl_mlx.backends.llamacpp.draft import Drafter
from rl_mlx.backends.llamacpp.model import CacheFull, Context
from rl_mlx.backends.llamacpp.slots import Place, Slot, Slots, occupy
from rl_mlx.engine.chunk import ChunkSize
from rl_mlx.engine.mailbox import Mailbox
from rl_mlx.engine.sequence import Sequence
from rl_mlx.errors import EngineError, OutOfMemory, RlMlxError
from rl_mlx.sample.host import choose

T = TypeVar("T")
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Part:
    """A slot's part of a batch: ``tokens`` were fed, those after the first ``sure`` are guesses.

    ``first`` is the batch index of its first output, None where the prompt goes on in the next
    step.
    """

    slot: Slot
    tokens: list[int]
    sure: int
    first: int | None


class Engine:
    """Owns a context and its thread. ``draft_tokens`` bounds what ``drafter`` guesses a step."""

    def __init__(
        self,
        context: Context,
        slots: Slots,
        drafter: Drafter | None,
        draft_tokens: int,
        release: Callable[[], None],
    ) -> None:
        self._context = context
        self._slots = slots
        self._drafter = drafter
        self._draft_tokens = draft_tokens
        self._release = release
        self._chunks = ChunkSize(context.room)
        self._waiting: list[Sequence] = []
        self._crowded = False  # cells ran out: nobody enters before somebody leaves
        self._mailbox = Mailbox()
        self._thread = threading.Thread(target=self._main, name="llama.cpp", daemon=True)
        self._thread.start()

    # Called from any thread.

    def submit(self, run: Sequence) -> None:
        """Queue a request. Raises ``QueueFull``, or ``EngineError`` after ``close``."""
        self._mailbox.post_request(lambda: self._add(run), len(self._waiting))

    def cancel(self, request_id: str) -> None:
        """End a request; unknown ids are ignored."""
        with suppress(EngineError):  # after the end there is nothing to cancel
            self._mailbox.post(lambda: self._cancel(request_id))

    def call(self, function: Callable[[], T]) -> T:
        """``function()`` on the engine's thread, between steps."""
        return self._mailbox.call(function)

    def counts(self) -> tuple[int, int, int]:
        """Running, waiting, and tokens in the cache; a snapshot that may be a step old."""
        return len(self._slots.running), len(self._waiting), self._slots.tokens

    def close(self) -> None:
        """Cancel everything, join the thread and free the model. Safe to call twice."""
        self._mailbox.close()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    # On the engine's thread.

    def _main(self) -> None:
        while self._mailbox.listen(self._is_idle):
            try:
                self._admit()
                self._step()
            except CacheFull:
                self._make_room()
            except Exception as error:  # noqa: BLE001  (the loop outlives whatever a step does)
                self._fail_running(error)
        for slot in self._slots.running:
            assert slot.run is not None, "running slots have a request"
            slot.run.finish("cancelled")
        for run in self._waiting:
            run.finish("cancelled")
        self._release()

    def _is_idle(self) -> bool:
        return not self._waiting and not self._slots.running

    def _add(self, run: Sequence) -> None:
        if run.limit == 0:
            run.finish("length")
            return
        self._wait(run)

    def _wait(self, run: Sequence) -> None:
        insort(self._waiting, run, key=lambda s: s.urgency)

    def _cancel(self, request_id: str) -> None:
        for run in self._waiting:
            if run.request.id == request_id:
                self._waiting.remove(run)
                run.finish("cancelled")
                return
        for slot in self._slots.running:
            if slot.run is not None and slot.run.request.id == request_id:
                slot.run.finish("cancelled")
                self._leave(slot)

    def _admit(self) -> None:
        while self._waiting and not self._crowded:
            run = self._waiting[0]
            place = self._slots.find([*run.prompt, *run.answer])
            if place is None:
                return
            self._waiting.pop(0)
            self._enter(run, place)

    def _enter(self, run: Sequence, place: Place) -> None:
        slot, source, length = place.slot, place.source, place.length
        occupy(slot, run)  # first: if the rest fails, so does this request
        if slot is not source:
            self._context.keep(slot.id, 0)
            if length:
                self._context.share(source.id, slot.id, length)
            slot.tokens = source.tokens[:length]
        elif length < len(slot.tokens):
            self._context.keep(slot.id, length)
            del slot.tokens[length:]
        if run.started is None:
            run.started, run.reused = time.perf_counter(), length
            run.broke = (
                length if length < len(run.prompt) - 1 else None
            )  # the last one is run always

    def _step(self) -> None:
        began = time.perf_counter()
        decoding = sum(slot.is_decoding for slot in self._slots.running)
        chunk = self._chunks.tokens(beside=decoding)
        parts = self._plan(chunk)
        if not parts:
            return
        prompts = sum(len(part.tokens) for part in parts if not part.slot.is_decoding)
        self._context.run()
        for part in parts:
            self._read(part)
        seconds = time.perf_counter() - began
        if prompts:
            self._chunks.read(prompts, chunk, seconds, decoding=decoding)
        else:
            self._chunks.decoded(decoding, seconds)

    def _plan(self, chunk: int) -> list[_Part]:
        """Fill the batch: last tokens and their guesses, then ``chunk`` tokens of prompts."""
        running = self._slots.running
        decoding = [s for s in running if s.is_decoding]
        guesses = self._guesses(decoding)
        chosen: list[tuple[Slot, list[int], int]] = []  # with the number of outputs
        room = self._context.room
        for slot in decoding:
            tokens = [*slot.pending(), *guesses.get(slot.id, ())][:room]
            if tokens:  # with more sequences than a batch takes, the rest have their turn later
                chosen.append((slot, tokens, len(tokens)))
                room -= len(tokens)
        room = min(room, chunk)
        for slot in running:
            if room and not slot.is_decoding:
                pending = slot.pending()
                chosen.append((slot, pending[:room], int(len(pending) <= room)))
                room -= min(len(pending), room)
        # llama.cpp computes together only sequences whose ids follow one another.
        chosen.sort(key=lambda part: part[0].id)
        return [self._add_part(*part) for part in chosen]

    def _add_part(self, slot: Slot, tokens: list[int], outputs: int) -> _Part:
        first = self._context.add(tokens, len(slot.tokens), slot.id, outputs)
        sure = 1 if slot.is_decoding else len(tokens)
        return _Part(slot, tokens, sure, first if outputs else None)

    def _guesses(self, decoding: list[Slot]) -> dict[int, list[int]]:
        if self._drafter is None or not decoding:
            return {}
        wanted = []
        for slot in sorted(decoding, key=lambda s: s.id):
            assert slot.run is not None, "decoding slots have a request"
            left = slot.run.limit - len(slot.run.answer) - 1
            if left > 0:
                wanted.append((slot, min(self._draft_tokens, left)))
        return self._drafter.propose(wanted) if wanted else {}

    def _read(self, part: _Part) -> None:
        """Sample from a part's logits, as long as what was guessed is what comes."""
        slot, run = part.slot, part.slot.run
        assert run is not None, "a part of a batch has a request"
        run.forwards += 1
        slot.tokens.extend(part.tokens[: part.sure])
        run.cached = len(slot.tokens)
        run.progress(run.cached)
        if part.first is None:
            return
        guesses = part.tokens[part.sure :]
        run.drafted += len(guesses)
        for step in range(len(guesses) + 1):
            logits = self._context.logits(part.first + step)
            token, logprob = choose(
                logits, run.request.params, run.seed, run.prompt, run.answer, run.request.matcher
            )
            run.take(token, logprob)
            if run.done or step == len(guesses) or token != guesses[step]:
                break
            run.accepted += 1
            slot.tokens.append(token)
        if len(slot.tokens) < run.cached + len(guesses):
            self._context.keep(slot.id, len(slot.tokens))
        if run.done:
            self._leave(slot)

    def _leave(self, slot: Slot) -> None:
        """The request is over; its tokens stay for those that come."""
        slot.run, slot.used = None, time.perf_counter()
        self._crowded = False

    def _make_room(self) -> None:
        """Free cells: of the prefix not used for longest, else of the sequence that came last,
        which waits again.
        """
        self._context.discard()
        slot = self._slots.oldest_idle() or self._slots.running[-1]
        if slot.run is not None and len(self._slots.running) == 1:
            slot.run.fail(OutOfMemory("the KV cache is too small for this request"))
            self._leave(slot)
        elif slot.run is not None:
            self._wait(slot.run)
            self._leave(slot)
            self._crowded = True
        self._context.keep(slot.id, 0)
        slot.tokens.clear()

    def _fail_running(self, error: Exception) -> None:
        """A step failed: what took part is over, and nothing of it can be trusted."""
        if not isinstance(error, RlMlxError):
            log.exception("a step of the llama.cpp engine failed")
            error = EngineError(f"generation failed: {type(error).__name__}: {error}")
        self._context.discard()
        for slot in self._slots.running:
            assert slot.run is not None, "running slots have a request"
            slot.run.fail(error)
            self._leave(slot)
            self._context.keep(slot.id, 0)
            slot.tokens.clear()
