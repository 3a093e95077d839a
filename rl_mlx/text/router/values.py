"""Arguments as JSON text: from the values that XML, Python and Gemma formats write, by the tool's
schema.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any

Schema = Mapping[str, Any]
_MAX_DEPTH = 128
_KINDS = ("null", "boolean", "integer", "number", "array", "object", "string")
_SPACE = re.compile(r"\s*")
_NUMBER = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?")
_WORD = re.compile(r"[^\W\d][\w.\-]*")
_WORDS = {"true": "true", "false": "false", "none": "null", "null": "null"}
_ESCAPE = re.compile(r"\\(u[0-9a-fA-F]{4}|x[0-9a-fA-F]{2}|\n|.)", re.DOTALL)
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f", "0": "\0", "\n": ""}
# What comes after each kind of opening quote, up to the closing one.
_QUOTES = {
    '<|"|>': re.compile(r'(.*?)<\|"\|>', re.DOTALL),
    "<escape>": re.compile(r"(.*?)<escape>", re.DOTALL),
    '"': re.compile(r'((?:[^\\"]|\\.)*)"', re.DOTALL),
    "'": re.compile(r"((?:[^\\']|\\.)*)'", re.DOTALL),
}


def load(text: str) -> Any:
    """What a JSON text says, and ``None`` where it is none (or has numbers that no float holds)."""
    try:
        return json.loads(text, parse_constant=_refuse, parse_float=_finite)
    except (ValueError, RecursionError):
        return None


def dump(value: Any) -> str:
    """JSON of a value, in its own letters where they are letters."""
    text = json.dumps(value, ensure_ascii=False)
    return text if text.isascii() or _encodes(text) else json.dumps(value)


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is no JSON")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is too large")
    return number


def _encodes(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def kinds_of(schema: Any, root: Schema, depth: int = 0) -> frozenset[str]:
    """The JSON types that a schema allows; all of them where it does not say."""
    if not isinstance(schema, Mapping) or depth > 16:
        return frozenset(_KINDS)
    if isinstance(reference := schema.get("$ref"), str):
        return kinds_of(_resolve(reference, root), root, depth + 1)
    named = schema.get("type")
    if isinstance(named, (str, list)):
        kinds = frozenset([named] if isinstance(named, str) else map(str, named))
        return kinds | {"integer"} if "number" in kinds else kinds
    if "const" in schema or "enum" in schema:
        return frozenset(kind(dump(v)) for v in schema.get("enum", [schema.get("const")]))
    for key in ("anyOf", "oneOf"):
        if isinstance(schema.get(key), list):
            return frozenset().union(*(kinds_of(s, root, depth + 1) for s in schema[key]))
    if isinstance(schema.get("allOf"), list):
        return frozenset(_KINDS).intersection(
            *(kinds_of(s, root, depth + 1) for s in schema["allOf"])
        )
    if "properties" in schema:
        return frozenset(["object"])
    return frozenset(["array"]) if "items" in schema else frozenset(_KINDS)


def _resolve(reference: str, root: Schema) -> Any:
    """What ``#/$defs/name`` points to, in the schema of the tool."""
    found: Any = root
    for part in reference.removeprefix("#").split("/")[1:]:
        part = part.replace("~1", "/").replace("~0", "~")
        found = found.get(part) if isinstance(found, Mapping) else None
    return found


def kind(text: str) -> str:
    """The type of a JSON text that is known to be one."""
    first = text.lstrip()[:1]
    named = {'"': "string", "{": "object", "[": "array", "t": "boolean", "f": "boolean"}
    if first in named:
        return named[first]
    if first == "n":
        return "null"
    return "number" if any(c in text for c in ".eE") else "integer"


def property_of(schema: Schema, name: str) -> Any:
    """The schema of one argument; ``None`` where there is none."""
    properties = schema.get("properties")
    return properties.get(name) if isinstance(properties, Mapping) else None


def from_text(raw: str, name: str, schema: Schema) -> str:
    """JSON of an argument that was written without quotes, as in XML formats.

    It becomes the type that the schema of the tool says. A text where it says nothing is JSON if it
    can be read so, and else a string.
    """
    allowed = kinds_of(property_of(schema, name), schema)
    return _of_kinds(raw, allowed) or dump(raw)


