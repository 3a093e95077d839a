"""OpenAI's completions, embeddings and models."""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from datetime import datetime, timezone
from typing import Any

import numpy as np

from rl_mlx.errors import ModelNotFound
from rl_mlx.server.endpoint import Call, Json, Stream
from rl_mlx.server.generation import Delta, Job, Started, Whole, answers, token_text, whole
from rl_mlx.server.models import Loaded
from rl_mlx.server.openai_chat import DEFAULTS, FINISH, found_last, keep_alive, sampling, usage
from rl_mlx.server.problems import BadParameter, data
from rl_mlx.server.schemas.openai import CompletionRequest, EmbeddingRequest
from rl_mlx.server.structure import response_format
from rl_mlx.store import installed
from rl_mlx.text.router import Content
from rl_mlx.text.tokenizer import Tokenizer
from rl_mlx.types import TokenLogprob

_ECHO_BYTES = 1 << 30  # of the logits that the log probabilities of a prompt are made from


def several(value: Any) -> list[Any]:
    """A prompt as a list of prompts: a text or token ids are one."""
    if isinstance(value, str) or (value and isinstance(value[0], int)):
        return [value]
    return list(value)


def job_of(body: CompletionRequest) -> Job:
    """What a request asks for."""
    prompts = several(body.prompt)
    if not prompts or len(prompts) > 128:
        raise BadParameter("prompt", "give from 1 to 128 prompts")
    if body.best_of is not None and body.best_of != body.n:
        raise BadParameter("best_of", "only the same as n is supported")
    if body.echo and body.stream and body.logprobs is not None:
        raise BadParameter("echo", "with logprobs it cannot be streamed")
    options = {**sampling(body), "max_tokens": body.max_tokens}
    if body.logprobs is not None:
        options["logprobs"] = body.logprobs
    return Job(
        model=body.model,
        prompts=prompts,
        n=body.n,
        sampling=options,
        form=response_format(body.response_format),
        defaults=DEFAULTS,
        keep_alive=keep_alive(body),
    )


