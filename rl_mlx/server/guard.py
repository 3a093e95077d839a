"""Who may ask at all: checked before any route is looked at."""

from __future__ import annotations

import ipaddress
import logging
import re
import secrets
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rl_mlx.errors import RlMlxError
from rl_mlx.server import page
from rl_mlx.server.keys import is_key
from rl_mlx.server.logs import LOGGER
from rl_mlx.server.problems import Forbidden, Unauthorized, dialect_of, encode, problem_of
from rl_mlx.server.settings import ServerSettings

OPEN = ("/health", "/ready", *page.PATHS)
"""Paths that need no key: what a supervisor asks, and the page, which asks for one."""
_logger = logging.getLogger(LOGGER)
_ID = re.compile(r"[A-Za-z0-9_.:-]{1,128}")


class Guard:
    """Gives each request an id, and turns away those without a key, of a strange page, or under a
    strange name of this host.

    A page on the web can make a browser call a server on this machine: directly, which its
    ``Origin`` shows, or after pointing its own name here (DNS rebinding), which ``Host`` shows. An
    address as ``Host`` is safe: no name was rebound.
    """

    def __init__(self, app: ASGIApp, settings: ServerSettings) -> None:
        self._app = app
        self._settings = settings
        self._hosts = {"localhost", settings.host.lower(), *(h.lower() for h in settings.hosts)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        given = headers.get(b"x-request-id", "")
        request_id = given if _ID.fullmatch(given) else f"req_{secrets.token_hex(12)}"
        scope.setdefault("state", {})["request_id"] = request_id

        async def send_named(message: Message) -> None:
            if message["type"] == "http.response.start":
                named = [(n, request_id.encode()) for n in (b"x-request-id", b"request-id")]
                message = {**message, "headers": [*message["headers"], *named]}
            await send(message)

        try:
            self._check(scope, headers)
        except RlMlxError as error:
            fields = {"request": request_id, "status": error.status, "error": str(error)}
            _logger.warning("refused", extra={"fields": fields})
            await _refuse(scope, error, request_id, send_named)
        else:
            await self._app(scope, receive, send_named)

    def _check(self, scope: Scope, headers: dict[bytes, str]) -> None:
        host = headers.get(b"host", "")
        if self._settings.socket is None and not self._is_host(host):
            raise Forbidden(f"this server is not known as {host!r:.100}; see --allow-host")
        origin = headers.get(b"origin")
        if origin is not None and not self._is_origin(origin, host):
            raise Forbidden(f"pages of {origin!r:.100} may not call; see --cors-origin")
        if self._settings.keys and scope["path"] not in OPEN and scope["method"] != "OPTIONS":
            scheme, _, token = headers.get(b"authorization", "").partition(" ")
            key = token.strip() if scheme.lower() == "bearer" else headers.get(b"x-api-key", "")
            if not is_key(key, self._settings.keys):
                raise Unauthorized("a valid API key is needed: Authorization: Bearer KEY")

    def _is_host(self, host: str) -> bool:
        try:
            name = urlsplit(f"//{host}").hostname or ""
            if name in self._hosts or name.endswith(".localhost"):
                return True
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True

    def _is_origin(self, origin: str, host: str) -> bool:
        origins = self._settings.origins
        return (
            "*" in origins or origin in origins or origin in (f"http://{host}", f"https://{host}")
        )


async def _refuse(scope: Scope, error: RlMlxError, request_id: str, send: Send) -> None:
    problem = problem_of(error, request_id)
    content = encode(dialect_of(scope["path"]).body(problem))
    headers = [(b"content-type", b"application/json"), (b"connection", b"close")]
    headers.append((b"content-length", str(len(content)).encode()))
    if isinstance(error, Unauthorized):
        headers.append((b"www-authenticate", b"Bearer"))
    start = {"type": "http.response.start", "status": problem.status, "headers": headers}
    await send(start)
    await send({"type": "http.response.body", "body": content})
