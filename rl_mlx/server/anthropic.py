"""Anthropic's messages: a pure translation to a ``Job``, and of its deltas to their events."""

from __future__ import annotations

import base64
import hashlib
import json
import secrets
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

from rl_mlx.server.endpoint import Call, Json, Stream
from rl_mlx.server.generation import Delta, Job, Started, Whole, answers, prepare, whole
from rl_mlx.server.problems import BadParameter, encode, named
from rl_mlx.server.schemas.anthropic import (
    CountRequest,
    Message,
    MessagesRequest,
    TextBlock,
    ThinkingBlock,
    ToolResultBlock,
    ToolUseBlock,
)
from rl_mlx.server.structure import json_schema
from rl_mlx.text.router import (
    Content,
    Reasoning,
    ToolCall,
    ToolCallArguments,
    ToolCallEnd,
    ToolCallStart,
    ToolCallWithdrawn,
)
from rl_mlx.types import Usage

DEFAULTS = {"temperature": 1.0, "min_p": 0.0}
_STOP = {
    "stop": "end_turn",
    "length": "max_tokens",
    "tool_calls": "tool_use",
    "cancelled": "end_turn",
}


def job_of(body: CountRequest) -> Job:
    """What a request asks for."""
    choice = body.tool_choice
    tools = [_tool(tool) for tool in body.tools or ()]
    must_call: bool | str = False
    if choice is not None and choice.type in ("any", "tool"):
        if not tools:
            raise BadParameter("tool_choice", "there are no tools to choose from")
        must_call = choice.type == "any" or choice.name or ""
        if choice.type == "tool" and choice.name not in [t.name for t in body.tools or ()]:
            raise BadParameter("tool_choice.name", f"there is no tool {choice.name!r:.100}")
    alone = choice is not None and choice.disable_parallel_tool_use
    effort, name = _effort(body)
    wanted = body.output_config.format if body.output_config is not None else None
    return Job(
        model=body.model,
        messages=_system(body) + [turn for m in body.messages for turn in _turns(m)],
        tools=[] if choice is not None and choice.type == "none" else tools,
        sampling=_sampling(body) if isinstance(body, MessagesRequest) else {},
        defaults=DEFAULTS,
        effort=effort,
        effort_name=name,
        form=json_schema(wanted.schema_) if wanted is not None else None,
        must_call=must_call,
        max_calls=1 if alone or isinstance(must_call, str) else None,
    )


def _sampling(body: MessagesRequest) -> dict[str, Any]:
    options: dict[str, Any] = {"max_tokens": body.max_tokens}
    for name in ("temperature", "top_p", "top_k"):
        if getattr(body, name) is not None:
            options[name] = getattr(body, name)
    if body.stop_sequences:
        options["stop"] = tuple(body.stop_sequences)
    return options


def _effort(body: CountRequest) -> tuple[str | None, str]:
    """How hard to think, and which parameter says so."""
    thinking, config = body.thinking, body.output_config
    if thinking is not None and thinking.type == "enabled":
        if thinking.budget_tokens is None:
            raise BadParameter("thinking.budget_tokens", "this parameter is required")
        effort = config.effort if config is not None else None
        return effort or "medium", "thinking"
    if thinking is not None and thinking.type == "disabled":
        return "none", "thinking"
    return (config.effort if config is not None else None), "output_config.effort"


def _tool(tool: Any) -> dict[str, Any]:
    function = {"name": tool.name, "parameters": tool.input_schema}
    if tool.description is not None:
        function["description"] = tool.description
    if tool.strict is not None:
        function["strict"] = tool.strict
    return {"type": "function", "function": function}


def _system(body: CountRequest) -> list[dict[str, Any]]:
    text = _text(body.system) if body.system is not None else ""
    return [{"role": "system", "content": text}] if text else []


def _text(content: str | Sequence[TextBlock]) -> str:
    return content if isinstance(content, str) else "\n".join(block.text for block in content)


def _turns(message: Message) -> list[dict[str, Any]]:
    """A turn as OpenAI has them: each result of a tool is a message of its own, before the rest."""
    if isinstance(message.content, str):
        return [{"role": message.role, "content": message.content}]
    texts, thoughts, calls, results = [], [], [], []
    for block in message.content:
        if isinstance(block, TextBlock):
            texts.append(block.text)
        elif isinstance(block, ThinkingBlock):
            thoughts.append(block.thinking)
        elif isinstance(block, ToolUseBlock):
            function = {"name": block.name, "arguments": json.dumps(block.input)}
            calls.append({"id": block.id, "type": "function", "function": function})
        elif isinstance(block, ToolResultBlock):
            results.append(
                {"role": "tool", "tool_call_id": block.tool_use_id, "content": _text(block.content)}
            )
    turn: dict[str, Any] = {"role": message.role, "content": "\n".join(texts)}
    if thoughts:
        turn["reasoning_content"] = "\n".join(thoughts)
    if calls:
        turn["tool_calls"] = calls
    return [*results, turn] if texts or thoughts or calls or not results else results


async def count_tokens(call: Call[CountRequest]) -> Json:
    """``POST /v1/messages/count_tokens``."""
    job = job_of(call.body)
    async with call.state.models.lease(job.model) as model:
        call.record["model"] = model.files.name
        ready = await call.state.in_thread(prepare, model, job, {})
    return Json({"input_tokens": len(ready.ids[0])})