async def completions(call: Call[CompletionRequest]) -> Json | Stream:
    """``POST /v1/completions``."""
    body, job = call.body, job_of(call.body)
    head = {
        "id": f"cmpl-{call.request_id.removeprefix('req_')}",
        "object": "text_completion",
        "created": int(time.time()),
        "model": body.model,
    }
    if body.stream:
        return Stream(_stream(call, job, head))
    started, found = await whole(call.state, job, call.record)
    choices = []
    for item in found:
        ids = started.prompt_ids[item.last.index // job.n]
        choices.append(await _choice(call, started.model, item, ids))
    return Json({**head, "choices": choices, "usage": _usage(found_last(found), job.n)})


async def _choice(
    call: Call[CompletionRequest], model: Loaded, item: Whole, prompt: Sequence[int]
) -> dict[str, Any]:
    body, tokenizer = call.body, model.llm.tokenizer
    text, logprobs = item.routed.content, [*item.logprobs]
    before = ""
    if body.echo:
        before = tokenizer.decode(prompt)
        if body.logprobs is not None:
            logprobs = [*await _prompt_logprobs(call, model, prompt), *logprobs]
    return {
        "text": before + text,
        "index": item.last.index,
        "logprobs": _logprobs(logprobs, tokenizer, 0) if body.logprobs is not None else None,
        "finish_reason": FINISH[item.last.finish or "stop"],
    }


async def _prompt_logprobs(
    call: Call[CompletionRequest], model: Loaded, prompt: Sequence[int]
) -> list[TokenLogprob]:
    """Of each token of a prompt given those before it; the first has none, which is NaN here."""
    if len(prompt) * model.llm.info.vocab * 4 > _ECHO_BYTES:
        raise BadParameter("echo", "the prompt is too long for the logprobs of all its tokens")
    logits = await model.llm.logits(prompt)
    top = call.body.logprobs or 0

    def compute() -> list[TokenLogprob]:
        wide = logits[:-1].astype(np.float64)
        wide -= wide.max(axis=-1, keepdims=True)
        wide -= np.log(np.exp(wide).sum(axis=-1, keepdims=True))
        found = [TokenLogprob(prompt[0], float("nan"))]
        for row, token in zip(wide, prompt[1:]):
            best = np.argsort(-row, kind="stable")[:top]
            likeliest = tuple((int(i), float(row[i])) for i in best)
            found.append(TokenLogprob(token, float(row[token]), likeliest))
        return found

    return await call.state.in_thread(compute)


def _logprobs(found: Sequence[TokenLogprob], tokenizer: Tokenizer, offset: int) -> dict[str, Any]:
    """As a choice of a completion has them; ``offset`` is where its text begins."""
    texts = [token_text(tokenizer, one.token)[0] for one in found]
    offsets = []
    for text in texts:
        offsets.append(offset)
        offset += len(text)
    known = [one.logprob == one.logprob for one in found]
    return {
        "tokens": texts,
        "token_logprobs": [max(o.logprob, -9999.0) if k else None for o, k in zip(found, known)],
        "top_logprobs": [
            {token_text(tokenizer, token)[0]: max(value, -9999.0) for token, value in one.top}
            if k
            else None
            for one, k in zip(found, known)
        ],
        "text_offset": offsets,
    }


def _usage(last: Sequence[Delta], n: int) -> dict[str, Any]:
    """Tokens of all answers; each prompt counts once."""
    total = usage(last)
    total["prompt_tokens"] = sum(d.usage.prompt_tokens for d in last[::n] if d.usage)
    total["total_tokens"] = total["prompt_tokens"] + total["completion_tokens"]
    return total


async def _stream(
    call: Call[CompletionRequest], job: Job, head: Mapping[str, Any]
) -> AsyncGenerator[bytes, None]:
    body = call.body
    wants_usage = body.stream_options is not None and body.stream_options.include_usage
    extra: dict[str, Any] = {"usage": None} if wants_usage else {}

    def chunk(index: int, text: str, finish: str | None = None, logprobs: Any = None) -> bytes:
        choice = {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish}
        return data({**head, "choices": [choice], **extra})

    last: dict[int, Delta] = {}
    lengths: dict[int, int] = {}
    tokenizer: Tokenizer | None = None
    async with aclosing(answers(call.state, job, call.record)) as items:
        async for item in items:
            if isinstance(item, Started):
                tokenizer = item.model.llm.tokenizer
                for index in range(len(item.prompt_ids) * job.n if body.echo else 0):
                    yield chunk(index, tokenizer.decode(item.prompt_ids[index // job.n]))
                continue
            assert tokenizer is not None
            text = "".join(piece.text for piece in item.pieces if isinstance(piece, Content))
            begin = lengths.get(item.index, 0)
            lengths[item.index] = begin + len(text)
            found = _logprobs(item.logprobs, tokenizer, begin) if item.logprobs else None
            if text or found:
                yield chunk(item.index, text, logprobs=found)
            if item.finish is not None:
                last[item.index] = item
                yield chunk(item.index, "", FINISH[item.finish])
    totals = _usage([last[i] for i in sorted(last)], job.n) if wants_usage else None
    tail = data({**head, "choices": [], "usage": totals}) if wants_usage else b""
    yield tail + b"data: [DONE]\n\n"


async def embeddings(call: Call[EmbeddingRequest]) -> Json:
    """``POST /v1/embeddings``."""
    body = call.body
    texts = several(body.input)
    if not texts or len(texts) > 2048:
        raise BadParameter("input", "give from 1 to 2048 texts")
    async with call.state.models.lease(body.model, keep_alive(body)) as model:
        call.record["model"] = model.files.name
        hidden = model.llm.info.hidden
        if body.dimensions not in (None, hidden):
            raise BadParameter("dimensions", f"this model's embeddings have {hidden}")
        prompts = [await call.state.in_thread(model.llm.encode, text) for text in texts]
        rows = await model.llm.embed(prompts)  # type: ignore[arg-type]
    tokens = sum(map(len, prompts))
    call.record["prompt_tokens"] = tokens
    found = [
        {"object": "embedding", "index": i, "embedding": _vector(row, body.encoding_format)}
        for i, row in enumerate(rows)
    ]
    return Json(
        {
            "object": "list",
            "data": found,
            "model": body.model,
            "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
        }
    )


def _vector(row: Any, form: str) -> Any:
    if form == "base64":
        return base64.b64encode(row.astype("<f4").tobytes()).decode()
    return row.tolist()


async def names(call: Call[Any]) -> list[tuple[str, int]]:
    """What clients may ask for: models here, and aliases. With the time of the file."""
    here = await asyncio.to_thread(lambda: [(m.name, _time(m.path)) for m in installed()])
    known = [(m.files.name, _time(m.files.path)) for m in call.state.models.loaded]
    aliases = [(name, 0) for name in call.state.settings.aliases if not set(name) & set("*?[")]
    return list(dict([*here, *known, *aliases]).items())


def _time(path: Any) -> int:
    try:
        return int(path.stat().st_mtime)
    except OSError:
        return 0


async def models(call: Call[Any]) -> Json:
    """``GET /v1/models``, as OpenAI has it and as Anthropic has it."""
    found = [_model(*entry) for entry in await names(call)]
    ends = {
        f"{end}_id": found[at]["id"] if found else None for end, at in (("first", 0), ("last", -1))
    }
    return Json({"object": "list", "data": found, "has_more": False, **ends})


async def model(call: Call[Any]) -> Json:
    """``GET /v1/models/{name}``."""
    wanted = call.path["name"]
    for name, created in await names(call):
        if name == wanted:
            return Json(_model(name, created))
    raise ModelNotFound(f"no model {wanted!r} here; GET /v1/models lists what there is")


def _model(name: str, created: int) -> dict[str, Any]:
    theirs = {
        "type": "model",
        "display_name": name,
        "created_at": datetime.fromtimestamp(created, timezone.utc).isoformat(),
    }
    return {"id": name, "object": "model", "created": created, "owned_by": "rl-mlx", **theirs}
