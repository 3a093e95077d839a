"""What an answer must look like, as a grammar for the sampler."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from rl_mlx.errors import UnsupportedModel
from rl_mlx.server.schemas.openai import (
    GrammarFormat,
    JsonObjectFormat,
    JsonSchemaFormat,
    RegexFormat,
    ResponseFormat,
)
from rl_mlx.types import SamplingParams


def response_format(wanted: ResponseFormat | None) -> dict[str, Any]:
    """The sampling option for OpenAI's ``response_format``."""
    if isinstance(wanted, JsonObjectFormat):
        return _grammar("json_schema", {"type": "object"}, "response_format")
    if isinstance(wanted, JsonSchemaFormat):
        return _grammar("json_schema", wanted.json_schema.schema_ or {}, "response_format")
    if isinstance(wanted, RegexFormat):
        return _grammar("regex", wanted.regex, "response_format")
    if isinstance(wanted, GrammarFormat):
        return _grammar("grammar", wanted.grammar, "response_format")
    return {}


def forced_calls(tools: Sequence[Mapping[str, Any]], wanted: bool | str) -> dict[str, Any]:
    """The sampling option for an answer that must call a tool."""
    return _grammar("tools", (tools, wanted), "tool_choice")


def _grammar(kind: str, value: Any, param: str) -> dict[str, Any]:
    if "grammar" not in {f.name for f in fields(SamplingParams)}:
        raise UnsupportedModel(f"{param}: structured output is not available in this version")
    return {"grammar": (kind, value)}
