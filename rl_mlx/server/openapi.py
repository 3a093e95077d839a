"""The OpenAPI document of this server, made of its routes and schemas."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from pydantic import BaseModel
from starlette.routing import Route

from rl_mlx import __version__
from rl_mlx.server.endpoint import Endpoint


def document(routes: Iterable[Route]) -> dict[str, Any]:
    """OpenAPI 3.1: every path, the schema of its body, and the statuses it may answer with."""
    paths: dict[str, Any] = {}
    schemas: dict[str, Any] = {}
    for route in routes:
        endpoint = route.endpoint
        schema = endpoint.schema if isinstance(endpoint, Endpoint) else None
        name = re.sub(r"\{(\w+):\w+\}", r"{\1}", route.path)
        entry = _operation(schema, re.findall(r"\{(\w+)\}", name))
        if schema is not None:
            # Schemas of two APIs may share a name: the file they are in tells them apart.
            prefix = schema.__module__.rpartition(".")[2]
            found = schema.model_json_schema(
                ref_template=f"#/components/schemas/{prefix}.{{model}}"
            )
            for inner, value in found.pop("$defs", {}).items():
                schemas[f"{prefix}.{inner}"] = value
            schemas[f"{prefix}.{schema.__name__}"] = found
        for method in (route.methods or set()) - {"HEAD"}:
            paths.setdefault(name, {})[method.lower()] = entry
    return {
        "openapi": "3.1.0",
        "info": {"title": "rl-mlx", "version": __version__},
        "paths": paths,
        "components": {"schemas": schemas},
    }


def _operation(schema: type[BaseModel] | None, names: Iterable[str]) -> dict[str, Any]:
    answers = {"200": {"description": "done"}, "4XX": {"description": "the request was wrong"}}
    operation: dict[str, Any] = {"responses": answers}
    parameters = [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
        for name in names
    ]
    if parameters:
        operation["parameters"] = parameters
    if schema is not None:
        prefix = schema.__module__.rpartition(".")[2]
        reference = {"$ref": f"#/components/schemas/{prefix}.{schema.__name__}"}
        content = {"application/json": {"schema": reference}}
        operation["requestBody"] = {"required": True, "content": content}
    return operation