async def messages(call: Call[MessagesRequest]) -> Json | Stream:
    """``POST /v1/messages``."""
    body, job = call.body, job_of(call.body)
    head = {
        "id": f"msg_{call.request_id.removeprefix('req_')}",
        "type": "message",
        "role": "assistant",
        "model": body.model,
    }
    if body.stream:
        return Stream(_stream(call, job, head))
    _, found = await whole(call.state, job, call.record)
    (item,) = found
    return Json(
        {**head, "content": _content(item), **_ending(item.last), "usage": _usage(item.last)}
    )


def _content(item: Whole) -> list[dict[str, Any]]:
    routed = item.routed
    blocks: list[dict[str, Any]] = []
    if routed.reasoning:
        thinking = routed.reasoning
        blocks.append({"type": "thinking", "thinking": thinking, "signature": _sign(thinking)})
    if routed.content:
        blocks.append({"type": "text", "text": routed.content})
    return blocks + [_use(made) for made in routed.calls]


def _use(made: ToolCall) -> dict[str, Any]:
    return {**_use_block(made.name), "input": json.loads(made.arguments)}


def _use_block(name: str) -> dict[str, Any]:
    return {"type": "tool_use", "id": f"toolu_{secrets.token_hex(12)}", "name": name, "input": {}}


def _sign(thinking: str) -> str:
    """Clients want a signature on thoughts and send it back; nothing here depends on it."""
    return base64.b64encode(hashlib.sha256(encode(thinking)).digest()).decode()


def _ending(last: Delta) -> dict[str, Any]:
    if last.stop is not None:
        return {"stop_reason": "stop_sequence", "stop_sequence": last.stop}
    return {"stop_reason": _STOP[last.finish or "stop"], "stop_sequence": None}


def _usage(last: Delta) -> dict[str, Any]:
    """What was read from the cache is not among Anthropic's ``input_tokens``."""
    usage = last.usage or Usage(0, 0)
    return {
        "input_tokens": usage.prompt_tokens - last.timings.reused,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": last.timings.reused,
        "output_tokens": usage.completion_tokens,
    }


async def _stream(
    call: Call[MessagesRequest], job: Job, head: dict[str, Any]
) -> AsyncGenerator[bytes, None]:
    """``message_start``, blocks one after the other, ``message_delta``, ``message_stop``."""
    blocks = _Blocks()
    async with aclosing(answers(call.state, job, call.record)) as items:
        async for item in items:
            if isinstance(item, Started):
                usage = {
                    "input_tokens": len(item.prompt_ids[0]),
                    "cache_creation_input_tokens": 0,
                    "cache_read_input_tokens": 0,
                    "output_tokens": 0,
                }
                empty: dict[str, Any] = {
                    "content": [],
                    "stop_reason": None,
                    "stop_sequence": None,
                    "usage": usage,
                }
                yield named({"type": "message_start", "message": {**head, **empty}})
                continue
            events = [event for piece in item.pieces for event in blocks.feed(piece)]
            if item.finish is not None:
                ending = {"delta": _ending(item), "usage": _usage(item)}
                events += [*blocks.close(), {"type": "message_delta", **ending}]
                events.append({"type": "message_stop"})
            yield b"".join(map(named, events))


class _Blocks:
    """Pieces as content blocks: one is open at a time."""

    def __init__(self) -> None:
        self._index = -1
        self._open: str | None = None
        self._thinking: list[str] = []

    def feed(self, piece: Any) -> list[dict[str, Any]]:
        """The events of a piece."""
        if isinstance(piece, (Content, ToolCallWithdrawn)):
            return self._in("text", {"text": ""}, {"type": "text_delta", "text": piece.text})
        if isinstance(piece, Reasoning):
            delta = {"type": "thinking_delta", "thinking": piece.text}
            found = self._in("thinking", {"thinking": "", "signature": ""}, delta)
            self._thinking.append(piece.text)
            return found
        if isinstance(piece, ToolCallStart):
            events = self.close()
            return events + self._begin("tool_use", _use_block(piece.name))
        if isinstance(piece, ToolCallArguments):
            return [self._delta({"type": "input_json_delta", "partial_json": piece.fragment})]
        assert isinstance(piece, ToolCallEnd)
        return self.close()

    def close(self) -> list[dict[str, Any]]:
        """End the block that is open."""
        if self._open is None:
            return []
        events = []
        if self._open == "thinking":
            signature = _sign("".join(self._thinking))
            events.append(self._delta({"type": "signature_delta", "signature": signature}))
            self._thinking = []
        self._open = None
        return [*events, {"type": "content_block_stop", "index": self._index}]

    def _in(self, kind: str, empty: dict[str, Any], delta: dict[str, Any]) -> list[dict[str, Any]]:
        if self._open == kind:
            return [self._delta(delta)]
        events = self.close()
        events += self._begin(kind, {"type": kind, **empty})
        return [*events, self._delta(delta)]

    def _begin(self, kind: str, block: dict[str, Any]) -> list[dict[str, Any]]:
        self._index += 1
        self._open = kind
        return [{"type": "content_block_start", "index": self._index, "content_block": block}]

    def _delta(self, delta: dict[str, Any]) -> dict[str, Any]:
        return {"type": "content_block_delta", "index": self._index, "delta": delta}
