"""Ollama's generate, chat and embed: a translation to a ``Job``, and of its deltas to lines."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from datetime import datetime, timezone
from typing import Any

from rl_mlx.server.endpoint import Call, Json, Stream
from rl_mlx.server.generation import Delta, Job, Started, answers, token_text, whole
from rl_mlx.server.models import KEEP
from rl_mlx.server.problems import BadParameter, line
from rl_mlx.server.schemas.ollama import (
    Asked,
    ChatRequest,
    EmbeddingsRequest,
    EmbedRequest,
    Generated,
    GenerateRequest,
    Message,
    Options,
)
from rl_mlx.server.settings import seconds
from rl_mlx.server.structure import json_schema
from rl_mlx.text.router import (
    Content,
    Piece,
    Reasoning,
    ToolCallArguments,
    ToolCallEnd,
    ToolCallStart,
    ToolCallWithdrawn,
)
from rl_mlx.text.tokenizer import Tokenizer
from rl_mlx.types import Grammar, TokenLogprob

DEFAULTS = {"temperature": 0.8, "top_k": 40, "top_p": 0.9, "min_p": 0.0, "penalty_window": 64}
"""What Ollama's document says of requests that do not."""
_NAMES = {"repeat_penalty": "repetition_penalty", "repeat_last_n": "penalty_window"}
_WHOLE_CONTEXT = 1 << 30
_DONE = {"stop": "stop", "length": "length", "tool_calls": "stop", "cancelled": "stop"}


def keep_alive(body: Asked) -> object:
    """How long the model stays after this, as ``Models.lease`` wants it."""
    return KEEP if body.keep_alive is None else seconds(body.keep_alive, "keep_alive")


def now() -> str:
    """The time as Ollama writes it."""
    return datetime.now(timezone.utc).isoformat().replace("+00:00", "Z")


def _sampling(body: Generated) -> dict[str, Any]:
    given = (body.options or Options()).model_dump(exclude_none=True, exclude={"num_ctx"})
    longest = given.pop("num_predict", -1)
    found = {_NAMES.get(name, name): value for name, value in given.items()}
    if found.get("penalty_window") == -1:
        found["penalty_window"] = _WHOLE_CONTEXT
    if isinstance(found.get("stop"), list):
        found["stop"] = tuple(found["stop"])
    if body.top_logprobs is not None and not body.logprobs:
        raise BadParameter("top_logprobs", "logprobs must be true for it")
    if body.logprobs:
        found["logprobs"] = body.top_logprobs or 0
    return {**found, "max_tokens": longest if longest >= 0 else None}


def _job(body: Generated, **more: Any) -> Job:
    efforts = {True: "medium", False: "none"}
    form: Grammar | None = Grammar("json_object") if body.format == "json" else None
    if isinstance(body.format, dict):
        form = json_schema(body.format)
    return Job(
        model=body.model,
        sampling=_sampling(body),
        defaults=DEFAULTS,
        context=body.options.num_ctx if body.options is not None else None,
        effort=efforts[body.think] if isinstance(body.think, bool) else body.think,
        effort_name="think",
        form=form,
        keep_alive=keep_alive(body),
        **more,
    )


def generate_job(body: GenerateRequest) -> Job:
    """What a request asks for. ``raw`` takes the prompt as it is, without the template."""
    if body.raw:
        if body.system is not None or body.context is not None:
            raise BadParameter("raw", "system and context have no place in a raw prompt")
        return _job(body, prompts=[body.prompt])
    system = [{"role": "system", "content": body.system}] if body.system else []
    turn = {"role": "user", "content": body.prompt}
    return _job(body, messages=[*system, turn], before=body.context or ())


def chat_job(body: ChatRequest) -> Job:
    """What a request asks for."""
    tools = [tool.model_dump(exclude_none=True) for tool in body.tools or ()]
    return _job(body, messages=[_message(m) for m in body.messages], tools=tools)


