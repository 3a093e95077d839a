"""Events of one request become text: detokenized, cut at stop strings, in chunks that are whole
UTF-8.
"""

from __future__ import annotations

from collections.abc import Iterable

from rl_mlx.errors import RlMlxError
from rl_mlx.text.detokenizer import Detokenizer
from rl_mlx.text.stop import StopMatcher
from rl_mlx.types import (
    Chunk,
    Event,
    Finished,
    FinishReason,
    Progress,
    Result,
    Timings,
    Token,
    TokenLogprob,
    Usage,
)


class Answer:
    """Collects one answer. ``feed`` gives the chunk that events make; ``result`` the whole at the
    end.

    ``stopped`` turns True when a stop string came: the backend should then be told to cancel, and
    its terminal event be fed as any other. ``ended``: that has come; ``error`` is what it failed
    of.
    """

    def __init__(
        self, detokenizer: Detokenizer, stops: tuple[str, ...], prompt_tokens: int
    ) -> None:
        self.stopped = False
        self.ended = False
        self.error: RlMlxError | None = None
        self._detokenizer = detokenizer
        self._matcher = StopMatcher(stops)
        self._prompt_tokens = prompt_tokens
        self._text: list[str] = []
        self._ids: list[int] = []
        self._logprobs: list[TokenLogprob] = []
        self._reason: FinishReason | None = None
        self._timings = Timings()

    def feed(self, events: Iterable[Event]) -> Chunk | None:
        """One chunk of all that came together, or None where that is nothing."""
        texts, tokens, logprobs = len(self._text), len(self._ids), len(self._logprobs)
        progress: Progress | None = None
        finished: Finished | None = None
        for event in events:
            if isinstance(event, Token):
                self._token(event)
            elif isinstance(event, Progress):
                progress = event
            elif isinstance(event, Finished):
                finished = event
                self._finish(event)
            else:
                self.error, self.ended = event.error, True
        ids = tuple(self._ids[tokens:])
        if finished is None and not ids:
            return None if progress is None else Chunk(progress=progress)
        return Chunk(
            text="".join(self._text[texts:]),
            token_ids=ids,
            logprobs=tuple(self._logprobs[logprobs:]),
            finish_reason=self._reason,
            stop=None if finished is None else self._matcher.matched,
            usage=None if finished is None else self._usage(),
            timings=None if finished is None else finished.timings,
        )

    def _token(self, event: Token) -> None:
        if self.stopped:  # tokens on their way when the cancellation was asked for
            return
        self._ids.append(event.id)
        if event.logprob is not None:
            self._logprobs.append(event.logprob)
        text, self.stopped = self._matcher.feed(self._detokenizer.add(event.id))
        self._text.append(text)

    def _finish(self, event: Finished) -> None:
        if not self.stopped:
            text, self.stopped = self._matcher.feed(self._detokenizer.flush())
            self._text.append(text + ("" if self.stopped else self._matcher.flush()))
        self.ended = True
        self._reason = "stop" if self.stopped else event.reason
        self._timings = event.timings

    def _usage(self) -> Usage:
        return Usage(self._prompt_tokens, len(self._ids))

    def result(self) -> Result:
        """The whole answer; only after a ``Finished`` event."""
        assert self._reason is not None, "the answer is not finished"
        return Result(
            text="".join(self._text),
            token_ids=self._ids,
            finish_reason=self._reason,
            usage=self._usage(),
            timings=self._timings,
            logprobs=self._logprobs or None,
            stop=self._matcher.matched,
        )
