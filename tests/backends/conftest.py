"""Backends by name, and a caller that collects what they emit."""

from __future__ import annotations

import itertools
import queue
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from rl_mlx.backends import open_backend
from rl_mlx.backends.base import Backend
from rl_mlx.errors import BackendUnavailable
from rl_mlx.settings import ModelSettings
from rl_mlx.store import ModelFiles
from rl_mlx.types import (
    Event,
    Failed,
    Finished,
    Progress,
    Request,
    SamplingParams,
    Token,
    TokenLogprob,
)


@dataclass
class Reply:
    """All events of one request, up to the terminal one."""

    events: list[Event]

    @property
    def ids(self) -> list[int]:
        return [e.id for e in self.events if isinstance(e, Token)]

    @property
    def logprobs(self) -> list[TokenLogprob]:
        return [e.logprob for e in self.events if isinstance(e, Token) and e.logprob is not None]

    @property
    def progress(self) -> list[Progress]:
        return [e for e in self.events if isinstance(e, Progress)]

    @property
    def finished(self) -> Finished:
        last = self.events[-1]
        assert isinstance(last, Finished), last
        return last


class Call:
    """A request under way; ``first()`` waits for a token, ``reply()`` for the end."""

    def __init__(self, backend: Backend, request: Request) -> None:
        self.id = request.id
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._seen: list[Event] = []
        backend.submit(request, self._events.put)

    def _next(self) -> Event:
        event = self._events.get(timeout=60)
        self._seen.append(event)
        return event

    def first(self) -> Event:
        while not isinstance(event := self._next(), (Token, Finished, Failed)):
            pass
        return event

    def reply(self) -> Reply:
        while not (self._seen and isinstance(self._seen[-1], (Finished, Failed))):
            self._next()
        assert self._events.empty(), "nothing may follow the terminal event"
        return Reply(self._seen)


Start = Callable[..., Call]
Ask = Callable[..., Reply]
Open = Callable[..., Backend]


@pytest.fixture
def start() -> Start:
    """``start(backend, prompt, eos=(), **sampling)``: a request under way; greedy unless told
    otherwise.
    """
    numbers = itertools.count()

    def start_one(
        backend: Backend,
        prompt: Sequence[int],
        *,
        eos: Sequence[int] = (),
        priority: int = 0,
        **options: Any,
    ) -> Call:
        params = SamplingParams(**{"temperature": 0, **options})
        request = Request(
            id=f"call-{next(numbers)}",
            prompt=tuple(prompt),
            params=params,
            eos_ids=frozenset(eos),
            priority=priority,
        )
        return Call(backend, request)

    return start_one


@pytest.fixture
def ask(start: Start) -> Ask:
    """``ask(backend, prompt, ...)``: the same, and its reply."""
    return lambda *args, **options: start(*args, **options).reply()


@pytest.fixture(scope="session")
def stories(shared: Path) -> Path:
    """A trained model of 260K parameters; its own context is 128 tokens."""
    return shared / "models" / "stories260K.gguf"


@pytest.fixture
def open_model() -> Iterator[Open]:
    """``open_model(path, backend=..., ...)``: opened backends, closed after the test."""
    opened: list[Backend] = []

    def open_one(path: Path, **settings: Any) -> Backend:
        settings.setdefault("dtype", "float32")
        if settings.get("backend") == "llama.cpp":
            settings["backend_options"] = {"threads": 1, **settings.get("backend_options", {})}
        try:
            backend = open_backend(ModelFiles(path.stem, path), ModelSettings(**settings))
        except BackendUnavailable as error:
            pytest.skip(str(error))
        opened.append(backend)
        return backend

    yield open_one
    for backend in opened:
        backend.close()
