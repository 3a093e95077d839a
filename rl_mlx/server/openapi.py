"""The OpenAPI document of this server, made of its routes and schemas."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from pydantic import BaseModel
from starlette.routing import Route

from rl_mlx import __version__
from rl_mlx.server.endpoint import Endpoint
from rl_mlx.server.problems import ANTHROPIC, OLLAMA, OPENAI, Dialect, dialect_of

JSON = "application/json"
_PARTS = "#/components/schemas/"
_PLAIN = {
    "/": ("text/plain", "text/html"),
    "/page.css": ("text/css",),
    "/page.js": ("text/javascript",),
    "/metrics": ("text/plain",),
}
_SECURITY = {
    "bearer": {"type": "http", "scheme": "bearer"},
    "key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
}


def document(routes: Iterable[Route], *, keys: bool = False) -> dict[str, Any]:
    """OpenAPI 3.1: every path, the schema of its body, and what its answers look like.

    ``keys``: an API key is needed.
    """
    paths: dict[str, Any] = {}
    schemas: dict[str, Any] = {f"{d.name}.Error": d.schema for d in (OPENAI, ANTHROPIC, OLLAMA)}
    for route in routes:
        endpoint = route.endpoint
        body = endpoint.schema if isinstance(endpoint, Endpoint) else None
        name = re.sub(r"\{(\w+):\w+\}", r"{\1}", route.path)
        entry = _operation(route, body, re.findall(r"\{(\w+)\}", name))
        if body is not None:
            schemas |= _schemas(body)
        for method in (route.methods or set()) - {"HEAD"}:
            paths.setdefault(name, {})[method.lower()] = entry
    found: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {"title": "rl-mlx", "version": __version__},
        "paths": paths,
        "components": {"schemas": schemas},
    }
    if keys:
        found["components"]["securitySchemes"] = _SECURITY
        found["security"] = [{name: []} for name in _SECURITY]
    return found


def _prefix(schema: type[BaseModel]) -> str:
    """Schemas of two APIs may share a name: the file they are in tells them apart."""
    return schema.__module__.rpartition(".")[2]


def _schemas(body: type[BaseModel]) -> dict[str, Any]:
    """The schema of a body and those that it refers to."""
    prefix = _prefix(body)
    found = body.model_json_schema(ref_template=f"{_PARTS}{prefix}.{{model}}")
    inner = found.pop("$defs", {})
    return {f"{prefix}.{name}": value for name, value in {**inner, body.__name__: found}.items()}


def _operation(route: Route, body: type[BaseModel] | None, names: Iterable[str]) -> dict[str, Any]:
    dialect = dialect_of(route.path)
    operation: dict[str, Any] = {"responses": _answers(route, body, dialect)}
    parameters = [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
        for name in names
    ]
    if parameters:
        operation["parameters"] = parameters
    if body is not None:
        reference = {"$ref": f"{_PARTS}{_prefix(body)}.{body.__name__}"}
        operation["requestBody"] = {"required": True, "content": {JSON: {"schema": reference}}}
    return operation


def _answers(route: Route, body: type[BaseModel] | None, dialect: Dialect) -> dict[str, Any]:
    failed = {JSON: {"schema": {"$ref": f"{_PARTS}{dialect.name}.Error"}}}
    text: dict[str, Any] = {"schema": {"type": "string"}}
    done: dict[str, Any] = {JSON: {"schema": {"type": "object"}}}
    if route.path in _PLAIN:
        done = dict.fromkeys(_PLAIN[route.path], text)
    elif body is not None and "stream" in body.model_fields:
        done[dialect.media.partition(";")[0]] = {}  # a schema would be that of one event or line
    answers = {
        "200": {"description": "done", "content": done},
        "4XX": {"description": "the request was wrong, or came too often", "content": failed},
    }
    if isinstance(route.endpoint, Endpoint):
        answers["5XX"] = {"description": "it cannot be done now", "content": failed}
    elif route.path == "/ready":
        answers["503"] = {"description": "not ready", "content": done}
    return answers