def _message(message: Message) -> dict[str, Any]:
    given: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.thinking is not None:
        given["reasoning_content"] = message.thinking
    if message.tool_name is not None:
        given["name"] = message.tool_name
    if message.tool_call_id is not None:
        given["tool_call_id"] = message.tool_call_id
    if message.tool_calls:
        given["tool_calls"] = [
            {"type": "function", "function": call.function.model_dump()}
            for call in message.tool_calls
        ]
    return given


async def generate(call: Call[GenerateRequest]) -> Json | Stream:
    """``POST /api/generate``."""
    body = call.body
    if not body.prompt:
        return await _load_only(call, {"response": ""})

    def part(text: str, thinking: str, calls: Sequence[Any]) -> dict[str, Any]:  # noqa: ARG001
        return {"response": text, **({"thinking": thinking} if thinking else {})}

    return await _respond(call, generate_job(body), part, with_context=not body.raw)


async def chat(call: Call[ChatRequest]) -> Json | Stream:
    """``POST /api/chat``."""
    if not call.body.messages:
        return await _load_only(call, {"message": {"role": "assistant", "content": ""}})

    def part(text: str, thinking: str, calls: Sequence[Any]) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": text}
        if thinking:
            message["thinking"] = thinking
        if calls:
            message["tool_calls"] = list(calls)
        return {"message": message}

    return await _respond(call, chat_job(call.body), part, with_context=False)


Part = Callable[[str, str, Sequence[Any]], dict[str, Any]]


async def _load_only(call: Call[Any], empty: Mapping[str, Any]) -> Json:
    """Load the model, or, with ``keep_alive`` 0, unload it."""
    body: Asked = call.body
    stay = keep_alive(body)
    if stay == 0:
        files = await call.state.models.find(body.model)
        await call.state.models.expire(files.path)
    else:
        async with call.state.models.lease(body.model, stay) as model:
            call.record["model"] = model.files.name
    reason = "unload" if stay == 0 else "load"
    head = {"model": body.model, "created_at": now()}
    return Json({**head, **empty, "done": True, "done_reason": reason})


async def _respond(call: Call[Any], job: Job, part: Part, *, with_context: bool) -> Json | Stream:
    begun = time.monotonic()
    if call.body.stream:
        return Stream(_stream(call, job, part, begun, with_context=with_context))
    started, (item,) = await whole(call.state, job, call.record)
    calls = [_call(c.name, c.arguments) for c in item.routed.calls]
    body = part(item.routed.content, item.routed.reasoning, calls)
    body |= _logprobs(call, item.logprobs, started.model.llm.tokenizer)
    ids = item.token_ids if with_context else None
    ending = _ending(item.last, started, begun, ids)
    return Json({"model": job.model, "created_at": now(), **body, **ending})


async def _stream(
    call: Call[Any], job: Job, part: Part, begun: float, *, with_context: bool
) -> AsyncGenerator[bytes, None]:
    started: Started | None = None
    made = _Calls()
    ids: list[int] = []
    async with aclosing(answers(call.state, job, call.record)) as items:
        async for item in items:
            if isinstance(item, Started):
                started = item
                continue
            assert started is not None
            ids += item.token_ids
            text = "".join(
                p.text for p in item.pieces if isinstance(p, Content | ToolCallWithdrawn)
            )
            thinking = "".join(p.text for p in item.pieces if isinstance(p, Reasoning))
            calls = made.feed(item.pieces)
            found = _logprobs(call, item.logprobs, started.model.llm.tokenizer)
            head = {"model": job.model, "created_at": now()}
            if text or thinking or calls or found:
                yield line({**head, **part(text, thinking, calls), **found, "done": False})
            if item.finish is not None:
                ending = _ending(item, started, begun, ids if with_context else None)
                yield line({**head, **part("", "", []), **ending})


