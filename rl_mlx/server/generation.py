"""From a request that has been understood to the pieces of its answers."""

from __future__ import annotations

import asyncio
import re
import secrets
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Any

from rl_mlx.server.models import KEEP, Loaded
from rl_mlx.server.problems import BadParameter
from rl_mlx.server.state import State
from rl_mlx.server.structure import calls, forced_format, strict_calls, with_thoughts
from rl_mlx.text.router import (
    Content,
    Piece,
    Reasoning,
    Routed,
    Router,
    ToolCallArguments,
    ToolCallEnd,
    ToolCallWithdrawn,
    collect,
)
from rl_mlx.text.tokenizer import Tokenizer
from rl_mlx.types import Chunk, FinishReason, Grammar, SamplingParams, Timings, TokenLogprob, Usage

_TAIL = 400  # characters of the prompt in which a template may have opened the reasoning


@dataclass(frozen=True, kw_only=True)
class Job:
    """What an API file makes of a request.

    Either ``messages`` or ``prompts`` (texts or token ids). ``n`` answers to each. ``sampling`` are
    the fields of ``SamplingParams`` that the request set, over ``defaults``, those of its API.
    ``effort`` is how hard to think (``none``, ``low``... or None for as the model does), and
    ``effort_name`` the parameter that says so. After ``max_calls`` calls of tools the answer ends;
    it must call a tool, or the one named, where ``must_call`` says so. ``form`` is what the answer
    must be, reasoning aside. ``before`` are the token ids of earlier turns; ``context`` is how many
    tokens the model must at least have room for.
    """

    model: str
    messages: Sequence[Mapping[str, Any]] = ()
    prompts: Sequence[str | Sequence[int]] = ()
    tools: Sequence[Mapping[str, Any]] = ()
    n: int = 1
    sampling: Mapping[str, Any] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    template_options: Mapping[str, Any] = field(default_factory=dict)
    effort: str | None = None
    effort_name: str = "reasoning_effort"
    max_calls: int | None = None
    must_call: bool | str = False
    form: Grammar | None = None
    before: Sequence[int] = ()
    context: int | None = None
    keep_alive: object = KEEP


@dataclass(frozen=True)
class Started:
    """The first thing that comes: the model has the prompts (``prompt_ids``, one list each)."""

    model: Loaded
    prompt_ids: Sequence[Sequence[int]]
    load_seconds: float = 0.0


@dataclass(frozen=True)
class Delta:
    """More of answer ``index``. ``usage`` and the fields after it are set in its last one."""

    index: int
    pieces: Sequence[Piece] = ()
    token_ids: Sequence[int] = ()
    logprobs: Sequence[TokenLogprob] = ()
    finish: FinishReason | None = None
    stop: str | None = None
    usage: Usage | None = None
    timings: Timings = field(default_factory=Timings)
    reasoning_tokens: int = 0


@dataclass(frozen=True)
class Whole:
    """All of one answer."""

    routed: Routed
    token_ids: Sequence[int]
    logprobs: Sequence[TokenLogprob]
    last: Delta

    @property
    def usage(self) -> Usage:
        """Its tokens."""
        assert self.last.usage is not None, "the answer is not finished"
        return self.last.usage


@dataclass(frozen=True)
class Prepared:
    """A job's prompts in token ids, how to answer them, and the end of their text."""

    ids: Sequence[Sequence[int]]
    params: SamplingParams
    tail: str = ""


def prepare(model: Loaded, job: Job, defaults: Mapping[str, Any]) -> Prepared:
    """Template and tokenizer; takes long for a long prompt. Raises ``InvalidRequest``."""
    params = SamplingParams.of(**{**job.defaults, **defaults, **job.sampling})
    outside = next((t for t in params.logit_bias if t >= model.llm.info.vocab), None)
    if outside is not None:
        raise BadParameter("logit_bias", f"the vocabulary has no token {outside}")
    if job.context is not None and job.context > model.llm.info.context:
        raise BadParameter(
            "num_ctx",
            f"{model.files.name} runs with a context of {model.llm.info.context}; see --context",
        )
    if not job.messages:
        params = replace(params, grammar=job.form)
        return Prepared([model.llm.encode(prompt) for prompt in job.prompts], params)
    options = {**thinking(model, job.effort, job.effort_name), **job.template_options}
    clash = next((o for o in options if o in {"messages", "tools", "name"}), None)
    if clash is not None:
        raise BadParameter("chat_template_kwargs", f"{clash} is not a variable to be set")
    text = model.template.render(_roles(model, job.messages), job.tools, **options)
    tail = text[-_TAIL:]
    params = replace(params, grammar=_grammar(model, job, tail))
    return Prepared([[*job.before, *model.llm.encode_rendered(text)]], params, tail)


