"""One request over HTTP: its body in, an answer or a stream out, and the end whoever brings it."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import aclosing, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from pydantic import BaseModel
from starlette.types import Message, Receive, Scope, Send

from rl_mlx.errors import InvalidRequest, RlMlxError
from rl_mlx.server.logs import LOGGER
from rl_mlx.server.problems import (
    RETRY_AFTER,
    SSE,
    Dialect,
    Problem,
    Stopping,
    TimedOut,
    TooLarge,
    dialect_of,
    encode,
    problem_of,
)

if TYPE_CHECKING:
    from rl_mlx.server.state import State

B = TypeVar("B")
M = TypeVar("M", bound=BaseModel)
_DISCARDED = 4  # times the limit of a body is read and thrown away, so that its sender sees the 413
_TICK = 0.5
_CLIENT_LEFT = 499
MAX_DEPTH = 100
"""Objects and lists within one another in a body."""
_logger = logging.getLogger(LOGGER)


@dataclass
class Call(Generic[B]):
    """A request on its way through a handler. ``record`` is what the log will say of it."""

    state: State
    body: B
    request_id: str
    path: Mapping[str, str]
    record: dict[str, Any]


@dataclass(frozen=True)
class Json:
    """A whole answer."""

    body: Any
    status: int = 200


@dataclass(frozen=True)
class Stream:
    """An answer in pieces, each of them encoded. ``failure`` ends it where it fails, in another way
    than that of its API.
    """

    items: AsyncGenerator[bytes, None]
    failure: Callable[[Problem], bytes] | None = None


Handler = Callable[[Call[Any]], Awaitable[Json | Stream]]


class _Left(Exception):
    """The client went away, or reads no more."""


class Endpoint:
    """The ASGI application of the route at ``path``.

    ``schema`` checks the body, None where there is none. ``works``: it makes a model work, so it is
    counted and has to end when the server does.
    """

    def __init__(
        self,
        path: str,
        handler: Handler,
        schema: type[BaseModel] | None = None,
        *,
        works: bool = True,
    ) -> None:
        self.schema = schema
        self._path = path
        self.handler = handler
        self._works = works and schema is not None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        exchange = Exchange(scope, send)
        try:
            with exchange.state.gate.enter() if self._works else nullcontext():
                body = None
                if self.schema is not None:
                    body = await _parse(receive, exchange.state, self.schema)
                path = scope.get("path_params", {})
                call = Call[Any](exchange.state, body, exchange.request_id, path, exchange.record)
                await self._run(call, exchange, receive)
        except _Left:
            exchange.status = _CLIENT_LEFT
        except Exception as error:  # noqa: BLE001 - the edge: a client always gets an answer
            await exchange.fail(error)
        finally:
            exchange.finish(self._path)

    async def _run(self, call: Call[Any], exchange: Exchange, receive: Receive) -> None:
        """Handle it until it is done, the client has gone, or the server must end."""
        work = asyncio.create_task(self._answer(call, exchange))
        watches = [
            asyncio.create_task(_until_gone(receive)),
            asyncio.create_task(exchange.watch()),
            asyncio.create_task(_until_stopped(call.state, works=self._works)),
        ]
        try:
            done, _ = await asyncio.wait([work, *watches], return_when=asyncio.FIRST_COMPLETED)
            if work in done:
                work.result()
                return
            await _cancel(work)
            for task in done:
                task.result()  # raises why it had to end
        finally:
            await _cancel(work, *watches)

    async def _answer(self, call: Call[Any], exchange: Exchange) -> None:
        reply = await self.handler(call)
        if isinstance(reply, Json):
            await exchange.send_json(reply.status, reply.body)
        else:
            await exchange.send_stream(reply)


class Exchange:
    """The sending side of a request, and what is noted of it."""

    def __init__(self, scope: Scope, send: Send) -> None:
        self.state: State = scope["app"].state.server
        self.request_id: str = scope["state"]["request_id"]
        self.status = 0
        self.record: dict[str, Any] = {}
        self._scope = scope
        self._send_message = send
        self._dialect: Dialect = dialect_of(scope["path"])
        self._stream: Stream | None = None
        self._started = time.monotonic()
        self._sent = self._started
        self._sending: float | None = None
        self._quiet = False  # between two events of a stream: a comment may be sent

    async def send_json(
        self, status: int, body: Any, headers: Mapping[str, str] | None = None
    ) -> None:
        """A whole response."""
        content = encode(body)
        more = {"content-length": str(len(content)), **(headers or {})}
        await self._start(status, "application/json", more)
        await self._send({"type": "http.response.body", "body": content})

    async def send_stream(self, stream: Stream) -> None:
        """Send events as they come. The headers wait a moment for the first: it may be an error,
        which has a status.
        """
        async with aclosing(stream.items) as items:
            first = asyncio.create_task(_next(items))
            try:
                await asyncio.wait([first], timeout=self.state.settings.quiet)
                if first.done():
                    first.result()
                await self._start(200, self._dialect.media, {"cache-control": "no-cache"})
                self._stream = stream
                self._quiet = self._dialect.media == SSE
                item = await first
                while item is not None:
                    if item:
                        part = {"type": "http.response.body", "body": item, "more_body": True}
                        await self._send(part)
                    item = await _next(items)
            finally:
                await _cancel(first)
        self._quiet = False
        await self._send({"type": "http.response.body", "body": b""})

    async def watch(self) -> None:
        """Keep a quiet stream alive by comments; give up on a client that does not read."""
        settings = self.state.settings
        while True:
            await asyncio.sleep(min(_TICK, settings.quiet))
            now = time.monotonic()
            if self._sending is not None and now - self._sending > settings.stall_time:
                self._hang_up()
                raise _Left
            if self._quiet and self._sending is None and now - self._sent >= settings.quiet:
                comment = {"type": "http.response.body", "body": b": waiting\n\n"}
                await self._send({**comment, "more_body": True})

    def _hang_up(self) -> None:
        connection = self._scope["state"].get("connection")
        if connection is not None:
            connection.transport.abort()

    async def fail(self, error: Exception) -> None:
        """Tell the client, in the shape of its API; in the stream where that has begun."""
        try:
            await asyncio.wait_for(self._tell(error), self.state.settings.stall_time)
        except (asyncio.TimeoutError, TimeoutError):
            self._hang_up()

    async def _tell(self, error: Exception) -> None:
        problem = problem_of(error, self.request_id)
        self.record["error"] = problem.message
        if problem.status >= 500 and not isinstance(error, RlMlxError):
            _logger.error("a bug", exc_info=error, extra={"fields": {"request": self.request_id}})
        if self._stream is not None:
            failure = self._stream.failure
            event = failure(problem) if failure else self._dialect.event(self._body(problem))
            self._quiet = False
            await self._send({"type": "http.response.body", "body": event})
        elif not self.status:
            retry = RETRY_AFTER.get(problem.status)
            headers = {"retry-after": retry} if retry else {}
            if isinstance(error, (TooLarge, TimedOut, Stopping)):
                headers["connection"] = "close"
            await self.send_json(problem.status, self._body(problem), headers)

    def finish(self, route: str) -> None:
        """Note what became of it."""
        seconds = time.monotonic() - self._started
        method, path = self._scope["method"], self._scope["path"]
        self.state.metrics.request(route, self.status, seconds, self.record)
        fields = {
            "request": self.request_id,
            "status": self.status,
            "ms": round(seconds * 1000, 1),
            **self.record,
        }
        _logger.info(
            "%s %s", method, path.encode("unicode_escape").decode(), extra={"fields": fields}
        )

    def _body(self, problem: Problem) -> dict[str, Any]:
        return self._dialect.body(problem)

    async def _start(self, status: int, media: str, headers: Mapping[str, str]) -> None:
        self.status = status
        fields = {"content-type": media, **headers}
        raw = [(name.encode(), value.encode()) for name, value in fields.items()]
        await self._send({"type": "http.response.start", "status": status, "headers": raw})

    async def _send(self, message: Message) -> None:
        self._sending = time.monotonic()
        try:
            await self._send_message(message)
        finally:
            self._sending = None
            self._sent = time.monotonic()


async def _next(items: AsyncGenerator[bytes, None]) -> bytes | None:
    return await anext(items, None)


async def _cancel(*tasks: asyncio.Task[Any]) -> None:
    """Cancel, and wait until they have cleaned up."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    raise _Left


