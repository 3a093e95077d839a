"""OpenAI's chat completions: a pure translation to a ``Job``, and of its deltas to their chunks."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from typing import Any

from rl_mlx.server.endpoint import Call, Json, Stream
from rl_mlx.server.generation import (
    Delta,
    Job,
    Started,
    Whole,
    answers,
    call_id,
    token_text,
    whole,
)
from rl_mlx.server.models import KEEP
from rl_mlx.server.problems import BadParameter, data
from rl_mlx.server.schemas.openai import ChatRequest, Labelled, NamedTool, Sampled
from rl_mlx.server.settings import seconds
from rl_mlx.server.structure import response_format
from rl_mlx.text.router import (
    Content,
    Piece,
    Reasoning,
    ToolCall,
    ToolCallArguments,
    ToolCallStart,
    ToolCallWithdrawn,
)
from rl_mlx.text.tokenizer import Tokenizer
from rl_mlx.types import TokenLogprob, Usage

DEFAULTS = {"temperature": 1.0, "min_p": 0.0}
"""What OpenAI's document says of requests that do not; its API has no ``min_p``."""
FINISH = {"stop": "stop", "length": "length", "tool_calls": "tool_calls", "cancelled": "stop"}
_SAMPLED = tuple(Sampled.model_fields)


def sampling(body: Sampled) -> dict[str, Any]:
    """The fields of ``SamplingParams`` that a body sets."""
    given = {name: getattr(body, name) for name in _SAMPLED if getattr(body, name) is not None}
    if "stop" in given and not isinstance(given["stop"], str):
        given["stop"] = tuple(given["stop"])
    if "logit_bias" in given:
        given["logit_bias"] = _bias(given["logit_bias"])
    return given


def _bias(table: Mapping[str, float]) -> dict[int, float]:
    if not all(token.isascii() and token.isdigit() and len(token) < 12 for token in table):
        raise BadParameter("logit_bias", "its names must be token ids")
    return {int(token): bias for token, bias in table.items()}


def keep_alive(body: Labelled) -> object:
    """How long the model stays after this, as ``Models.lease`` wants it."""
    return KEEP if body.keep_alive is None else seconds(body.keep_alive, "keep_alive")


def job_of(body: ChatRequest) -> Job:
    """What a request asks for."""
    choice = body.tool_choice
    tools = [tool.model_dump(exclude_none=True) for tool in body.tools or ()]
    if choice not in (None, "auto", "none") and not tools:
        raise BadParameter("tool_choice", "there are no tools to choose from")
    options = sampling(body)
    longest = body.max_completion_tokens
    options["max_tokens"] = body.max_tokens if longest is None else longest
    if body.top_logprobs is not None and not body.logprobs:
        raise BadParameter("top_logprobs", "logprobs must be true for it")
    if body.logprobs:
        options["logprobs"] = body.top_logprobs or 0
    named = choice.function.name if isinstance(choice, NamedTool) else None
    if named is not None and named not in [tool["function"]["name"] for tool in tools]:
        raise BadParameter("tool_choice", f"there is no tool {named!r:.100}")
    return Job(
        model=body.model,
        messages=[_message(message) for message in body.messages],
        tools=[] if choice == "none" else tools,
        n=body.n,
        sampling=options,
        defaults=DEFAULTS,
        template_options=body.chat_template_kwargs or {},
        effort=body.reasoning_effort,
        form=response_format(body.response_format),
        must_call=named if named is not None else choice == "required",
        max_calls=None if body.parallel_tool_calls and named is None else 1,
        keep_alive=keep_alive(body),
    )


def _message(message: Any) -> dict[str, Any]:
    given: dict[str, Any] = message.model_dump(exclude_none=True)
    refusal = given.pop("refusal", None)
    if refusal is not None:
        given.setdefault("content", refusal)
    return given


async def chat(call: Call[ChatRequest]) -> Json | Stream:
    """``POST /v1/chat/completions``."""
    job = job_of(call.body)
    head = {
        "id": f"chatcmpl-{call.request_id.removeprefix('req_')}",
        "created": int(time.time()),
        "model": call.body.model,
    }
    if call.body.stream:
        return Stream(_stream(call, job, head))
    started, found = await whole(call.state, job, call.record)
    tokenizer = started.model.llm.tokenizer
    choices = [_choice(item, tokenizer, logprobs=call.body.logprobs) for item in found]
    return Json(
        {**head, "object": "chat.completion", "choices": choices, "usage": usage(found_last(found))}
    )


