"""Bodies of OpenAI's chat completions, completions and embeddings."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AliasChoices, Field

from rl_mlx.server.schemas.base import (
    Body,
    Count,
    Duration,
    Loose,
    Name,
    No,
    Seed,
    TextPart,
    parts,
)

Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]
Stop = str | list[str]


class Sampled(Body):
    """How tokens are chosen: OpenAI's fields, and ours, which have ``SamplingParams``' names."""

    temperature: float | None = None
    top_p: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    seed: Seed | None = None
    stop: Stop | None = None
    logit_bias: dict[str, float] | None = None
    top_k: Count | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    penalty_window: Count | None = None
    xtc_probability: float | None = None
    xtc_threshold: float | None = None
    dry_multiplier: float | None = None
    dry_base: float | None = None
    dry_allowed_length: Count | None = None
    dry_window: Count | None = None
    stop_token_ids: list[Count] | None = None
    ignore_eos: bool | None = None


class Labelled(Body):
    """Fields that change no answer: who asks, and hints about caches, which need none here."""

    user: str | None = None
    metadata: dict[str, str] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    service_tier: Literal["auto", "default"] | None = None
    keep_alive: Duration | None = None


class StreamOptions(Body):
    """``include_obfuscation`` pads events against eavesdroppers; false is what we do."""

    include_usage: bool = False
    include_obfuscation: No | None = None


class FunctionCall(Loose):
    """The function of a call; ``arguments`` is JSON's text."""

    name: Name
    arguments: str


class Call(Loose):
    """A call that the model made in an earlier turn."""

    id: str
    type: Literal["function"] = "function"
    function: FunctionCall


class ChatMessage(Body):
    """One turn. ``reasoning_content`` (or ``reasoning``) is what the model thought."""

    role: Literal["developer", "system", "user", "assistant", "tool"]
    content: Annotated[str | list[TextPart] | None, parts("text", "refusal")] = None
    name: str | None = None
    tool_calls: list[Call] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = Field(
        None, validation_alias=AliasChoices("reasoning_content", "reasoning")
    )
    refusal: str | None = None
    annotations: list[Any] | None = Field(None, exclude=True)


class Function(Body):
    """A function that the model may call."""

    name: Name
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Body):
    """A tool; functions are the only kind."""

    type: Literal["function"]
    function: Function


class NamedFunction(Body):
    """The name of a function."""

    name: Name


class NamedTool(Body):
    """The tool that must be called."""

    type: Literal["function"]
    function: NamedFunction


class JsonSchema(Body):
    """A JSON Schema and its name."""

    name: str
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class TextFormat(Body):
    """No constraint."""

    type: Literal["text"]


class JsonObjectFormat(Body):
    """Any JSON object."""

    type: Literal["json_object"]


class JsonSchemaFormat(Body):
    """What a JSON Schema allows."""

    type: Literal["json_schema"]
    json_schema: JsonSchema


class RegexFormat(Body):
    """What a regular expression matches. Ours."""

    type: Literal["regex"]
    regex: Annotated[str, Field(min_length=1)]


class GrammarFormat(Body):
    """What a grammar (Lark or GBNF) allows."""

    type: Literal["grammar"]
    grammar: Annotated[str, Field(min_length=1)]
    syntax: Literal["lark", "gbnf"] = "lark"


ResponseFormat = Annotated[
    TextFormat | JsonObjectFormat | JsonSchemaFormat | RegexFormat | GrammarFormat,
    Field(discriminator="type"),
]


class ChatRequest(Sampled, Labelled):
    """``POST /v1/chat/completions``."""

    model: Name
    messages: list[ChatMessage] = Field(min_length=1)
    n: int = Field(1, ge=1, le=128)
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=20)
    response_format: ResponseFormat | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool = True
    reasoning_effort: Effort | None = None
    modalities: list[Literal["text"]] | None = None
    verbosity: Literal["medium"] | None = None
    store: No | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class CompletionRequest(Sampled, Labelled):
    """``POST /v1/completions``. A prompt is a text or token ids, or there are several."""

    model: Name
    prompt: str | list[str] | list[Count] | list[list[Count]]
    n: int = Field(1, ge=1, le=128)
    best_of: int | None = Field(None, ge=1, le=128)
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: Count = 16
    logprobs: int | None = Field(None, ge=0, le=20)
    echo: bool = False
    response_format: ResponseFormat | None = None


class EmbeddingRequest(Labelled):
    """``POST /v1/embeddings``."""

    model: Name
    input: str | list[str] | list[Count] | list[list[Count]]
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = Field(None, ge=1)
