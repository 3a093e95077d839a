"""``LLM`` and ``AsyncLLM``: a model, its tokenizer and a backend behind one small set of calls.

A request's way: text -> template and tokenizer -> ``Request`` -> backend -> ``Event`` -> ``Answer``
-> ``Chunk``.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import (
    AsyncIterator,
    Callable,
    Coroutine,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from typing import Any, Concatenate, Literal, ParamSpec, TypeVar, overload

import numpy as np
import numpy.typing as npt

from rl_mlx.backends import open_backend
from rl_mlx.backends.base import Backend, Stats
from rl_mlx.errors import InvalidRequest
from rl_mlx.sample.grammar import Compiler
from rl_mlx.settings import ModelSettings
from rl_mlx.store import resolve
from rl_mlx.text.answer import Answer
from rl_mlx.text.detokenizer import Detokenizer
from rl_mlx.text.tokenizer import Tokenizer
from rl_mlx.types import (
    Chunk,
    Event,
    Message,
    ModelInfo,
    Request,
    Result,
    SamplingParams,
    Token,
)
from rl_mlx.waiting import Awaiting, Blocking, Waiting, drive, iterate

T = TypeVar("T")
P = ParamSpec("P")
Prompt = str | Sequence[int]
Messages = Sequence[Message | Mapping[str, Any]]


class AsyncLLM:
    """A loaded model; the calls of ``LLM``, awaited.

    >>> async with AsyncLLM("demo") as llm:
    ...     result = await llm.chat([{"role": "user", "content": "hi"}])
    ...     async for chunk in llm.generate("Once", stream=True):
    ...         print(chunk.text, end="")

    The constructor reads the weights and blocks until they are there; in a server call it by
    ``asyncio.to_thread``.
    """

    def __init__(
        self,
        model: str,
        *,
        backend: str = "auto",
        draft: str | None = None,
        draft_tokens: int | None = None,
        context: int | None = None,
        kv_bits: int | str | None = None,
        memory: int | str | None = None,
        prefix_cache: int | str | None = None,
        parallel: int | None = None,
        dtype: str | None = None,
        backend_options: Mapping[str, Any] | None = None,
    ) -> None:
        settings = ModelSettings(
            backend=backend,
            draft=draft,
            draft_tokens=draft_tokens,
            context=context,
            kv_bits=kv_bits,
            memory=memory,
            prefix_cache=prefix_cache,
            parallel=parallel,
            dtype=dtype,
            backend_options=backend_options or {},
        )
        self._set_up(*_load(model, settings), Awaiting())

    @classmethod
    def of(cls, backend: Backend, tokenizer: Tokenizer, waiting: Waiting | None = None) -> AsyncLLM:
        """Over a backend that is open already; closing this closes it."""
        llm = cls.__new__(cls)
        llm._set_up(backend, tokenizer, waiting or Awaiting())
        return llm

    def _set_up(self, backend: Backend, tokenizer: Tokenizer, waiting: Waiting) -> None:
        self._backend = backend
        self._tokenizer = tokenizer
        self._waiting = waiting
        self._ids = (f"req-{n}" for n in itertools.count())
        self._compiler = Compiler(tokenizer, backend.info.vocab)

    @property
    def info(self) -> ModelInfo:
        """Architecture, sizes, backend and device."""
        return self._backend.info

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer."""
        return self._tokenizer

    def stats(self) -> Stats:
        """What the backend is doing now."""
        return self._backend.stats()

    def tokenize(self, text: str, *, add_special: bool = True) -> list[int]:
        """Token ids; ``add_special`` puts the BOS (and EOS) that the model wants."""
        return self._tokenizer.encode(text, add_special=add_special)

    def detokenize(self, ids: Sequence[int]) -> str:
        """Text of token ids, special tokens left out."""
        return self._tokenizer.decode(ids)

    def apply_template(
        self,
        messages: Messages,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **options: Any,
    ) -> str:
        """The prompt that the model's chat template makes; ``options`` are the template's
        variables.
        """
        return self._tokenizer.template.render(messages, tools=tools, **options)

    def generate(
        self, prompt: Prompt | Sequence[Prompt], *, stream: bool = False, **sampling: Any
    ) -> Coroutine[Any, Any, Result | list[Result]] | AsyncIterator[Chunk]:
        """Continue a prompt (text or token ids), or a list of prompts as one batch, results in
        order.

        ``sampling`` are the fields of ``SamplingParams``, or ``params=`` one of those. With
        ``stream=True`` an async iterator of ``Chunk``; closing it cancels the request.
        """
        params = SamplingParams.of(sampling.pop("params", None), **sampling)
        if _is_batch(prompt):
            if stream:
                raise InvalidRequest("stream=True takes one prompt, not a list of them")
            return self._gather([self.encode(p) for p in prompt], params)  # type: ignore[arg-type]
        ids = self.encode(prompt)  # type: ignore[arg-type]
        return self._stream(ids, params) if stream else self._first(ids, params)

    def chat(
        self,
        messages: Messages,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template_options: Mapping[str, Any] | None = None,
        show_markers: bool = False,
        stream: bool = False,
        **sampling: Any,
    ) -> Coroutine[Any, Any, Result] | AsyncIterator[Chunk]:
        """Answer a conversation through the model's chat template; otherwise as ``generate``.

        ``show_markers`` leaves the control tokens that mark reasoning and calls of tools in the
        text, for a ``Router``.
        """
        params = SamplingParams.of(sampling.pop("params", None), **sampling)
        ids = self.encode_rendered(
            self.apply_template(messages, tools=tools, **(template_options or {}))
        )
        shown = self._tokenizer.markers if show_markers else frozenset()
        if stream:
            return self._stream(ids, params, is_turn=True, shown=shown)
        return self._first(ids, params, is_turn=True, shown=shown)

    def answer(
        self,
        prompt: Sequence[int],
        params: SamplingParams,
        *,
        is_turn: bool = False,
        shown: frozenset[int] = frozenset(),
    ) -> AsyncIterator[Chunk]:
        """The chunks of an answer to token ids; what ``generate`` and ``chat`` are made of.

        ``is_turn``: the answer begins a text of its own, as in a chat, rather than go on from the
        prompt's. ``shown`` control tokens are part of the text (see ``Format.markers``).
        """
        return self._stream(self.encode(prompt), params, is_turn=is_turn, shown=shown)

    async def logits(self, ids: Sequence[int]) -> npt.NDArray[np.float32]:
        """Logits of every position, float32 ``[len(ids), vocab]``."""
        return await self._waiting.run(self._backend.logits, list(ids))

    async def embed(self, texts: str | Sequence[str]) -> npt.NDArray[np.float32]:
        """Unit vectors (mean of the last hidden states), float32 ``[len(texts), hidden]``."""
        batch = [texts] if isinstance(texts, str) else list(texts)
        rows = [await self._waiting.run(self._backend.embed, self.encode(t)) for t in batch]
        return np.stack(rows) if rows else np.zeros((0, self.info.hidden), np.float32)

    async def close(self) -> None:
        """Cancel what runs, join the thread, free the memory."""
        await self._waiting.run(self._backend.close)

    async def __aenter__(self) -> AsyncLLM:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    def encode(self, prompt: Prompt) -> list[int]:
        """The prompt's token ids, checked; raises ``InvalidRequest``. Safe in any thread."""
        ids = self.tokenize(prompt) if isinstance(prompt, str) else [int(t) for t in prompt]
        if not ids:
            raise InvalidRequest("the prompt is empty: it encodes to no tokens")
        outside = next((t for t in ids if not 0 <= t < self.info.vocab), None)
        if outside is not None:
            raise InvalidRequest(
                f"token id {outside} is outside the vocabulary of {self.info.vocab}"
            )
        return ids

    def encode_rendered(self, text: str) -> list[int]:
        """A rendered template's ids: one BOS where the model wants one, whether the template wrote
        it or not.
        """
        tokenizer = self._tokenizer
        ids = tokenizer.encode(text, add_special=False)
        if tokenizer.add_bos and tokenizer.bos_id is not None and ids[:1] != [tokenizer.bos_id]:
            ids.insert(0, tokenizer.bos_id)
        return self.encode(ids)

    async def _events(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams,
        *,
        is_turn: bool,
        shown: frozenset[int] = frozenset(),
    ) -> AsyncIterator[tuple[int, Answer, Chunk | None]]:
        """Submit all, then yield each event's chunk as it comes; leaving early cancels the rest.

        ``is_turn``: the answers begin a text of their own, rather than go on from the prompt's.
        """
        channel = self._waiting.channel()
        answers: list[Answer] = []
        running: dict[int, str] = {}
        constraint = None
        if params.grammar is not None:
            constraint = await self._waiting.run(self._compiler.compile, params.grammar)
        try:
            for index, prompt in enumerate(prompts):
                request = Request(
                    id=next(self._ids), prompt=tuple(prompt), params=params,
                    eos_ids=self._tokenizer.eos_ids,
                    matcher=None if constraint is None else constraint.start(),
                )  # fmt: skip
                continues = not is_turn and not self._tokenizer.special_ids.issuperset(prompt)
                detokenizer = Detokenizer(self._tokenizer, continues=continues, shown=shown)
                answers.append(Answer(detokenizer, params.stop, len(prompt)))

                def emit(event: Event, index: int = index) -> None:
                    channel.put((index, event), urgent=not isinstance(event, Token))

                self._backend.submit(request, emit)
                running[index] = request.id
            while running:
                items = await channel.get()
                for index, events in _by_answer(items, apart=params.logprobs is not None):
                    answer = answers[index]
                    was_stopped = answer.stopped
                    chunk = answer.feed(events)
                    if answer.ended:
                        del running[index]
                    elif answer.stopped and not was_stopped:
                        self._backend.cancel(running[index])
                    yield index, answer, chunk
                    if answer.error is not None:
                        raise answer.error
        finally:
            for request_id in running.values():
                self._backend.cancel(request_id)

    async def _stream(
        self,
        prompt: Sequence[int],
        params: SamplingParams,
        *,
        is_turn: bool = False,
        shown: frozenset[int] = frozenset(),
    ) -> AsyncIterator[Chunk]:
        events = self._events([prompt], params, is_turn=is_turn, shown=shown)
        try:
            async for _, _, chunk in events:
                if chunk is not None:
                    yield chunk
        finally:
            await events.aclose()  # type: ignore[attr-defined]

    async def _gather(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams,
        *,
        is_turn: bool = False,
        shown: frozenset[int] = frozenset(),
    ) -> list[Result]:
        answers: dict[int, Answer] = {}
        async for index, answer, _ in self._events(prompts, params, is_turn=is_turn, shown=shown):
            answers[index] = answer
        return [answers[i].result() for i in range(len(prompts))]

    async def _first(
        self,
        prompt: Sequence[int],
        params: SamplingParams,
        *,
        is_turn: bool = False,
        shown: frozenset[int] = frozenset(),
    ) -> Result:
        return (await self._gather([prompt], params, is_turn=is_turn, shown=shown))[0]