def found_last(found: Sequence[Whole]) -> list[Delta]:
    """The last delta of each answer."""
    return [item.last for item in found]


def _choice(item: Whole, tokenizer: Tokenizer, *, logprobs: bool) -> dict[str, Any]:
    routed = item.routed
    message: dict[str, Any] = {"role": "assistant", "content": routed.content, "refusal": None}
    if routed.reasoning:
        message["reasoning_content"] = routed.reasoning
    if routed.calls:
        message["content"] = routed.content or None
        message["tool_calls"] = [_call(made) for made in routed.calls]
    return {
        "index": item.last.index,
        "message": message,
        "logprobs": logprobs_of(item.logprobs, tokenizer) if logprobs else None,
        "finish_reason": FINISH[item.last.finish or "stop"],
    }


def _call(made: ToolCall) -> dict[str, Any]:
    return {
        "id": made.id or call_id(),
        "type": "function",
        "function": {"name": made.name, "arguments": made.arguments},
    }


def logprobs_of(found: Sequence[TokenLogprob], tokenizer: Tokenizer) -> dict[str, Any]:
    """Log probabilities as a choice has them."""

    def entry(token: int, logprob: float) -> dict[str, Any]:
        text, raw = token_text(tokenizer, token)
        return {"token": text, "logprob": max(logprob, -9999.0), "bytes": list(raw)}

    content = [
        {**entry(one.token, one.logprob), "top_logprobs": [entry(*other) for other in one.top]}
        for one in found
    ]
    return {"content": content, "refusal": None}


def usage(last: Sequence[Delta]) -> dict[str, Any]:
    """Tokens of all answers to one prompt, which counts once."""
    totals = [delta.usage or Usage(0, 0) for delta in last]
    prompt = totals[0].prompt_tokens
    completion = sum(total.completion_tokens for total in totals)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": last[0].timings.reused},
        "completion_tokens_details": {"reasoning_tokens": sum(d.reasoning_tokens for d in last)},
    }


async def _stream(
    call: Call[ChatRequest], job: Job, head: Mapping[str, Any]
) -> AsyncGenerator[bytes, None]:
    """Chunks: first the role, then what comes, then why it ended, and usage where it is wanted."""
    options = call.body.stream_options
    wants_usage = options is not None and options.include_usage
    head = {**head, "object": "chat.completion.chunk"}
    extra: dict[str, Any] = {"usage": None} if wants_usage else {}

    def chunk(index: int, delta: Any, finish: str | None = None, logprobs: Any = None) -> bytes:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        return data({**head, "choices": [choice], **extra})

    last: list[Delta] = []
    tokenizer: Tokenizer | None = None
    async with aclosing(answers(call.state, job, call.record)) as items:
        async for item in items:
            if isinstance(item, Started):
                tokenizer = item.model.llm.tokenizer
                begin = {"role": "assistant", "content": ""}
                yield b"".join(chunk(index, begin) for index in range(job.n))
                continue
            assert tokenizer is not None
            found = logprobs_of(item.logprobs, tokenizer) if item.logprobs else None
            parts = []
            for delta in filter(None, map(_delta, item.pieces)):
                is_content = "content" in delta
                parts.append(chunk(item.index, delta, logprobs=found if is_content else None))
                found = None if is_content else found
            if item.finish is not None:
                last.append(item)
                parts.append(chunk(item.index, {}, FINISH[item.finish]))
            yield b"".join(parts)
    tail = data({**head, "choices": [], "usage": usage(last)}) if wants_usage else b""
    yield tail + b"data: [DONE]\n\n"


def _delta(piece: Piece) -> dict[str, Any] | None:
    """A piece as a chunk's delta."""
    if isinstance(piece, (Content, ToolCallWithdrawn)):
        return {"content": piece.text}
    if isinstance(piece, Reasoning):
        return {"reasoning_content": piece.text}
    if isinstance(piece, ToolCallStart):
        function: dict[str, Any] = {"name": piece.name, "arguments": ""}
        made = {"index": piece.index, "id": piece.id or call_id(), "type": "function"}
        return {"tool_calls": [{**made, "function": function}]}
    if isinstance(piece, ToolCallArguments):
        function = {"arguments": piece.fragment}
        return {"tool_calls": [{"index": piece.index, "function": function}]}
    return None
