"""Bodies of Ollama's API."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, WithJsonSchema

from rl_mlx.server.schemas.base import (
    Body,
    Count,
    Duration,
    Loose,
    Name,
    No,
    Seed,
    allow_null,
)
from rl_mlx.server.schemas.openai import Function

Form = Annotated[
    Literal["", "json"] | dict[str, Any],
    WithJsonSchema({"anyOf": [{"enum": ["", "json"]}, {"type": "object"}]}),
]
NoImages = Annotated[list[str], Field(max_length=0)]


class Options(Body):
    """How tokens are chosen. What tunes the loading of a model belongs to ``rl-mlx serve``."""

    num_ctx: Annotated[int, Field(ge=1)] | None = None
    num_predict: Annotated[int, Field(ge=-2, lt=2**63)] | None = None
    temperature: float | None = None
    top_k: Count | None = None
    top_p: float | None = None
    min_p: float | None = None
    seed: Seed | None = None
    stop: str | list[str] | None = None
    repeat_penalty: float | None = None
    repeat_last_n: Annotated[int, Field(ge=-1, lt=2**63)] | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None


class Asked(Body):
    """What the bodies that make a model work share."""

    model: Name
    options: Options | None = None
    keep_alive: Duration | None = None


class Generated(Asked):
    """What those that generate share."""

    stream: bool = True
    format: Form = ""
    think: bool | Literal["low", "medium", "high", "max"] | None = None
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=20)


class GenerateRequest(Generated):
    """``POST /api/generate``; with an empty prompt the model is only loaded, or unloaded."""

    prompt: str = ""
    suffix: Literal[""] | None = None
    system: str | None = None
    raw: bool = False
    context: list[Count] | None = None
    images: NoImages | None = None


class CalledFunction(Loose):
    """The function of a call; ``arguments`` is an object."""

    name: Name
    arguments: dict[str, Any] = Field(default_factory=dict)


class Call(Loose):
    """A call that the model made in an earlier turn."""

    function: CalledFunction


class Message(Body):
    """One turn."""

    role: Literal["system", "user", "assistant", "tool"]
    content: str = ""
    thinking: str | None = None
    images: NoImages | None = None
    tool_calls: list[Call] | None = None
    tool_name: str | None = None
    tool_call_id: str | None = None


class Tool(Body):
    """A tool; functions are the only kind."""

    type: Literal["function"] = "function"
    function: Function


class ChatRequest(Generated):
    """``POST /api/chat``; without messages the model is only loaded, or unloaded."""

    messages: list[Message] = Field(default_factory=list)
    tools: list[Tool] | None = None


class EmbedRequest(Asked):
    """``POST /api/embed``."""

    input: str | list[str]
    truncate: bool = True
    dimensions: int | None = Field(None, ge=1)


class EmbeddingsRequest(Asked):
    """``POST /api/embeddings``, which came before ``embed``."""

    prompt: str


def _either_name(schema: dict[str, Any]) -> None:
    schema["anyOf"] = [
        {"required": [name], "properties": {name: {"type": "string"}}} for name in ("model", "name")
    ]
    allow_null(schema)


class NamedRequest(Body):
    """A body that names a model, by its newer or its older field."""

    model_config = ConfigDict(json_schema_extra=_either_name)

    model: Name | None = None
    name: Name | None = None


class ShowRequest(NamedRequest):
    """``POST /api/show``."""

    verbose: bool = False


class PullRequest(NamedRequest):
    """``POST /api/pull``."""

    stream: bool = True
    insecure: No | None = None