async def _until_stopped(state: State, *, works: bool) -> None:
    if works:
        await state.gate.stopped.wait()
    else:
        await asyncio.get_running_loop().create_future()
    raise Stopping("the server is going down")


async def _parse(receive: Receive, state: State, schema: type[M]) -> M:
    settings = state.settings
    try:
        content = await asyncio.wait_for(_read(receive, settings.body_limit), settings.body_time)
    except (asyncio.TimeoutError, TimeoutError):
        raise TimedOut(f"the body did not come within {settings.body_time:g} s") from None
    if len(content) > state.INLINE:
        return await state.in_thread(_check, content, schema)
    return _check(content, schema)


async def _read(receive: Receive, limit: int) -> bytes:
    """The body. What is over the limit is read, to a point, and thrown away."""
    pieces, size = [], 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise _Left
        piece = message.get("body", b"")
        size += len(piece)
        if size <= limit:
            pieces.append(piece)
        if not message.get("more_body", False) or size > limit * _DISCARDED:
            break
    if size > limit:
        raise TooLarge(f"the body is over the limit of {limit} bytes")
    return b"".join(pieces)


def _check(content: bytes, schema: type[M]) -> M:
    """The body as its schema has it. Raises ``InvalidRequest`` or pydantic's own error."""
    if not content:
        raise InvalidRequest("the body is empty; it must be a JSON object")
    try:
        value = json.loads(content, parse_constant=_refuse)
        _check_depth(value)
    except RecursionError:
        raise InvalidRequest("the body is nested too deep") from None
    except ValueError as error:  # also what is not UTF-8
        raise InvalidRequest(f"the body is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise InvalidRequest("the body must be a JSON object")
    return schema.model_validate(value)


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")


def _check_depth(value: Any) -> None:
    """Raises ``RecursionError`` for what code that follows it down could not bear."""
    level = [value] if isinstance(value, (dict, list)) else []
    for _ in range(MAX_DEPTH):
        level = [
            item
            for found in level
            for item in (found.values() if isinstance(found, dict) else found)
            if isinstance(item, (dict, list))
        ]
        if not level:
            return
    raise RecursionError
