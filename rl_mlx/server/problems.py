"""Errors as clients see them: each API has a shape of its own."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from rl_mlx.errors import ContextOverflow, InvalidRequest, ModelNotFound, RlMlxError

RETRY_AFTER = {429: "1", 503: "5"}


class BadParameter(InvalidRequest):
    """A parameter of a request that cannot be honoured; ``param`` names it."""

    def __init__(self, param: str, message: str) -> None:
        super().__init__(f"{param}: {message}")
        self.param = param


class Unauthorized(RlMlxError):
    """No API key, or a wrong one."""

    status = 401


class Forbidden(RlMlxError):
    """A page or a host name that may not call."""

    status = 403


class TimedOut(RlMlxError):
    """The request's body did not come in time."""

    status = 408


class TooLarge(RlMlxError):
    """The request's body is over the limit."""

    status = 413


class Stopping(RlMlxError):
    """The server is going down."""

    status = 503


@dataclass(frozen=True)
class Problem:
    """What went wrong, before it has the shape of an API."""

    status: int
    message: str
    param: str | None = None
    request_id: str = ""
    code: str | None = None


def problem_of(error: Exception, request_id: str = "") -> Problem:
    """What a client is told of an error; of one that nobody foresaw only that it happened."""
    if isinstance(error, ValidationError):
        message, param = _first_of(error)
        return Problem(400, message, param, request_id)
    if isinstance(error, RlMlxError):
        text = " ".join(str(error).split()) or type(error).__name__
        code = next((_CODES[kind] for kind in _CODES if isinstance(error, kind)), None)
        return Problem(error.status, text, getattr(error, "param", None), request_id, code)
    message = f"this should not have happened; the server's log has it under {request_id}"
    return Problem(500, message, None, request_id)


_CODES = {ContextOverflow: "context_length_exceeded", ModelNotFound: "model_not_found"}
_BRANCHES = ("str", "int", "float", "bool")


def _first_of(error: ValidationError) -> tuple[str, str | None]:
    """The first thing wrong in a body, and the parameter it is wrong in."""
    errors = error.errors(include_url=False, include_context=False, include_input=False)
    found = max(errors, key=lambda e: len(e["loc"]))  # of a choice's branches, the one it was in
    where = ""
    for part in found["loc"]:
        if isinstance(part, str) and (part in _BRANCHES or "[" in part):
            continue
        where += f"[{part}]" if isinstance(part, int) else f".{part}" if where else str(part)
    if found["type"] == "extra_forbidden":
        return f"{where}: this parameter is unknown, or not supported here", where
    if found["type"] == "missing":
        return f"{where}: this parameter is required", where
    text = found["msg"].removeprefix("Value error, ")
    return (f"{where}: {text}" if where else text), where or None


_OPENAI = {
    401: ("invalid_request_error", "invalid_api_key"),
    429: ("rate_limit_error", "rate_limit_exceeded"),
}
_ANTHROPIC = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


def openai_body(problem: Problem) -> dict[str, Any]:
    """As OpenAI has it."""
    kind = "server_error" if problem.status >= 500 else "invalid_request_error"
    kind, code = _OPENAI.get(problem.status, (kind, None))
    code = problem.code or code
    return {
        "error": {"message": problem.message, "type": kind, "param": problem.param, "code": code}
    }


def anthropic_body(problem: Problem) -> dict[str, Any]:
    """As Anthropic has it."""
    kind = "api_error" if problem.status >= 500 else "invalid_request_error"
    kind = _ANTHROPIC.get(problem.status, kind)
    error = {"type": kind, "message": problem.message}
    return {"type": "error", "error": error, "request_id": problem.request_id}


def ollama_body(problem: Problem) -> dict[str, Any]:
    """As Ollama has it."""
    return {"error": problem.message}


SSE = "text/event-stream; charset=utf-8"
NDJSON = "application/x-ndjson"


@dataclass(frozen=True)
class Dialect:
    """How an API streams, and how it says that something failed: as a JSON body (``schema``), and
    inside a stream.
    """

    name: str
    media: str
    body: Callable[[Problem], dict[str, Any]]
    event: Callable[[dict[str, Any]], bytes]
    schema: dict[str, Any]


def encode(value: Any) -> bytes:
    """Compact JSON in UTF-8; a lone surrogate is escaped."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    try:
        return text.encode()
    except UnicodeEncodeError:
        return json.dumps(value, separators=(",", ":")).encode()


def data(value: Any) -> bytes:
    """One server-sent event."""
    return b"data: " + encode(value) + b"\n\n"


def named(value: dict[str, Any]) -> bytes:
    """One server-sent event with the name that its ``type`` says."""
    return b"event: " + str(value["type"]).encode() + b"\n" + data(value)


def line(value: Any) -> bytes:
    """One line of NDJSON."""
    return encode(value) + b"\n"


def _object(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "required": list(properties), "properties": properties}


_TEXT, _MAYBE = {"type": "string"}, {"type": ["string", "null"]}
OPENAI = Dialect(
    "openai", SSE, openai_body, data,
    _object(error=_object(message=_TEXT, type=_TEXT, param=_MAYBE, code=_MAYBE)),
)  # fmt: skip
ANTHROPIC = Dialect(
    "anthropic", SSE, anthropic_body, named,
    _object(type={"const": "error"}, error=_object(type=_TEXT, message=_TEXT), request_id=_TEXT),
)  # fmt: skip
OLLAMA = Dialect("ollama", NDJSON, ollama_body, line, _object(error=_TEXT))


def dialect_of(path: str) -> Dialect:
    """Whose API a path belongs to."""
    if path.startswith("/v1/messages"):
        return ANTHROPIC
    return OLLAMA if path.startswith("/api/") else OPENAI
