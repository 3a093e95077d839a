"""OpenAI's responses: a pure translation to a ``Job``, and of its deltas to items and events."""

from __future__ import annotations

import base64
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

from rl_mlx.server.endpoint import Call, Json, Stream
from rl_mlx.server.generation import Delta, Job, Started, answers
from rl_mlx.server.items import Items
from rl_mlx.server.openai_chat import DEFAULTS, keep_alive
from rl_mlx.server.problems import BadParameter, Problem, named
from rl_mlx.server.schemas.openai import JsonObjectFormat
from rl_mlx.server.schemas.responses import (
    CallItem,
    CallOutputItem,
    MessageItem,
    NamedTool,
    ReasoningItem,
    ResponseRequest,
    SchemaFormat,
)
from rl_mlx.server.structure import json_schema
from rl_mlx.types import Grammar

_LOGPROBS = "message.output_text.logprobs"
_ENCRYPTED = "reasoning.encrypted_content"


async def create(call: Call[ResponseRequest]) -> Json | Stream:
    """``POST /v1/responses``."""
    body = call.body
    before = _before(call)
    turns = _turns(body)
    job = job_of(body, [*before, *turns])
    response_id = f"resp_{call.request_id.removeprefix('req_')}"
    events = _events(call, job, response_id, [*before, *turns])
    if body.stream:
        return Stream(_encoded(events), failure=_failure)
    last: dict[str, Any] = {}
    async with aclosing(events) as found:
        async for event in found:
            last = event
    return Json(last["response"])


def _before(call: Call[ResponseRequest]) -> list[dict[str, Any]]:
    """The turns of the response that this one goes on from."""
    wanted = call.body.previous_response_id
    if wanted is None:
        return []
    turns = call.state.conversations.get(wanted)
    if turns is None:
        raise BadParameter(
            "previous_response_id",
            f"no response {wanted!r:.100} is stored in this process; send the whole input",
        )
    return turns


def job_of(body: ResponseRequest, turns: Sequence[dict[str, Any]]) -> Job:
    """What a request asks for."""
    choice = body.tool_choice
    tools = [
        {"type": "function", "function": tool.model_dump(exclude_none=True, exclude={"type"})}
        for tool in body.tools or ()
    ]
    if choice not in (None, "auto", "none") and not tools:
        raise BadParameter("tool_choice", "there are no tools to choose from")
    name = choice.name if isinstance(choice, NamedTool) else None
    if name is not None and name not in [tool.name for tool in body.tools or ()]:
        raise BadParameter("tool_choice", f"there is no tool {name!r:.100}")
    options: dict[str, Any] = {"max_tokens": body.max_output_tokens}
    for field in ("temperature", "top_p"):
        if getattr(body, field) is not None:
            options[field] = getattr(body, field)
    if body.top_logprobs is not None or _LOGPROBS in (body.include or ()):
        options["logprobs"] = body.top_logprobs or 0
    instructions = [{"role": "system", "content": body.instructions}] if body.instructions else []
    return Job(
        model=body.model,
        messages=[*instructions, *turns],
        tools=[] if choice == "none" else tools,
        sampling=options,
        defaults=DEFAULTS,
        effort=body.reasoning.effort if body.reasoning is not None else None,
        effort_name="reasoning.effort",
        form=_form(body),
        must_call=name if name is not None else choice == "required",
        max_calls=None if body.parallel_tool_calls and name is None else 1,
        keep_alive=keep_alive(body),
    )


def _form(body: ResponseRequest) -> Grammar | None:
    wanted = body.text.format if body.text is not None else None
    if isinstance(wanted, JsonObjectFormat):
        return Grammar("json_object")
    return json_schema(wanted.schema_) if isinstance(wanted, SchemaFormat) else None


def _turns(body: ResponseRequest) -> list[dict[str, Any]]:
    """Items as turns: thoughts and calls that follow one another are one turn of the model's."""
    if isinstance(body.input, str):
        return [{"role": "user", "content": body.input}]
    if not body.input and body.previous_response_id is None:
        raise BadParameter("input", "give at least one item")
    turns: list[dict[str, Any]] = []
    thought = ""
    for item in body.input:
        if isinstance(item, ReasoningItem):
            thought = _thought(item)
        elif isinstance(item, CallOutputItem):
            turns.append(
                {"role": "tool", "tool_call_id": item.call_id, "content": _texts(item.output)}
            )
        elif isinstance(item, CallItem):
            if not (turns and turns[-1]["role"] == "assistant"):
                turns.append({"role": "assistant", "content": ""})
            function = {"name": item.name, "arguments": item.arguments}
            made = {"id": item.call_id, "type": "function", "function": function}
            turns[-1].setdefault("tool_calls", []).append(made)
        else:
            assert isinstance(item, MessageItem)
            turns.append({"role": item.role, "content": _texts(item.content)})
        if thought and turns and turns[-1]["role"] == "assistant":
            turns[-1]["reasoning_content"], thought = thought, ""
    return turns


