"""Where in a JSON Schema the trouble is."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from copy import deepcopy
from typing import Any

_MAPS = ("properties", "patternProperties", "dependentSchemas")
_LISTS = ("allOf", "anyOf", "oneOf", "prefixItems", "items")
_SINGLES = (
    "items",
    "additionalProperties",
    "additionalItems",
    "contains",
    "not",
    "if",
    "then",
    "else",
    "propertyNames",
    "unevaluatedItems",
    "unevaluatedProperties",
)
_DEFINITIONS = ("$defs", "definitions")
_ROOT = "_root"
_MAX_TRIES = 300
_MAX_WORK = 3_000_000  # characters given to trials, for a schema may be large

Schema = dict[str, Any]


def locate(schema: Schema, error_of: Callable[[Schema], str | None]) -> tuple[str, str]:
    """The path of the keyword that makes ``error_of(schema)`` an error, and the error.

    Paths are JSON Pointers (RFC 6901). Descends as long as a part alone has the same error, then
    looks for the keyword without which it is gone. In a large schema the search ends early, with a
    path above the keyword's.
    """
    moved = _moved(schema)
    tries = min(_MAX_TRIES, _MAX_WORK // len(json.dumps(schema)))

    def alone(part: Schema) -> str | None:
        nonlocal tries
        tries -= 1
        return error_of({**_moved(part), _ROOT: moved})

    def without(keyword: str) -> str | None:
        nonlocal tries
        tries -= 1
        rest: Schema = deepcopy(schema)
        part = resolve(rest, path)
        del part[keyword]
        return error_of({**_moved(part), _ROOT: _moved(rest)} if path else rest)

    message = error_of(schema) or ""
    path, node, seen = "", schema, {""}
    found = True
    while found:
        found = False
        for where, child in _children(path, node, schema):
            known = where in seen or str(child.get("$ref", "none"))[1:] in seen
            if not known and tries > 0 and alone(child) == message:
                path, node, found = where, child, True
                seen.add(where)
                break
    for keyword in sorted(node, key="type".__eq__):  # which alone may switch the others off
        if tries > 0 and without(keyword) != message:
            return f"{path}/{_escape(keyword)}", message
    return path or "/", message


def nested_id(schema: Schema) -> str | None:
    """The path of an ``$id`` that is not at the root: it would change what references mean."""
    waiting: list[tuple[str, Schema]] = [("", schema)]
    while waiting:
        path, node = waiting.pop()
        if path and isinstance(node.get("$id"), str):
            return f"{path}/$id"
        waiting += _parts(path, node, (*_MAPS, *_DEFINITIONS))
    return None


def _children(path: str, node: Schema, root: Schema) -> Iterator[tuple[str, Schema]]:
    """The schemas that a schema is made of, and what it refers to."""
    yield from _parts(path, node, _MAPS)
    reference = node.get("$ref")
    if isinstance(reference, str) and reference.startswith("#/"):
        target = resolve(root, reference[1:])
        if isinstance(target, dict):
            yield reference[1:], target


def _parts(path: str, node: Schema, maps: tuple[str, ...]) -> Iterator[tuple[str, Schema]]:
    for key in maps:
        if isinstance(node.get(key), dict):
            for name, part in node[key].items():
                if isinstance(part, dict):
                    yield f"{path}/{key}/{_escape(name)}", part
    for key in _LISTS:
        if isinstance(node.get(key), list):
            for i, part in enumerate(node[key]):
                if isinstance(part, dict):
                    yield f"{path}/{key}/{i}", part
    for key in _SINGLES:
        if isinstance(node.get(key), dict):
            yield f"{path}/{key}", node[key]


def resolve(root: Any, pointer: str) -> Any:
    """What a JSON Pointer points to; ``None`` where that is nothing."""
    for step in pointer.split("/")[1:]:
        step = step.replace("~1", "/").replace("~0", "~")
        if isinstance(root, list) and step.isdigit() and int(step) < len(root):
            root = root[int(step)]
        else:
            root = root.get(step) if isinstance(root, dict) else None
    return root


def _escape(step: str) -> str:
    return step.replace("~", "~0").replace("/", "~1")


def _moved(value: Any) -> Any:
    """A copy whose references lead to where the root is put for a trial."""
    if isinstance(value, list):
        return [_moved(item) for item in value]
    if not isinstance(value, dict):
        return value
    copy = {key: _moved(item) for key, item in value.items() if key != "$id"}
    reference = copy.get("$ref")
    if isinstance(reference, str) and reference.startswith("#"):
        copy["$ref"] = f"#/{_ROOT}" + reference[1:]
    return copy
