"""Events of one request become text: detokenized, cut at stop strings, in chunks that are whole
UTF-8.
"""

from __future__ import annotations

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
    """Collects one answer. ``feed`` gives the chunk an event makes, or None; ``result`` the whole
    at the end.

    ``stopped`` turns True when a stop string came: the backend should then be told to cancel, and
    its terminal event be fed as any other.
    """

    def __init__(
        self, detokenizer: Detokenizer, stops: tuple[str, ...], prompt_tokens: int
    ) -> None:
        self.stopped = False
        self._detokenizer = detokenizer
        self._matcher = StopMatcher(stops)
        self._prompt_tokens = prompt_tokens
        self._text: list[str] = []
        self._ids: list[int] = []
        self._logprobs: list[TokenLogprob] = []
        self._reason: FinishReason | None = None
        self._timings = Timings()

    def feed(self, event: Event) -> Chunk | None:
        """The chunk that ``event`` makes; ``Failed`` raises its error."""
        if isinstance(event, Token):
            return self._token(event)
        if isinstance(event, Progress):
            return Chunk(progress=event)
        if isinstance(event, Finished):
            return self._finish(event)
        raise event.error

    def _token(self, event: Token) -> Chunk | None:
        if self.stopped:  # tokens on their way when the cancellation was asked for
            return None
        self._ids.append(event.id)
        logprobs = () if event.logprob is None else (event.logprob,)
        self._logprobs.extend(logprobs)
        text, self.stopped = self._matcher.feed(self._detokenizer.add(event.id))
        self._text.append(text)
        return Chunk(text=text, token_ids=(event.id,), logprobs=logprobs)

    def _finish(self, event: Finished) -> Chunk:
        tail = ""
        if not self.stopped:
            text, self.stopped = self._matcher.feed(self._detokenizer.flush())
            tail = text + ("" if self.stopped else self._matcher.flush())
        self._text.append(tail)
        self._reason = "stop" if self.stopped else event.reason
        self._timings = event.timings
        return Chunk(
            text=tail,
            finish_reason=self._reason,
            stop=self._matcher.matched,
            usage=self._usage(),
            timings=event.timings,
        )

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