def _texts(content: Any) -> Any:
    return content if isinstance(content, str) else [part.model_dump() for part in content]


def _thought(item: ReasoningItem) -> str:
    if item.content is not None:
        return "\n".join(part.text for part in item.content)
    try:
        return base64.b64decode(item.encrypted_content or "", validate=True).decode()
    except ValueError:
        raise BadParameter("input", "encrypted_content is not one of this server's") from None


def _response(call: Call[ResponseRequest], response_id: str, created: int) -> dict[str, Any]:
    """The response before anything came."""
    body = call.body
    return {
        "id": response_id,
        "object": "response",
        "created_at": created,
        "status": "in_progress",
        "error": None,
        "incomplete_details": None,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "model": body.model,
        "output": [],
        "parallel_tool_calls": body.parallel_tool_calls,
        "previous_response_id": body.previous_response_id,
        "reasoning": {
            "effort": body.reasoning.effort if body.reasoning is not None else None,
            "summary": None,
        },
        "store": body.store,
        "temperature": DEFAULTS["temperature"] if body.temperature is None else body.temperature,
        "text": {
            "format": body.text.format.model_dump(by_alias=True, exclude_none=True)
            if body.text is not None and body.text.format is not None
            else {"type": "text"}
        },
        "tool_choice": body.tool_choice.model_dump()
        if isinstance(body.tool_choice, NamedTool)
        else body.tool_choice or "auto",
        "tools": [{"strict": False, **t.model_dump(exclude_none=True)} for t in body.tools or ()],
        "top_p": 1.0 if body.top_p is None else body.top_p,
        "truncation": "disabled",
        "usage": None,
        "user": body.user,
        "metadata": body.metadata or {},
    }


async def _events(
    call: Call[ResponseRequest], job: Job, response_id: str, turns: Sequence[dict[str, Any]]
) -> AsyncGenerator[dict[str, Any], None]:
    """All events in order; the last one has the whole response."""
    response = _response(call, response_id, int(time.time()))
    items = Items(encrypt=_ENCRYPTED in (call.body.include or ()))
    async with aclosing(answers(call.state, job, call.record)) as deltas:
        async for delta in deltas:
            if isinstance(delta, Started):
                yield {"type": "response.created", "response": response}
                yield {"type": "response.in_progress", "response": response}
                items.tokenizer = delta.model.llm.tokenizer
                continue
            for event in items.feed(delta):
                yield event
            if delta.finish is not None:
                for event in items.close(cut=delta.finish == "length"):
                    yield event
                _finish(response, delta, items.output)
    if call.body.store:
        call.state.remember(response_id, [*turns, _answer(items.output)])
    yield {"type": f"response.{response['status']}", "response": response}


def _finish(response: dict[str, Any], last: Delta, output: list[dict[str, Any]]) -> None:
    assert last.usage is not None
    is_cut = last.finish == "length"
    response["status"] = "incomplete" if is_cut else "completed"
    response["incomplete_details"] = {"reason": "max_output_tokens"} if is_cut else None
    response["output"] = output
    response["usage"] = {
        "input_tokens": last.usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": last.timings.reused},
        "output_tokens": last.usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": last.reasoning_tokens},
        "total_tokens": last.usage.total_tokens,
    }


def _answer(output: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The model's turn, for the response that goes on from this one."""
    turn: dict[str, Any] = {"role": "assistant", "content": ""}
    for item in output:
        if item["type"] == "message":
            turn["content"] += "".join(part["text"] for part in item["content"])
        elif item["type"] == "reasoning":
            turn["reasoning_content"] = "".join(part["text"] for part in item["content"])
        elif item["status"] == "completed":
            function = {"name": item["name"], "arguments": item["arguments"]}
            made = {"id": item["call_id"], "type": "function", "function": function}
            turn.setdefault("tool_calls", []).append(made)
    return turn


async def _encoded(events: AsyncGenerator[dict[str, Any], None]) -> AsyncGenerator[bytes, None]:
    number = 0
    async with aclosing(events) as found:
        async for event in found:
            yield named({**event, "sequence_number": number})
            number += 1


def _failure(problem: Problem) -> bytes:
    code = "server_error" if problem.status >= 500 else "invalid_request_error"
    event = {"type": "error", "code": code, "message": problem.message, "param": problem.param}
    return named({**event, "sequence_number": 0})