class _Calls:
    """Collects calls from pieces; Ollama sends each of them whole."""

    def __init__(self) -> None:
        self._names: dict[int, str] = {}
        self._arguments: dict[int, list[str]] = {}

    def feed(self, pieces: Sequence[Piece]) -> list[dict[str, Any]]:
        """The calls that are complete now."""
        done = []
        for piece in pieces:
            if isinstance(piece, ToolCallStart):
                self._names[piece.index], self._arguments[piece.index] = piece.name, []
            elif isinstance(piece, ToolCallArguments):
                self._arguments[piece.index].append(piece.fragment)
            elif isinstance(piece, ToolCallEnd):
                text = "".join(self._arguments[piece.index])
                done.append(_call(self._names[piece.index], text))
        return done


def _call(name: str, arguments: str) -> dict[str, Any]:
    return {"function": {"name": name, "arguments": json.loads(arguments)}}


def _logprobs(
    call: Call[Any], found: Sequence[TokenLogprob], tokenizer: Tokenizer
) -> dict[str, Any]:
    if not call.body.logprobs or not found:
        return {}

    def entry(token: int, logprob: float) -> dict[str, Any]:
        text, raw = token_text(tokenizer, token)
        return {"token": text, "logprob": max(logprob, -9999.0), "bytes": list(raw)}

    return {
        "logprobs": [
            {**entry(one.token, one.logprob), "top_logprobs": [entry(*t) for t in one.top]}
            for one in found
        ]
    }


def _ending(
    last: Delta, started: Started, begun: float, ids: Sequence[int] | None
) -> dict[str, Any]:
    """What a last object says: why it ended, and what it took, in nanoseconds."""
    timings = last.timings
    assert last.usage is not None
    ending: dict[str, Any] = {"done": True, "done_reason": _DONE[last.finish or "stop"]}
    if ids is not None:
        ending["context"] = [*started.prompt_ids[0], *ids]
    return {
        **ending,
        "total_duration": _ns(time.monotonic() - begun),
        "load_duration": _ns(started.load_seconds),
        "prompt_eval_count": last.usage.prompt_tokens,
        "prompt_eval_duration": _ns(timings.prefill),
        "eval_count": last.usage.completion_tokens,
        "eval_duration": _ns(timings.decode),
    }


def _ns(span: float) -> int:
    return int(span * 1e9)


async def embed(call: Call[EmbedRequest]) -> Json:
    """``POST /api/embed``."""
    body = call.body
    texts = [body.input] if isinstance(body.input, str) else body.input
    begun = time.monotonic()
    rows, tokens, loaded_in = await _embed(call, texts, truncate=body.truncate)
    return Json(
        {
            "model": body.model,
            "embeddings": rows,
            "total_duration": _ns(time.monotonic() - begun),
            "load_duration": _ns(loaded_in),
            "prompt_eval_count": tokens,
        }
    )


async def embeddings(call: Call[EmbeddingsRequest]) -> Json:
    """``POST /api/embeddings``."""
    rows, _, _ = await _embed(call, [call.body.prompt], truncate=True)
    return Json({"embedding": rows[0]})


async def _embed(
    call: Call[Any], texts: Sequence[str], *, truncate: bool
) -> tuple[list[list[float]], int, float]:
    """Vectors, how many tokens they were made of, and the seconds it took to load the model."""
    body: Asked = call.body
    if body.options is not None and body.options.model_dump(exclude_none=True):
        raise BadParameter("options", "none of them changes an embedding")
    if len(texts) > 2048:
        raise BadParameter("input", "give at most 2048 texts")
    asked = time.monotonic()
    async with call.state.models.lease(body.model, keep_alive(body)) as model:
        loaded_in = time.monotonic() - asked
        call.record["model"] = model.files.name
        info = model.llm.info
        dimensions = getattr(body, "dimensions", None)
        if dimensions not in (None, info.hidden):
            raise BadParameter("dimensions", f"this model's embeddings have {info.hidden}")
        prompts = [await call.state.in_thread(model.llm.encode, text) for text in texts]
        if truncate:
            prompts = [prompt[: info.context] for prompt in prompts]
        rows = await model.llm.embed(prompts)  # type: ignore[arg-type]
    return rows.tolist(), sum(map(len, prompts)), loaded_in