def _grammar(model: Loaded, job: Job, tail: str) -> Grammar | None:
    """What holds the answer to its form, with room for the reasoning before it."""
    form = calls(job.tools, job.must_call, job.max_calls) if job.must_call else job.form
    if form is None:
        special = model.llm.tokenizer.token_id("<tool_call>") in model.llm.tokenizer.special_ids
        return strict_calls(job.tools, model.format, special=special)
    opened = tail.rstrip().endswith(model.format.tags.open.rstrip())
    if opened or job.effort not in (None, "none"):
        return with_thoughts(form, model.format, opened=opened)
    return form


def _roles(model: Loaded, messages: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """``developer`` is ``system`` for the templates that do not know it."""
    if "developer" in model.source:
        return list(messages)
    return [{**m, "role": "system"} if m.get("role") == "developer" else m for m in messages]


def thinking(model: Loaded, effort: str | None, name: str) -> dict[str, Any]:
    """The template's variables that make the model think so hard.

    Raises ``InvalidRequest`` where the template has no such switch.
    """
    if effort is None:
        return {}
    options: dict[str, Any] = {}
    for switch in ("enable_thinking", "thinking"):
        if re.search(rf"(?<![\w.]){switch}\s+(is|==|and|or|%|else)|(if|not|and|or)\s+{switch}\b",
                     model.source):  # fmt: skip
            options[switch] = effort != "none"
            break
    if effort != "none" and re.search(r"\breasoning_effort\b", model.source):
        options["reasoning_effort"] = effort
    if effort != "none" and not options:
        raise BadParameter(name, f"{model.files.name} has no switch for thinking")
    return options


async def answers(
    state: State, job: Job, record: dict[str, Any]
) -> AsyncGenerator[Started | Delta, None]:
    """``Started``, then the deltas of all answers as they come; ``prompts[i]`` has the answers
    ``i * n`` up to ``i * n + n - 1``.

    ``record`` gets what the log says. Closing it cancels what runs. Raises what any step raises.
    """
    asked = asyncio.get_running_loop().time()
    async with state.models.lease(job.model, job.keep_alive) as model:
        record["model"] = model.files.name
        loaded_in = asyncio.get_running_loop().time() - asked
        ready = await state.in_thread(prepare, model, job, state.settings.sampling)
        if state.settings.log_prompts:
            record["prompts"] = [model.llm.detokenize(ids) for ids in ready.ids]
        streams = [
            _one(model, job, ready, number // job.n, number)
            for number in range(len(ready.ids) * job.n)
        ]
        started = False
        async with aclosing(_merge(streams)) as deltas:
            async for delta in deltas:
                if not started:
                    started = True
                    yield Started(model, ready.ids, loaded_in)
                if delta.usage is not None:
                    _note(state, model, delta, record)
                yield delta


def _note(state: State, model: Loaded, delta: Delta, record: dict[str, Any]) -> None:
    assert delta.usage is not None
    timings = delta.timings
    state.metrics.answer(model.files.name, timings)
    record["prompt_tokens"] = record.get("prompt_tokens", 0) + delta.usage.prompt_tokens
    record["tokens"] = record.get("tokens", 0) + delta.usage.completion_tokens
    record.setdefault("first_token_ms", round(timings.first_token * 1000, 1))
    record["finish"] = delta.finish


async def _one(
    model: Loaded, job: Job, ready: Prepared, prompt: int, number: int
) -> AsyncGenerator[Delta, None]:
    """The deltas of one answer."""
    ids, params = ready.ids[prompt], ready.params
    if params.seed is not None and number:
        params = SamplingParams.of(params, seed=params.seed + number)
    is_turn = bool(job.messages)
    shown = model.shown if is_turn else frozenset()
    router = None
    if is_turn:
        form = forced_format(model.format) if job.must_call else model.format
        router = Router(form, tools=job.tools, prompt_tail=ready.tail)
    reading = _Reading(number, router, len(ids), job.max_calls)
    chunks = model.llm.answer(ids, params, is_turn=is_turn, shown=shown)
    async with aclosing(chunks) as stream:  # type: ignore[type-var]
        async for chunk in stream:
            if chunk.progress is not None:
                yield Delta(number)
            else:
                delta = reading.feed(chunk)
                if delta is not None:
                    yield delta
            if reading.done:
                return


class _Reading:
    """Takes the chunks of one answer apart."""

    def __init__(
        self, index: int, router: Router | None, prompt_tokens: int, max_calls: int | None
    ) -> None:
        self.done = False
        self._index = index
        self._router = router
        self._prompt_tokens = prompt_tokens
        self._max_calls = max_calls
        self._calls = 0
        self._tokens = 0
        self._reasoning = 0
        self._thinks = False
        self._held: list[TokenLogprob] = []  # of tokens whose text has not come yet

    def feed(self, chunk: Chunk) -> Delta | None:
        """The delta that a chunk makes, if any."""
        pieces = self._route(chunk)
        self._count(chunk, pieces)
        logprobs = self._logprobs(chunk, pieces)
        is_last = chunk.finish_reason is not None
        if self._max_calls is not None and self._calls >= self._max_calls and not is_last:
            timings = Timings(prompt_tokens=self._prompt_tokens, generated=self._tokens)
            return self._last(pieces, chunk, logprobs, timings)
        if is_last:
            return self._last(pieces, chunk, logprobs, chunk.timings or Timings())
        if pieces or logprobs or chunk.token_ids:
            return Delta(self._index, pieces, chunk.token_ids, logprobs)
        return None

    def _route(self, chunk: Chunk) -> list[Piece]:
        if self._router is None:
            return [Content(chunk.text)] if chunk.text else []
        pieces = self._router.feed(chunk.text) if chunk.text else []
        if chunk.finish_reason is not None:
            pieces += self._router.flush()
        if self._max_calls is None:
            return pieces
        room = self._max_calls - self._calls
        ends = [i for i, piece in enumerate(pieces) if isinstance(piece, ToolCallEnd)]
        return pieces[: ends[room - 1] + 1] if len(ends) >= room else pieces

    def _count(self, chunk: Chunk, pieces: Sequence[Piece]) -> None:
        """Tokens; where a chunk has thoughts and more, those of thoughts by their share of it."""
        count = len(chunk.token_ids)
        self._tokens += count
        self._calls += sum(isinstance(piece, ToolCallEnd) for piece in pieces)
        share = float(self._thinks)
        if pieces:
            self._thinks = isinstance(pieces[-1], Reasoning)
            thought = sum(len(p.text) for p in pieces if isinstance(p, Reasoning))
            other = sum(len(p.text) for p in pieces if isinstance(p, Content | ToolCallWithdrawn))
            other += sum(len(p.fragment) for p in pieces if isinstance(p, ToolCallArguments))
            share = thought / max(thought + other, 1)
        self._reasoning += round(count * share)

    def _logprobs(self, chunk: Chunk, pieces: Sequence[Piece]) -> list[TokenLogprob]:
        """Those of content alone; they come with its text."""
        self._held += chunk.logprobs
        if not pieces and chunk.finish_reason is None:
            return []
        held, self._held = self._held, []
        return held if any(isinstance(piece, Content) for piece in pieces) else []

    def _last(
        self, pieces: Sequence[Piece], chunk: Chunk, logprobs: Sequence[TokenLogprob],
        timings: Timings,
    ) -> Delta:  # fmt: skip
        self.done = True
        finish = chunk.finish_reason or "stop"
        return Delta(
            self._index,
            pieces,
            chunk.token_ids,
            logprobs,
            finish="tool_calls" if self._calls and finish == "stop" else finish,
            stop=chunk.stop,
            usage=chunk.usage or Usage(self._prompt_tokens, self._tokens),
            timings=timings,
            reasoning_tokens=self._reasoning,
        )


async def _merge(streams: Sequence[AsyncGenerator[Delta, None]]) -> AsyncGenerator[Delta, None]:
    """All of several streams, in the order in which it comes."""
    if len(streams) == 1:
        async with aclosing(streams[0]) as only:
            async for delta in only:
                yield delta
        return
    queue: asyncio.Queue[Delta | BaseException | None] = asyncio.Queue()

    async def pump(stream: AsyncGenerator[Delta, None]) -> None:
        try:
            async with aclosing(stream) as items:
                async for delta in items:
                    queue.put_nowait(delta)
            queue.put_nowait(None)
        except Exception as error:  # noqa: BLE001 - raised again by the reader
            queue.put_nowait(error)

    tasks = [asyncio.create_task(pump(stream)) for stream in streams]
    try:
        left = len(tasks)
        while left:
            item = await queue.get()
            if isinstance(item, BaseException):
                raise item
            if item is None:
                left -= 1
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def whole(state: State, job: Job, record: dict[str, Any]) -> tuple[Started, list[Whole]]:
    """All answers, when they are done."""
    started: Started | None = None
    parts: dict[int, list[Delta]] = {}
    async with aclosing(answers(state, job, record)) as deltas:
        async for item in deltas:
            if isinstance(item, Started):
                started = item
            else:
                parts.setdefault(item.index, []).append(item)
    assert started is not None, "an answer begins with Started"
    return started, [_joined(parts[index]) for index in sorted(parts)]


def _joined(parts: Sequence[Delta]) -> Whole:
    return Whole(
        routed=collect(piece for part in parts for piece in part.pieces),
        token_ids=[token for part in parts for token in part.token_ids],
        logprobs=[logprob for part in parts for logprob in part.logprobs],
        last=parts[-1],
    )


def call_id() -> str:
    """A new name for a call of a tool."""
    return f"call_{secrets.token_hex(12)}"


def token_text(tokenizer: Tokenizer, token: int) -> tuple[str, bytes]:
    """A token as text, U+FFFD where it is no whole character, and as bytes."""
    data = tokenizer.token_bytes(token) if token < tokenizer.vocab_size else b""
    return data.decode("utf-8", "replace"), data
