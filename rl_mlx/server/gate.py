"""Who may come in: how many requests at once, and none while the server goes down."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from rl_mlx.errors import QueueFull
from rl_mlx.server.problems import Stopping


class Gate:
    """Counts the requests that make a model work.

    ``drain`` lets nobody in any more and ends those that are still there after ``grace`` seconds.
    """

    def __init__(self, limit: int) -> None:
        self.active = 0
        self.draining = False
        self.stopped = asyncio.Event()
        """Set when requests that are still running must end."""
        self._limit = limit

    @contextmanager
    def enter(self) -> Iterator[None]:
        """Raises ``QueueFull`` or ``Stopping``."""
        if self.draining:
            raise Stopping("the server is going down; try again later")
        if self.active >= self._limit:
            raise QueueFull(f"{self._limit} requests are under way already; try again later")
        self.active += 1
        try:
            yield
        finally:
            self.active -= 1

    def drain(self, grace: float) -> None:
        """Begin to go down."""
        if not self.draining:
            self.draining = True
            asyncio.get_running_loop().call_later(grace, self.stopped.set)
