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

    def put(self, item: T, *, urgent: bool = True) -> None:
        """Never blocks; callable from any thread. Only what is not urgent may be held back."""

    async def get(self) -> list[T]:
        """What has come, at least one item, in the order it was put."""


class Waiting(Protocol):
    """How to wait."""

    def channel(self) -> Channel[Any]:
        """A new channel to this reader."""

    async def run(self, function: Callable[..., R], *args: Any) -> R:
        """The value of a function that may block."""


class _BlockingChannel(Generic[T]):
    def __init__(self) -> None:
        self._items: queue.SimpleQueue[T] = queue.SimpleQueue()

    def put(self, item: T, *, urgent: bool = True) -> None:  # noqa: ARG002 - nothing is held back
        self._items.put(item)

    async def get(self) -> list[T]:
        return [self._items.get()]


class _Bell:
    """Wakes the readers of one event loop, which is told once however many they are: telling it
    is a system call in the backend's thread.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._due: deque[asyncio.Event] = deque()
        self._rung = False

    def ring(self, reader: asyncio.Event) -> None:
        """Set a reader's event; callable from any thread."""
        self._due.append(reader)
        if not self._rung:
            self._rung = True
            try:
                self.loop.call_soon_threadsafe(self._wake)
            except RuntimeError:  # the readers' loop is closed: nobody is left to tell
                self._due.clear()
                self._rung = False

    def _wake(self) -> None:
        self._rung = False  # before the last look: who comes after it rings again
        while self._due:
            self._due.popleft().set()


class _AsyncChannel(Generic[T]):
    def __init__(self, bell: _Bell, pace: float) -> None:
        self._bell = bell
        self._pace = pace
        self._items: deque[T] = deque()
        self._urgent = False
        self._rest: asyncio.TimerHandle | None = None
        self._ready = asyncio.Event()
        self._asleep = False

    def put(self, item: T, *, urgent: bool = True) -> None:
        self._items.append(item)
        if urgent:
            self._urgent = True
        if self._asleep and self._may_go():
            self._asleep = False
            self._bell.ring(self._ready)

    async def get(self) -> list[T]:
        while not self._may_go():
            self._ready.clear()
            self._asleep = True
            if not self._may_go():  # one may have come between the look and the flag
                await self._ready.wait()
            self._asleep = False
        if not self._pace:
            return [self._items.popleft()]
        return self._take_all()

    def _may_go(self) -> bool:
        return bool(self._items) and (self._urgent or self._rest is None)

    def _take_all(self) -> list[T]:
        if self._rest is not None:
            self._rest.cancel()
        is_urgent, self._urgent = self._urgent, False
        items = [self._items.popleft() for _ in range(len(self._items))]
        self._rest = None if is_urgent else self._bell.loop.call_later(self._pace, self._rested)
        return items

    def _rested(self) -> None:
        self._rest = None
        self._ready.set()


class Blocking:
    """Waits by blocking the calling thread; its coroutines never suspend."""

    def channel(self) -> Channel[Any]:
        """A queue whose ``get`` blocks."""
        return _BlockingChannel()

    async def run(self, function: Callable[..., R], *args: Any) -> R:
        """Call it here."""
        return function(*args)


class Awaiting:
    """Waits in the running event loop.

    ``pace``: a reader gets what came as one, at most every ``pace`` seconds; what is urgent, and
    the first that comes after a pause, at once. With 0 it gets each item as it comes.
    """

    def __init__(self, pace: float = 0.0) -> None:
        self._pace = pace
        self._bell: _Bell | None = None

    def channel(self) -> Channel[Any]:
        """A queue whose ``get`` awaits."""
        loop = asyncio.get_running_loop()
        if self._bell is None or self._bell.loop is not loop:
            self._bell = _Bell(loop)
        return _AsyncChannel(self._bell, self._pace)

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
