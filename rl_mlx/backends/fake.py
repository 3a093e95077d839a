"""A backend that replies from a function, for tests of everything above the engine."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt

from rl_mlx.backends.base import Backend, Emit, Stats
from rl_mlx.errors import EngineError, RlMlxError
from rl_mlx.types import Failed, Finished, FinishReason, ModelInfo, Request, Timings, Token

INFO = ModelInfo(
    name="fake", path="", architecture="fake", parameters=0, bits_per_weight=0.0, context=4096,
    vocab=256, hidden=1, layers=0, backend="fake", device="none", dtype="float32", weight_bytes=0,
    kv_bytes_per_token=0, memory_budget=0,
)  # fmt: skip


class FakeBackend(Backend):
    """``reply(request)`` gives the token ids of the answer; a ``RlMlxError`` it raises fails the
    request.
    """

    def __init__(self, reply: Callable[[Request], Iterable[int]], info: ModelInfo = INFO) -> None:
        self.info = info
        self.requests: list[Request] = []
        self.cancelled: set[str] = set()
        self._reply = reply
        self._thread = ThreadPoolExecutor(1, "fake-backend")

    def submit(self, request: Request, emit: Emit) -> None:
        """Answer on the backend's thread."""
        self.requests.append(request)
        self._thread.submit(self._run, request, emit)

    def _run(self, request: Request, emit: Emit) -> None:
        made, reason = 0, "stop"
        try:
            for token in self._reply(request):
                if request.id in self.cancelled or made == request.params.max_tokens:
                    reason = "cancelled" if request.id in self.cancelled else "length"
                    break
                made += 1
                emit(Token(token))
        except RlMlxError as error:
            emit(Failed(error))
        else:
            timings = Timings(prompt_tokens=len(request.prompt), generated=made)
            finish: FinishReason = reason  # type: ignore[assignment]
            emit(Finished(finish, timings))

    def cancel(self, request_id: str) -> None:
        """Stop before the next token."""
        self.cancelled.add(request_id)

    def stats(self) -> Stats:
        """Nothing is held."""
        return Stats()

    def logits(self, ids: Sequence[int]) -> npt.NDArray[np.float32]:
        """Zeros."""
        return np.zeros((len(ids), self.info.vocab), np.float32)

    def embed(self, ids: Sequence[int]) -> npt.NDArray[np.float32]:  # noqa: ARG002
        """Not a model: an error, as a backend without embeddings gives it."""
        raise EngineError("the fake backend has no embeddings")

    def close(self) -> None:
        """Join the thread."""
        self._thread.shutdown()
