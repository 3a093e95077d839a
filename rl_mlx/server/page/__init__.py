"""The chat page at ``/``: three files, served as they are, that need nothing from anywhere else."""

from __future__ import annotations

from importlib.resources import files

from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

_HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
    "vary": "accept",
}
_MEDIA = {"html": "text/html", "css": "text/css", "js": "text/javascript"}


PATHS = ("/", "/page.css", "/page.js")
"""They need no key: the page asks for it."""


def routes() -> list[Route]:
    """``/`` and the two files that it loads."""
    return [Route(path, _page, methods=["GET"]) for path in PATHS]


async def _page(request: Request) -> Response:
    """The page for browsers; for others at ``/``, which ask whether somebody is there, a line."""
    name = request.url.path.removeprefix("/")
    if not name and "text/html" not in request.headers.get("accept", ""):
        return PlainTextResponse("rl-mlx is running\n")
    file = files("rl_mlx.server.page").joinpath(name or "index.html")
    media = _MEDIA[file.name.rpartition(".")[2]]
    return Response(file.read_bytes(), media_type=media, headers=_HEADERS)
