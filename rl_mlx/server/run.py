"""Runs the application on uvicorn: sockets, signals, slow connections."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import stat
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn
from starlette.applications import Starlette
from uvicorn.protocols.http.h11_impl import H11Protocol

from rl_mlx.errors import RlMlxError
from rl_mlx.server.logs import LOGGER
from rl_mlx.server.settings import ServerSettings
from rl_mlx.server.state import State

_logger = logging.getLogger(LOGGER)
_BACKLOG = 2048
_KEEP_ALIVE = 30
_AFTER_GRACE = 5  # seconds for the error events of what was ended


def serve(app: Starlette, settings: ServerSettings, announce: Callable[[str], None]) -> None:
    """Serve until SIGTERM or SIGINT; a second one ends it at once.

    ``announce`` is called with the address once the models are loaded. Raises ``RlMlxError`` where
    the address cannot be had, and what loading the models raises.
    """
    asyncio.run(serve_in(app, settings, announce, asyncio.Event()))


async def serve_in(
    app: Starlette,
    settings: ServerSettings,
    announce: Callable[[str], None],
    stop: asyncio.Event,
) -> None:
    """The same in a running event loop, until ``stop`` is set or a signal comes."""
    listener = _listen(settings)
    server = _Server(_config(app, settings), settings, stop)
    address = _address(listener, settings)
    try:
        await _run(app.state.server, server, listener, lambda: announce(address))
    finally:
        listener.close()
        if settings.socket is not None:
            Path(settings.socket).unlink(missing_ok=True)


def _config(app: Starlette, settings: ServerSettings) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        http=_connection(settings),
        ws="none",
        loop="asyncio",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        backlog=_BACKLOG,
        timeout_keep_alive=_KEEP_ALIVE,
        timeout_graceful_shutdown=int(settings.grace) + _AFTER_GRACE,
    )


async def _run(
    state: State, server: _Server, listener: socket.socket, announce: Callable[[], None]
) -> None:
    """Answer at once, load the models meanwhile, and end both."""
    serving = asyncio.create_task(server.serve([listener]))
    starting = asyncio.create_task(state.models.start())
    try:
        await asyncio.wait([serving, starting], return_when=asyncio.FIRST_COMPLETED)
        if starting.done() and starting.exception() is None:
            announce()
        elif starting.done():
            server.should_exit = True
        await serving
        if starting.done():
            starting.result()
    finally:
        starting.cancel()
        await asyncio.gather(starting, return_exceptions=True)
        await state.close()


class _Server(uvicorn.Server):
    """uvicorn, which ends requests by our rules."""

    def __init__(
        self, config: uvicorn.Config, settings: ServerSettings, stop: asyncio.Event
    ) -> None:
        super().__init__(config)
        self._settings = settings
        self._stop = stop

    async def on_tick(self, counter: int) -> bool:
        """See uvicorn; ten times a second."""
        return await super().on_tick(counter) or self._stop.is_set()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """See uvicorn."""
        app: Any = self.config.app
        gate, grace = app.state.server.gate, self._settings.grace
        gate.drain(grace)
        if gate.active:
            _logger.info(
                "going down: requests under way have %g s, or until it is told again", grace
            )
        await super().shutdown(sockets)

    @contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """Stop by SIGTERM and SIGINT, without dying of the signal afterwards."""
        if threading.current_thread() is not threading.main_thread():
            yield  # signals come to the main thread alone
            return
        before = {s: signal.signal(s, self.handle_exit) for s in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002 - uvicorn's
        """The first signal ends it gracefully, the second at once."""
        self.force_exit = self.should_exit
        self.should_exit = True


def _connection(settings: ServerSettings) -> type[H11Protocol]:
    class Connection(_Connection):
        head_time = settings.head_time

    return Connection


class _Connection(H11Protocol):
    """A connection that must send a request's head in ``head_time`` seconds, and that the
    application can break off.
    """

    head_time = 0.0

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.app_state = {**self.app_state, "connection": self}
        self._late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """See asyncio."""
        super().connection_made(transport)
        self._watch_head()

    def data_received(self, data: bytes) -> None:
        """See asyncio."""
        super().data_received(data)
        self._watch_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """See asyncio."""
        super().connection_lost(exc)
        self._stop_watching()

    def _is_waiting(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def _watch_head(self) -> None:
        if not self._is_waiting():
            self._stop_watching()
        elif self._late is None and not self.transport.is_closing():
            self._late = self.loop.call_later(self.head_time, self._hang_up)

    def _stop_watching(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None

    def _hang_up(self) -> None:
        self._late = None
        if self._is_waiting():
            self.transport.abort()


def _listen(settings: ServerSettings) -> socket.socket:
    if settings.socket is not None:
        return _listen_locally(Path(settings.socket))
    try:
        found = socket.getaddrinfo(
            settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        family, kind, protocol, _, address = found[0]
        listener = socket.socket(family, kind, protocol)
        if os.name == "posix":
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(_BACKLOG)
    except OSError as error:
        raise RlMlxError(
            f"cannot listen on {settings.host}:{settings.port} ({error.strerror}); another server "
            "may run there: --port takes another"
        ) from error
    return listener


def _listen_locally(path: Path) -> socket.socket:
    """A Unix socket that only this user may use."""
    try:
        if path.exists() and stat.S_ISSOCK(path.stat().st_mode):
            path.unlink()
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        before = os.umask(0o177)
        try:
            listener.bind(str(path))
        finally:
            os.umask(before)
        listener.listen(_BACKLOG)
    except OSError as error:
        raise RlMlxError(f"cannot listen on {path} ({error.strerror or error})") from error
    return listener


def _address(listener: socket.socket, settings: ServerSettings) -> str:
    if settings.socket is not None:
        return f"unix:{settings.socket}"
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