def _by_answer(
    items: Sequence[tuple[int, Event]], *, apart: bool
) -> Iterable[tuple[int, Sequence[Event]]]:
    """Events that came together, a list for each answer; or each ``apart``."""
    if apart:
        return ((index, [event]) for index, event in items)
    found: dict[int, list[Event]] = {}
    for index, event in items:
        found.setdefault(index, []).append(event)
    return found.items()


def _is_batch(prompt: object) -> bool:
    """True for a list of prompts: not a text, and its first item is not a token id."""
    if isinstance(prompt, str):
        return False
    items = list(prompt)  # type: ignore[call-overload]
    return not items or not isinstance(items[0], (int, np.integer))


def _takes(
    other: Callable[Concatenate[Any, P], None],
) -> Callable[[Callable[..., None]], Callable[Concatenate[Any, P], None]]:
    """The decorated method has the parameters of ``other``, and hands them on."""

    def decorate(method: Callable[..., None]) -> Callable[Concatenate[Any, P], None]:
        method.__signature__ = inspect.signature(other)  # type: ignore[attr-defined]
        return method

    return decorate


class LLM:
    """A loaded model.

    >>> llm = LLM("demo")      # a file, a folder, a hub id, "ollama:llama3.1:8b", "demo"
    >>> llm.generate("Once upon a time", max_tokens=64, temperature=0).text
    >>> for chunk in llm.chat([{"role": "user", "content": "hi"}], stream=True):
    ...     print(chunk.text, end="")

    The options are those of ``ModelSettings``. A context manager; ``close`` frees the memory. Each
    call here is the one of ``AsyncLLM`` with the same name, waited for.
    """

    @_takes(AsyncLLM.__init__)
    def __init__(self, model: str, **options: Any) -> None:
        self._llm = AsyncLLM(model, **options)
        self._llm._waiting = Blocking()

    @classmethod
    def of(cls, backend: Backend, tokenizer: Tokenizer) -> LLM:
        """Over a backend that is open already; closing this closes it."""
        llm = cls.__new__(cls)
        llm._llm = AsyncLLM.of(backend, tokenizer, Blocking())
        return llm

    @property
    def info(self) -> ModelInfo:
        """Architecture, sizes, backend and device."""
        return self._llm.info

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer."""
        return self._llm.tokenizer

    def stats(self) -> Stats:
        """What the backend is doing now."""
        return self._llm.stats()

    def tokenize(self, text: str, *, add_special: bool = True) -> list[int]:
        """Token ids; ``add_special`` puts the BOS (and EOS) that the model wants."""
        return self._llm.tokenize(text, add_special=add_special)

    def detokenize(self, ids: Sequence[int]) -> str:
        """Text of token ids, special tokens left out."""
        return self._llm.detokenize(ids)

    def apply_template(
        self,
        messages: Messages,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **options: Any,
    ) -> str:
        """The prompt that the model's chat template makes; ``options`` are the template's
        variables.
        """
        return self._llm.apply_template(messages, tools=tools, **options)

    @overload
    def generate(
        self, prompt: Prompt, *, stream: Literal[False] = ..., **sampling: Any
    ) -> Result: ...
    @overload
    def generate(
        self, prompt: Prompt, *, stream: Literal[True], **sampling: Any
    ) -> Iterator[Chunk]: ...
    @overload
    def generate(self, prompt: Sequence[Prompt], **sampling: Any) -> list[Result]: ...
    def generate(self, prompt: Any, *, stream: bool = False, **sampling: Any) -> Any:
        """Continue a prompt (text or token ids), or a list of prompts as one batch, results in
        order.

        ``sampling`` are the fields of ``SamplingParams``, or ``params=`` one of those. With
        ``stream=True`` an iterator of ``Chunk``; closing it cancels the request.
        """
        return _wait(self._llm.generate(prompt, stream=stream, **sampling))

    @overload
    def chat(
        self, messages: Messages, *, stream: Literal[False] = ..., **options: Any
    ) -> Result: ...
    @overload
    def chat(
        self, messages: Messages, *, stream: Literal[True], **options: Any
    ) -> Iterator[Chunk]: ...
    def chat(self, messages: Messages, *, stream: bool = False, **options: Any) -> Any:
        """Answer a conversation through the model's chat template.

        ``options``: ``tools`` (a list of function schemas), ``template_options`` (the template's
        variables), ``show_markers`` (see ``AsyncLLM.chat``) and those of ``generate``.
        """
        return _wait(self._llm.chat(messages, stream=stream, **options))

    def logits(self, ids: Sequence[int]) -> npt.NDArray[np.float32]:
        """Logits of every position, float32 ``[len(ids), vocab]``."""
        return drive(self._llm.logits(ids))

    def embed(self, texts: str | Sequence[str]) -> npt.NDArray[np.float32]:
        """Unit vectors (mean of the last hidden states), float32 ``[len(texts), hidden]``."""
        return drive(self._llm.embed(texts))

    def close(self) -> None:
        """Cancel what runs, join the thread, free the memory."""
        drive(self._llm.close())

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _load(model: str, settings: ModelSettings) -> tuple[Backend, Tokenizer]:
    files = resolve(model)
    tokenizer = Tokenizer.open(files.path)
    return open_backend(files, settings), tokenizer


def _wait(call: Coroutine[Any, Any, T] | AsyncIterator[T]) -> T | Iterator[T]:
    return drive(call) if isinstance(call, Coroutine) else iterate(call)
