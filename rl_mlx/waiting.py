"""Two ways to wait for a backend: blocking the thread, or awaiting in an event loop.

``AsyncLLM`` is written once, over the ``Waiting`` interface. With ``Blocking`` none of its awaits
ever suspends, so ``LLM`` can run the same coroutines by ``drive``, with no event loop and no extra
thread (and in Jupyter, whose own loop is already running).
"""

from __future__ import annotations

import asyncio
import queue
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from typing import Any, Generic, Protocol, TypeVar

T = TypeVar("T")
R = TypeVar("R")


class Channel(Protocol[T]):
    """Items from any thread to one reader."""

    def put(self, item: T) -> None:
        """Never blocks; callable from any thread."""

    async def get(self) -> T:
        """The next item, in the order they were put."""


class Waiting(Protocol):
    """How to wait."""

    def channel(self) -> Channel[Any]:
        """A new channel to this reader."""

    async def run(self, function: Callable[..., R], *args: Any) -> R:
        """The value of a function that may block."""


class _BlockingChannel(Generic[T]):
    def __init__(self) -> None:
        self._items: queue.SimpleQueue[T] = queue.SimpleQueue()
        self.put = self._items.put

    async def get(self) -> T:
        return self._items.get()


class _AsyncChannel(Generic[T]):
    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._items: deque[T] = deque()
        self._ready = asyncio.Event()

    def put(self, item: T) -> None:
        self._items.append(item)
        try:
            self._loop.call_soon_threadsafe(self._ready.set)
        except RuntimeError:  # the reader's loop is closed: nobody is left to tell
            self._items.clear()

    async def get(self) -> T:
        while not self._items:
            self._ready.clear()
            if not self._items:  # one may have come between the look and the clear
                await self._ready.wait()
        return self._items.popleft()


class Blocking:
    """Waits by blocking the calling thread; its coroutines never suspend."""

    def channel(self) -> Channel[Any]:
        """A queue whose ``get`` blocks."""
        return _BlockingChannel()

    async def run(self, function: Callable[..., R], *args: Any) -> R:
        """Call it here."""
        return function(*args)


class Awaiting:
    """Waits in the running event loop."""

    def channel(self) -> Channel[Any]:
        """A queue whose ``get`` awaits."""
        return _AsyncChannel()

    async def run(self, function: Callable[..., R], *args: Any) -> R:
        """Call it in a worker thread."""
        return await asyncio.to_thread(function, *args)


def drive(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine that never suspends to its value."""
    try:
        coroutine.send(None)
    except StopIteration as done:
        value: T = done.value
        return value
    coroutine.close()
    raise AssertionError("a blocking call tried to suspend")


def iterate(items: AsyncIterator[T]) -> Iterator[T]:
    """Run an async generator that never suspends; closing this one closes that one."""

    async def step() -> T:
        return await items.__anext__()

    async def close() -> None:
        await items.aclose()  # type: ignore[attr-defined]

    try:
        while True:
            try:
                yield drive(step())
            except StopAsyncIteration:
                return
    finally:
        drive(close())
