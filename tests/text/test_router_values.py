"""Arguments of XML formats become JSON by the schema of the tool."""

from __future__ import annotations

import json
from typing import Any

import pytest

from rl_mlx.text.router import Format, Routed, Router, collect

CODER = Format.of("<tool_call><function=<parameter=")


def route(text: str, parameters: Any) -> Routed:
    tools = [{"type": "function", "function": {"name": "f", "parameters": parameters}}]
    router = Router(CODER, tools=tools)
    return collect(router.feed(text) + router.flush())


def arguments(routed: Routed) -> Any:
    (call,) = routed.calls
    return json.loads(call.arguments)


@pytest.mark.parametrize(
    ("schema", "raw", "value"),
    [
        ({"type": "string"}, "12", "12"),
        ({"type": "string"}, "true", "true"),
        ({"type": "string"}, ' {"a": 1} ', ' {"a": 1} '),
        ({"type": "integer"}, "12", 12),
        ({"type": "integer"}, "12.0", 12),
        ({"type": "integer"}, "12.5", "12.5"),
        ({"type": "number"}, "12", 12),
        ({"type": "number"}, "1e999", "1e999"),
        ({"type": "number"}, "NaN", "NaN"),
        ({"type": "boolean"}, "True", True),
        ({"type": "boolean"}, "maybe", "maybe"),
        ({"type": "object"}, "{'a': [1, None]}", {"a": [1, None]}),
        ({"type": "object"}, "[1]", "[1]"),
        ({"type": ["string", "null"]}, "null", None),
        ({"type": ["string", "null"]}, "no", "no"),
        ({"anyOf": [{"type": "integer"}, {"type": "string"}]}, "7", 7),
        ({"enum": ["1", "2"]}, "1", "1"),
        ({"enum": [1, 2]}, "1", 1),
        ({"const": "x"}, "x", "x"),
        ({"$ref": "#/$defs/count"}, "7", 7),
        ({"$ref": "#/$defs/loop"}, "7", 7),
        ({"allOf": [{"type": "string"}]}, "7", "7"),
        ({"items": {}}, "[1]", [1]),
        ({}, "7", 7),
        ({}, "Seven", "Seven"),
        (True, "[]", []),
        ({"type": "string"}, "", ""),
        ({"type": "integer"}, "", ""),
        ({"type": "integer"}, "9" * 5000, "9" * 5000),
        ({"type": "array"}, "[" * 5000, "[" * 5000),
    ],
)
def test_xml_values_have_the_type_of_the_schema(schema: Any, raw: str, value: Any) -> None:
    defs = {"count": {"type": "integer"}, "loop": {"$ref": "#/$defs/loop"}}
    parameters = {"properties": {"x": schema}, "$defs": defs}
    text = (
        f"<tool_call>\n<function=f>\n<parameter=x>\n{raw}\n</parameter>\n</function>\n</tool_call>"
    )
    assert arguments(route(text, parameters)) == {"x": value}


def test_a_value_may_hold_its_own_closing_tag() -> None:
    text = (
        "<tool_call><function=f><parameter=city>a</parameter> b</parameter>"
        "<parameter=note>\n\nline\n\n</parameter></function></tool_call>"
    )
    expected = {"city": "a</parameter> b", "note": "\nline\n"}
    assert arguments(route(text, {})) == expected


def test_an_argument_comes_once() -> None:
    one = "<parameter=city>a</parameter>"
    text = f"<tool_call><function=f>{one}{one}</function></tool_call>"
    assert route(text, {}) == Routed("", text, ())
