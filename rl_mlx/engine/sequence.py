"""A sequence: one request on its way through the engine. Pure Python."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from rl_mlx.errors import RlMlxError
from rl_mlx.types import (
    Event,
    Failed,
    Finished,
    FinishReason,
    Progress,
    Request,
    Timings,
    Token,
    TokenLogprob,
)


@dataclass(eq=False)
class Sequence:
    """``cached`` tokens of prompt and answer are in the cache; ``in_flight`` more are being made.

    ``limit`` is the most tokens the answer may have. ``row`` is the arena's, None while waiting.
    ``reused`` tokens of the prompt came from the prefix tree, ``node`` is where in it the sequence
    stands, and ``broke`` the first token of the prompt that the tree did not know.
    """

    request: Request
    emit: Callable[[Event], None]
    limit: int
    seed: int
    answer: list[int] = field(default_factory=list)
    cached: int = 0
    in_flight: int = 0
    row: int | None = None
    is_running: bool = False
    done: bool = False
    reused: int = 0
    broke: int | None = None
    node: Any = None
    submitted: float = field(default_factory=time.perf_counter)
    started: float | None = None
    first: float | None = None
    last: float | None = None
    forwards: int = 0
    drafted: int = 0
    accepted: int = 0
    gain: float = 1.0

    @property
    def prompt(self) -> tuple[int, ...]:
        """Token ids of the prompt."""
        return self.request.prompt

    @property
    def known(self) -> int:
        """Tokens of prompt and answer so far."""
        return len(self.prompt) + len(self.answer)

    def tokens(self, first: int, last: int) -> tuple[int, ...]:
        """Tokens ``first .. last - 1`` of prompt and answer."""
        split = len(self.prompt)
        if last <= split:
            return self.prompt[first:last]
        return (*self.prompt[first:], *self.answer[max(0, first - split) : last - split])

    @property
    def urgency(self) -> tuple[int, float]:
        """Sorts those that wait: by priority, then by age."""
        return -self.request.priority, self.submitted

    @property
    def prefilled(self) -> bool:
        """Whether all that is known is in the cache, so that the next token can be made."""
        return self.cached >= self.known

    @property
    def unread(self) -> int:
        """Tokens of what is known that are not in the cache yet."""
        return self.known - self.cached

    @property
    def saturated(self) -> bool:
        """Whether no further token may be started."""
        return len(self.answer) + self.in_flight >= self.limit

    def progress(self, read: int) -> None:
        """Tell how far the prompt is read."""
        if not self.answer and not self.done:
            self.emit(Progress(min(read, len(self.prompt)), len(self.prompt)))

    def take(self, token: int, logprob: TokenLogprob | None) -> None:
        """One more token came; ends the sequence where it says so. What comes after the end is
        dropped.
        """
        if self.done:
            return
        self.last = time.perf_counter()
        self.first = self.first or self.last
        params = self.request.params
        is_end = token in self.request.eos_ids and not params.ignore_eos
        if is_end or token in params.stop_token_ids:
            self.finish("stop")
            return
        matcher = self.request.matcher
        if matcher is not None:
            try:
                matcher.advance(token)
            except RlMlxError as error:
                self.fail(error)
                return
        self.answer.append(token)
        self.emit(Token(token, logprob))
        if matcher is not None and matcher.done:
            self.finish("stop")
        elif len(self.answer) >= self.limit:
            self.finish("length")

    def finish(self, reason: FinishReason) -> None:
        """The terminal event, once."""
        if not self.done:
            self.done = True
            self.emit(Finished(reason, self.timings()))

    def fail(self, error: RlMlxError) -> None:
        """The terminal event of a failure, once."""
        if not self.done:
            self.done = True
            self.emit(Failed(error))

    def timings(self) -> Timings:
        """What has been measured so far."""
        now = time.perf_counter()
        started = self.started or now
        first = self.first or now
        return Timings(
            queued=started - self.submitted,
            prefill=first - started,
            decode=(self.last or first) - first,
            prompt_tokens=len(self.prompt),
            reused=self.reused,
            prefix_broke=self.broke,
            generated=len(self.answer),
            forwards=self.forwards,
            drafted=self.drafted,
            accepted=self.accepted,
            speculation_gain=self.gain,
        )
