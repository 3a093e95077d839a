"""Bodies of Anthropic's messages."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from rl_mlx.server.schemas.base import Body, Count, Loose, Name

BLOCKS = ("text", "tool_use", "tool_result", "thinking", "redacted_thinking")


class TextBlock(Loose):
    """A text; ``cache_control`` may stand beside it, prefixes are cached in any case."""

    type: Literal["text"]
    text: str


class ToolUseBlock(Loose):
    """A call that the model made in an earlier turn."""

    type: Literal["tool_use"]
    id: str
    name: Name
    input: dict[str, Any]


def _texts_only(value: Any) -> Any:
    if isinstance(value, list):
        _check_blocks(value, ("text",))
    return value


def _blocks(value: Any) -> Any:
    if isinstance(value, list):
        _check_blocks(value, BLOCKS)
    return value


def _check_blocks(value: list[Any], known: tuple[str, ...]) -> None:
    for number, block in enumerate(value):
        kind = block.get("type") if isinstance(block, dict) else None
        if not isinstance(kind, str) or kind not in known:
            raise ValueError(
                f"block {number} is of type {kind!r:.40}; known are {', '.join(known)}"
            )


Texts = Annotated[str | list[TextBlock], BeforeValidator(_texts_only)]


class ToolResultBlock(Loose):
    """What a tool gave."""

    type: Literal["tool_result"]
    tool_use_id: str
    content: Texts = ""
    is_error: bool = False


class ThinkingBlock(Loose):
    """What the model thought in an earlier turn; we do not check its ``signature``."""

    type: Literal["thinking"]
    thinking: str


class RedactedBlock(Loose):
    """Thoughts that only another server can read: they are left out."""

    type: Literal["redacted_thinking"]


Block = Annotated[
    TextBlock | ToolUseBlock | ToolResultBlock | ThinkingBlock | RedactedBlock,
    Field(discriminator="type"),
]


class Message(Body):
    """One turn."""

    role: Literal["user", "assistant", "system"]
    content: Annotated[str | list[Block], BeforeValidator(_blocks)]


class Tool(Loose):
    """A tool of the client's; those that run on Anthropic's servers have other types."""

    type: Literal["custom"] = "custom"
    name: Name
    description: str | None = None
    input_schema: dict[str, Any]
    strict: bool | None = None


class ToolChoice(Body):
    """``any`` and ``tool`` force a call."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool = False


class Thinking(Body):
    """``budget_tokens`` is Anthropic's own measure of effort."""

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: int | None = Field(None, ge=1024)
    display: Literal["summarized", "full"] | None = None


class OutputFormat(Body):
    """What a JSON Schema allows."""

    type: Literal["json_schema"]
    schema_: dict[str, Any] = Field(alias="schema")


class OutputConfig(Body):
    """How hard to try, and the form of the answer."""

    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: OutputFormat | None = None


class CacheControl(Loose):
    """A hint: every prefix is cached here."""

    type: Literal["ephemeral"]


class KeepThinking(Body):
    """All thoughts stay, as they do here."""

    type: Literal["clear_thinking_20251015"]
    keep: Literal["all"]


class ContextManagement(Body):
    """What is cut out of the conversation: nothing."""

    edits: list[KeepThinking] = Field(default_factory=list)


class Metadata(Body):
    """Who asks."""

    user_id: str | None = None


class CountRequest(Body):
    """``POST /v1/messages/count_tokens``."""

    model: Name
    messages: list[Message] = Field(min_length=1)
    system: Texts | None = None
    tools: list[Tool] | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    cache_control: CacheControl | None = None
    context_management: ContextManagement | None = None


class MessagesRequest(CountRequest):
    """``POST /v1/messages``."""

    max_tokens: Annotated[Count, Field(ge=1)]
    stream: bool = False
    stop_sequences: list[str] | None = None
    temperature: float | None = Field(None, ge=0, le=1)
    top_p: float | None = None
    top_k: Count | None = None
    metadata: Metadata | None = None
    service_tier: Literal["auto", "standard_only"] | None = None