def fit(text: str, name: str, schema: Schema) -> str:
    """A JSON value as the schema wants it: ``"3"`` is 3 for an integer, and 3 is "3" for a
    string.
    """
    allowed = kinds_of(property_of(schema, name), schema)
    have = kind(text)
    if have in allowed:
        return text
    if have == "string":
        return _of_kinds(json.loads(text), allowed) or text
    return _of_kinds(text, allowed) or (dump(text) if "string" in allowed else text)


def _of_kinds(raw: str, allowed: frozenset[str]) -> str | None:
    """``raw`` as JSON of one of the allowed types other than string, if it can be read so."""
    trimmed = raw.strip()
    if allowed == {"string"} or not trimmed:
        return None
    text: str | None = trimmed if load(trimmed) is not None or trimmed == "null" else None
    if text is None:
        try:
            text = Literals(trimmed).whole()
        except ValueError:
            return None
    have = kind(text)
    if have == "string" or have in allowed:
        return None if have == "string" else text
    if have == "number" and "integer" in allowed:
        number = float(text)
        return str(int(number)) if math.isfinite(number) and number.is_integer() else None
    return None


class Literals:
    """Reads values as Python and Gemma write them, and gives them as JSON text.

    Python's strings, numbers, lists, tuples, dicts, ``True``, ``False`` and ``None``; JSON's; and
    Gemma's, whose keys are bare and whose strings stand in ``<|"|>``. Raises ``ValueError``.
    """

    def __init__(self, text: str, at: int = 0) -> None:
        self.text = text
        self.at = at

    def whole(self) -> str:
        """The one value that the text is."""
        value = self.value()
        self.space()
        if self.at < len(self.text):
            raise ValueError("more text after the value")
        return value

    def space(self) -> None:
        """Skip blank space."""
        found = _SPACE.match(self.text, self.at)
        self.at = found.end() if found else self.at

    def skip(self, literal: str) -> bool:
        """Skip blank space, and ``literal`` if it is next."""
        self.space()
        if not self.text.startswith(literal, self.at):
            return False
        self.at += len(literal)
        return True

    def word(self) -> str:
        """A bare name."""
        self.space()
        found = _WORD.match(self.text, self.at)
        if not found:
            raise ValueError("a name is missing")
        self.at = found.end()
        return found.group()

    def value(self, depth: int = 0) -> str:
        """The value that is next."""
        if depth > _MAX_DEPTH:
            raise ValueError("nested too deep")
        for opening, closing in (("[", "]"), ("(", ")")):
            if self.skip(opening):
                return "[" + ", ".join(self._items(closing, depth, keyed=False)) + "]"
        if self.skip("{"):
            return "{" + ", ".join(self._items("}", depth, keyed=True)) + "}"
        quoted = self.quoted()
        if quoted is not None:
            return dump(quoted)
        found = _NUMBER.match(self.text, self.at)
        if found:
            self.at = found.end()
            return _number(found.group())
        word = self.word().lower()
        if word not in _WORDS:
            raise ValueError(f"{word} is no value")
        return _WORDS[word]

    def _items(self, closing: str, depth: int, *, keyed: bool) -> list[str]:
        items: list[str] = []
        while not self.skip(closing):
            if items and not self.skip(","):
                raise ValueError("a comma is missing")
            if self.skip(closing):
                break
            key = ""
            if keyed:
                quoted = self.quoted()
                key = dump(self.word() if quoted is None else quoted) + ": "
                if not self.skip(":"):
                    raise ValueError("a colon is missing")
            items.append(key + self.value(depth + 1))
        return items

    def quoted(self) -> str | None:
        """The string that is next, if one is."""
        self.space()
        for quote, pattern in _QUOTES.items():
            if not self.text.startswith(quote, self.at):
                continue
            found = pattern.match(self.text, self.at + len(quote))
            if not found:
                raise ValueError("a string has no end")
            self.at = found.end()
            return found.group(1) if len(quote) > 1 else _ESCAPE.sub(_unescape, found.group(1))
        return None


def _unescape(found: re.Match[str]) -> str:
    code = found.group(1)
    if len(code) > 1:
        return chr(int(code[1:], 16))
    return _ESCAPES.get(code, code if code in "\\'\"/" else found.group())


def _number(text: str) -> str:
    """A number of Python as JSON, to the digit where JSON has the same."""
    text = text.removeprefix("+")
    if load(text) is not None:
        return text
    number = float(text)
    if not math.isfinite(number):
        raise ValueError("the number is too large")
    return dump(int(text) if text.lstrip("-").isdigit() else number)
