"""The contract of every backend: token ids in, events out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from rl_mlx.types import Event, ModelInfo, Request

Emit = Callable[[Event], None]


LEAST_CONTEXT = 512


def default_context(trained: int) -> int:
    """Tokens a sequence may have where nobody said: what the model was trained on.

    Toy models trained on less get ``LEAST_CONTEXT``: rotary positions go on beyond the training.
    """
    return max(trained, LEAST_CONTEXT)


@dataclass(frozen=True)
class Stats:
    """What a backend is doing now. ``kv_bytes`` are those that running requests and prefixes for
    later ones hold, ``memory_bytes`` all that is in use.
    """

    running: int = 0
    waiting: int = 0
    kv_bytes: int = 0
    memory_bytes: int = 0


class Backend(ABC):
    """Owns a loaded model and the one thread that runs it.

    Any method may be called from any thread. ``emit`` is called from the backend's own thread and
    must not block; it gets any number of ``Progress`` and ``Token`` events and then exactly one
    terminal one.
    """

    info: ModelInfo

    @abstractmethod
    def submit(self, request: Request, emit: Emit) -> None:
        """Queue ``request``. Raises ``InvalidRequest``, ``ContextOverflow`` or ``QueueFull`` at
        once.

        The end-of-sequence token is not emitted; ``Finished("stop")`` says that it came.
        """

    @abstractmethod
    def cancel(self, request_id: str) -> None:
        """End a request with ``Finished("cancelled")`` within one step; unknown ids are ignored."""

    @abstractmethod
    def stats(self) -> Stats:
        """A snapshot; cheap enough to poll."""

    @abstractmethod
    def logits(self, ids: Sequence[int]) -> npt.NDArray[np.float32]:
        """Logits of every position, float32 ``[len(ids), vocab]``. Blocks."""

    @abstractmethod
    def embed(self, ids: Sequence[int]) -> npt.NDArray[np.float32]:
        """The mean of the last hidden states, scaled to length 1, float32 ``[hidden]``. Blocks."""

    @abstractmethod
    def close(self) -> None:
        """Cancel what runs, join the thread, free the memory. Safe to call twice."""
