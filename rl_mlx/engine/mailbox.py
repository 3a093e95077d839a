"""How other threads talk to the one that owns a device: by message, until it is closed."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

from rl_mlx.errors import EngineError, QueueFull

T = TypeVar("T")
Message = Callable[[], None]


QUEUE_LIMIT = 1024
"""Requests that may wait."""


class Mailbox:
    """Messages are run by the owner's thread, in the order they came."""

    def __init__(self) -> None:
        self._messages: queue.SimpleQueue[Message | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self.closed = False

    def post(self, message: Message) -> None:
        """Leave a message; raises ``EngineError`` after ``close``."""
        with self._lock:
            if self.closed:
                raise EngineError("the model is closed")
            self._messages.put(message)

    def post_request(self, message: Message, waiting: int, limit: int = QUEUE_LIMIT) -> None:
        """As ``post``; raises ``QueueFull`` where ``limit`` requests wait already, the messages
        that were not run yet among them.
        """
        if self._messages.qsize() + waiting >= limit:
            raise QueueFull(f"{limit} requests are waiting already; try again later")
        self.post(message)

    def call(self, function: Callable[[], T]) -> T:
        """``function()`` on the owner's thread, waited for; its exception is raised here."""
        answer: Future[T] = Future()

        def run() -> None:
            try:
                answer.set_result(function())
            except BaseException as error:  # noqa: BLE001  (the caller's thread raises it)
                answer.set_exception(error)

        self.post(run)
        return answer.result()

    def close(self) -> None:
        """Nothing more is taken; the owner is told. Safe to call twice."""
        with self._lock:
            if not self.closed:
                self.closed = True
                self._messages.put(None)

    def listen(self, is_idle: Callable[[], bool]) -> bool:
        """Run messages, waiting for one while ``is_idle``. False when told to close."""
        while True:
            try:
                message = self._messages.get(block=is_idle())
            except queue.Empty:
                return True
            if message is None:
                return False
            message()
