"""Bodies of OpenAI's responses."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from rl_mlx.server.schemas.base import Body, Count, Loose, Name, No, TextPart, parts
from rl_mlx.server.schemas.openai import (
    Effort,
    JsonObjectFormat,
    Labelled,
    StreamOptions,
    TextFormat,
)

Texts = Annotated[
    str | list[TextPart], parts("input_text", "output_text", "text", "refusal", "summary_text")
]


class MessageItem(Loose):
    """One turn."""

    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: Texts


class CallItem(Loose):
    """A call that the model made; ``arguments`` is JSON's text."""

    type: Literal["function_call"]
    call_id: str
    name: Name
    arguments: str


class CallOutputItem(Loose):
    """What a function gave."""

    type: Literal["function_call_output"]
    call_id: str
    output: Texts


class ReasoningText(Loose):
    """Some of what was thought."""

    type: Literal["reasoning_text"]
    text: str


class ReasoningItem(Loose):
    """What the model thought; ``encrypted_content`` holds it for clients that keep no text."""

    type: Literal["reasoning"]
    content: list[ReasoningText] | None = None
    encrypted_content: str | None = None


def _kind(value: Any) -> str:
    kind = value.get("type", "message") if isinstance(value, dict) else None
    return kind if isinstance(kind, str) else "?"


Item = Annotated[
    Annotated[MessageItem, Tag("message")]
    | Annotated[CallItem, Tag("function_call")]
    | Annotated[CallOutputItem, Tag("function_call_output")]
    | Annotated[ReasoningItem, Tag("reasoning")],
    Discriminator(_kind),
]


class Tool(Body):
    """A function that the model may call; other tools run on OpenAI's servers."""

    type: Literal["function"]
    name: Name
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class NamedTool(Body):
    """The function that must be called."""

    type: Literal["function"]
    name: Name


class SchemaFormat(Body):
    """What a JSON Schema allows."""

    type: Literal["json_schema"]
    name: str
    schema_: dict[str, Any] = Field(alias="schema")
    description: str | None = None
    strict: bool | None = None


class Text(Body):
    """The form of the answer's text."""

    format: (
        Annotated[TextFormat | JsonObjectFormat | SchemaFormat, Field(discriminator="type")] | None
    ) = None
    verbosity: Literal["medium"] | None = None


class Reasoning(Body):
    """How hard to think. Thoughts come whole, so a summary is not made."""

    effort: Effort | None = None
    summary: Literal["auto"] | None = None


class ResponseRequest(Labelled):
    """``POST /v1/responses``."""

    model: Name
    input: str | list[Item]
    instructions: str | None = None
    previous_response_id: str | None = None
    max_output_tokens: Count | None = None
    temperature: float | None = None
    top_p: float | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool = True
    text: Text | None = None
    reasoning: Reasoning | None = None
    include: list[Literal["reasoning.encrypted_content", "message.output_text.logprobs"]] | None = (
        None
    )
    top_logprobs: int | None = Field(None, ge=0, le=20)
    store: bool = True
    stream: bool = False
    stream_options: StreamOptions | None = None
    truncation: Literal["disabled"] | None = None
    background: No | None = None
