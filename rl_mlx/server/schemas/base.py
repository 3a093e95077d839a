"""What the schemas of several APIs share."""

from __future__ import annotations

from typing import Annotated, Any, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    WithJsonSchema,
    model_validator,
)

T = TypeVar("T")
Seed = Annotated[int, Field(ge=-(2**63), lt=2**64)]
Count = Annotated[int, Field(ge=0, lt=2**63)]
Name = Annotated[str, Field(min_length=1, max_length=1024)]
_PART = r"\d+(\.\d+)?\s*(ms|s|m|h)?"
Duration = Annotated[
    float | str,
    WithJsonSchema(
        {"anyOf": [{"type": "number"}, {"type": "string", "pattern": f"^-?{_PART}({_PART})*$"}]}
    ),
]
"""Seconds, or a text for ``settings.seconds``."""


def _is_false(value: bool) -> bool:
    if value:
        raise ValueError("only false is supported")
    return value


No = Annotated[bool, AfterValidator(_is_false), WithJsonSchema({"const": False})]
"""A switch that can only be off. ``Literal[False]`` would take a 0."""


def allow_null(schema: dict[str, Any]) -> None:
    """Say in a JSON Schema that null is as if not given, whatever it is the value of."""
    if schema.get("additionalProperties") is False:
        schema["additionalProperties"] = {"type": "null"}
    for name, value in schema.get("properties", {}).items():
        if name not in schema.get("required", ()) and {"type": "null"} not in value.get(
            "anyOf", ()
        ):
            schema["properties"][name] = {"anyOf": [value, {"type": "null"}]}


class Body(BaseModel):
    """An object of a request: no other fields, no guessed types; null is as if not given."""

    model_config = ConfigDict(
        extra="forbid", strict=True, hide_input_in_errors=True, json_schema_extra=allow_null
    )

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {k: v for k, v in value.items() if v is not None}


class Loose(Body):
    """An object that clients decorate: what else is in it changes nothing."""

    model_config = ConfigDict(extra="ignore")


class TextPart(Loose):
    """A part of a message's content."""

    type: str
    text: str


def parts(*kinds: str) -> Any:
    """A validator of content: a text, or a list of parts of these ``kinds``, which become texts."""

    def check(value: Any) -> Any:
        if isinstance(value, str) or value is None:
            return value
        if not isinstance(value, list):
            raise ValueError("must be a text or a list of parts")
        return [_text_of(part, number, kinds) for number, part in enumerate(value)]

    return BeforeValidator(check)


def _text_of(part: Any, number: int, kinds: tuple[str, ...]) -> dict[str, str]:
    kind = part.get("type") if isinstance(part, dict) else None
    if not isinstance(kind, str) or kind not in kinds:
        raise ValueError(f"part {number} is of type {kind!r:.40}; only text is supported")
    text = part.get("refusal" if kind == "refusal" else "text")
    if not isinstance(text, str):
        raise ValueError(f"part {number} has no text")
    return {"type": "text", "text": text}
