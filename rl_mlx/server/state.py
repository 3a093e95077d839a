"""What all requests share."""

from __future__ import annotations

import asyncio
import json
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from rl_mlx.server.gate import Gate
from rl_mlx.server.metrics import Metrics
from rl_mlx.server.models import Models
from rl_mlx.server.settings import ServerSettings

T = TypeVar("T")


class State:
    """The server's parts. ``in_thread`` runs what takes long, but not the device: templates,
    tokenizers, big JSON.
    """

    INLINE = 1 << 16
    """Bytes up to which a body is parsed in the event loop."""
    STORED = 1000
    """Responses that can be gone on from, at most."""
    STORED_SIZE = 64 << 20
    """Characters of them all, at most: those stored first are forgotten."""

    def __init__(self, settings: ServerSettings, models: Models, metrics: Metrics) -> None:
        self.settings = settings
        self.models = models
        self.metrics = metrics
        self.gate = Gate(settings.queue)
        self.conversations: OrderedDict[str, list[dict[str, Any]]] = OrderedDict()
        """The turns of stored responses, by id."""
        self._sizes: dict[str, int] = {}
        self._threads = ThreadPoolExecutor(2, "rl-mlx-text")

    def remember(self, response_id: str, turns: list[dict[str, Any]]) -> None:
        """Keep a conversation, and forget the oldest ones that are too many."""
        self.conversations[response_id] = turns
        self._sizes[response_id] = len(json.dumps(turns))
        while len(self._sizes) > self.STORED or sum(self._sizes.values()) > self.STORED_SIZE:
            oldest, _ = self.conversations.popitem(last=False)
            del self._sizes[oldest]

    async def in_thread(self, function: Callable[..., T], *args: Any) -> T:
        """The value of a function run in one of the threads for text."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, function, *args)

    async def close(self) -> None:
        """Unload the models and join the threads."""
        await self.models.close()
        self._threads.shutdown(cancel_futures=True)
