"""A server at a URL as a backend: llama-server, vLLM, SGLang, another rl-mlx, anything that speaks
OpenAI's API.

Prompts go as token ids, so templates and tokenizer are the same as everywhere; they are read from
the local model that the reference names. What a server cannot do (logits of every position) is
refused.
"""

from __future__ import annotations

import http.client
import json
import math
import os
import socket
import threading
import time
import urllib.parse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt

from rl_mlx.backends.base import Backend, Emit, Stats
from rl_mlx.errors import (
    BackendUnavailable,
    ContextOverflow,
    EngineError,
    InvalidRequest,
    ModelNotFound,
    QueueFull,
    RlMlxError,
)
from rl_mlx.settings import ModelSettings
from rl_mlx.store import ModelFiles
from rl_mlx.text.tokenizer import Tokenizer
from rl_mlx.types import (
    Event,
    Failed,
    Finished,
    FinishReason,
    ModelInfo,
    Request,
    SamplingParams,
    Timings,
    Token,
    TokenLogprob,
)

_DEFAULT_CONTEXT = 4096
_REASONS: dict[str, FinishReason] = {"length": "length"}


@dataclass(frozen=True, kw_only=True)
class RemoteOptions:
    """``backend_options`` of a server. ``api_key``: else ``$RL_MLX_API_KEY``; ``model``: its name
    there, else the first it lists; ``timeout``: seconds without a byte after which a request fails.
    """

    api_key: str | None = None
    model: str | None = None
    timeout: float = 600.0

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> RemoteOptions:
        """From a table; raises ``InvalidRequest`` for a name that is not known."""
        known = [f.name for f in fields(cls)]
        for name in options:
            if name not in known:
                raise InvalidRequest(
                    f"unknown option {name!r} of a server; known are {', '.join(known)}"
                )
        return cls(**options)


class Client:
    """HTTP with one server. Knows its address and key, and turns its errors into ours."""

    def __init__(self, url: str, options: RemoteOptions) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        parts = urllib.parse.urlsplit(self.url)
        if not parts.hostname:
            raise InvalidRequest(f"{url!r} is not the address of a server")
        self._parts = parts
        self._timeout = options.timeout
        key = options.api_key or os.environ.get("RL_MLX_API_KEY")
        self._headers = {"Content-Type": "application/json"}
        if key:
            self._headers["Authorization"] = f"Bearer {key}"

    def connection(self) -> http.client.HTTPConnection:
        """A new connection, not open yet."""
        secure = self._parts.scheme == "https"
        kind = http.client.HTTPSConnection if secure else http.client.HTTPConnection
        assert self._parts.hostname, "checked when the client was made"
        return kind(self._parts.hostname, self._parts.port, timeout=self._timeout)

    def send(
        self, connection: http.client.HTTPConnection, path: str, body: Mapping[str, Any] | None
    ) -> http.client.HTTPResponse:
        """GET, or POST of ``body``. Raises ``BackendUnavailable`` or what the status means."""
        data = None if body is None else json.dumps(body)
        method = "GET" if body is None else "POST"
        try:
            if connection.sock is None:
                connection.connect()
            connection.request(method, self._parts.path + path, data, self._headers)
            response = connection.getresponse()
        except (OSError, http.client.HTTPException) as error:
            raise BackendUnavailable(f"no server answers at {self.url}: {error}") from error
        if response.status != 200:
            with response:
                raise _error(self.url, response.status, response.read())
        return response

    def ask(self, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """One request and the JSON object that answers it."""
        connection = self.connection()
        try:
            with self.send(connection, path, body) as response:
                answer = json.loads(response.read())
        except ValueError as error:
            raise EngineError(f"{self.url}{path} did not answer with JSON") from error
        except (OSError, http.client.HTTPException) as error:
            raise BackendUnavailable(f"{self.url} broke off: {error}") from error
        finally:
            connection.close()
        if not isinstance(answer, dict):
            raise EngineError(f"{self.url}{path} did not answer with a JSON object")
        return answer


@dataclass(eq=False)
class _Call:
    """A request under way. Shutting its socket down is what cancels it, here and on the server."""

    connection: http.client.HTTPConnection
    socket: socket.socket | None = None
    cancelled: bool = False

    def open(self) -> None:
        """Connect; a connection forgets its socket when it hands out the response, so keep it."""
        self.connection.connect()
        self.socket = self.connection.sock
        if self.cancelled:  # meanwhile
            self.cancel()

    def cancel(self) -> None:
        """From any thread, at any time."""
        self.cancelled = True
        if self.socket is not None:
            try:
                self.socket.shutdown(socket.SHUT_RDWR)
            except OSError:
                return  # it is closed already


class RemoteBackend(Backend):
    """Requests to one model of a server, a thread each."""

    def __init__(self, client: Client, model: str, tokenizer: Tokenizer, info: ModelInfo) -> None:
        self.info = info
        self._client = client
        self._model = model
        self._tokenizer = tokenizer
        self._calls: dict[str, _Call] = {}
        self._threads: list[threading.Thread] = []
        self._lock = threading.Lock()
        self._closed = False

    @classmethod
    def open(cls, files: ModelFiles, settings: ModelSettings) -> RemoteBackend:
        """Ask the server what it serves. Raises ``BackendUnavailable`` or ``ModelNotFound``."""
        for name in ("draft", "kv_bits", "memory", "prefix_cache", "parallel", "dtype"):
            if getattr(settings, name) is not None:
                raise InvalidRequest(f"{name}= is the server's to set; leave it out")
        options = RemoteOptions.of(settings.backend_options)
        client = Client(settings.backend, options)
        models = client.ask("/v1/models").get("data") or []
        names = [m.get("id") for m in models]
        if not names or (options.model and options.model not in names):
            raise ModelNotFound(
                f"{client.url} serves {', '.join(map(str, names)) or 'no model'}, "
                f"not {options.model}"
            )
        chosen = next(m for m in models if options.model in {None, m.get("id")})
        tokenizer = Tokenizer.open(files.path)
        return cls(
            client, chosen["id"], tokenizer, _info(files, settings, client, chosen, tokenizer)
        )

    def submit(self, request: Request, emit: Emit) -> None:
        """See ``Backend.submit``."""
        if not request.prompt:
            raise InvalidRequest("the prompt is empty: it encodes to no tokens")
        room = self.info.context - len(request.prompt)
        if room < 1:
            raise ContextOverflow(
                f"the prompt has {len(request.prompt)} tokens and the context is "
                f"{self.info.context}; shorten it"
            )
        call = _Call(self._client.connection())
        with self._lock:
            if self._closed:
                raise EngineError("the model is closed")
            self._calls[request.id] = call
            self._threads = [t for t in self._threads if t.is_alive()]
            thread = threading.Thread(
                target=self._run, args=(request, emit, call, room), name="remote", daemon=True
            )
            self._threads.append(thread)
        thread.start()

    def _run(self, request: Request, emit: Emit, call: _Call, room: int) -> None:
        """The thread of one request: ends it with one terminal event, whatever happens."""
        wanted = request.params.max_tokens
        limit = room if wanted is None else min(wanted, room)
        stream = _Stream(self._tokenizer, request, emit, limit)
        try:
            if limit and not call.cancelled:
                call.open()
                body = payload(request, self._model, limit)
                with self._client.send(call.connection, "/v1/completions", body) as response:
                    stream.read(response)
            last: Event = Finished(
                "cancelled" if call.cancelled else stream.reason, stream.timings()
            )
        except Exception as error:  # noqa: BLE001  (a request has one terminal event, come what may)
            if call.cancelled:  # closing its connection is what made it fail
                last = Finished("cancelled", stream.timings())
            elif isinstance(error, RlMlxError):
                last = Failed(error)
            else:
                last = Failed(EngineError(f"{self._client.url} broke off: {error}"))
        call.connection.close()
        with self._lock:
            self._calls.pop(request.id, None)
        emit(last)

    def cancel(self, request_id: str) -> None:
        """See ``Backend.cancel``."""
        with self._lock:
            call = self._calls.get(request_id)
        if call is not None:
            call.cancel()

    def stats(self) -> Stats:
        """See ``Backend.stats``; a server's memory is not known."""
        return Stats(running=len(self._calls))

    def logits(self, ids: Sequence[int]) -> npt.NDArray[np.float32]:  # noqa: ARG002
        """Not to be had from a server."""
        raise EngineError("a server does not give logits of every position; use a local backend")

    def embed(self, ids: Sequence[int]) -> npt.NDArray[np.float32]:
        """See ``Backend.embed``; what is pooled, and how, is the server's choice."""
        body = {"model": self._model, "input": list(ids)}
        answer = self._client.ask("/v1/embeddings", body)
        try:
            vector = np.asarray(answer["data"][0]["embedding"], np.float32)
        except (LookupError, TypeError, ValueError) as error:
            raise EngineError(f"{self._client.url} gave no embedding: {error!r}") from error
        unit: npt.NDArray[np.float32] = vector / max(float(np.linalg.norm(vector)), 1e-12)
        return unit

    def close(self) -> None:
        """See ``Backend.close``."""
        with self._lock:
            self._closed = True
            calls, threads = list(self._calls), list(self._threads)
        for request_id in calls:
            self.cancel(request_id)
        for thread in threads:
            if thread is not threading.current_thread():
                thread.join()


class _Stream:
    """Server-sent events of one completion become tokens."""

    def __init__(self, tokenizer: Tokenizer, request: Request, emit: Emit, limit: int) -> None:
        self.reason: FinishReason = "length" if limit == 0 else "stop"
        self._tokenizer = tokenizer
        self._request = request
        self._emit = emit
        self._limit = limit
        self._made = 0
        self._submitted = time.perf_counter()
        self._first = self._last = 0.0

    def read(self, response: http.client.HTTPResponse) -> None:
        """Emit tokens until the server, a stop token or the limit ends the answer."""
        for data in _events(response):
            if "error" in data:
                raise EngineError(
                    f"the server failed: {data['error'].get('message', data['error'])}"
                )
            for choice in data.get("choices", ()):
                for token, logprob in self._tokens(choice):
                    if self._take(token, logprob):
                        return
                reason = choice.get("finish_reason")
                if reason:
                    self.reason = _REASONS.get(reason, "stop")

    def _take(self, token: int, logprob: TokenLogprob | None) -> bool:
        """Whether the answer ends here."""
        params = self._request.params
        self._last = time.perf_counter()
        self._first = self._first or self._last
        is_end = token in self._request.eos_ids and not params.ignore_eos
        if is_end or token in params.stop_token_ids:
            self.reason = "stop"
            return True
        self._made += 1
        self._emit(Token(token, logprob))
        if self._made >= self._limit:
            self.reason = "length"
        return self._made >= self._limit

    def _tokens(self, choice: Mapping[str, Any]) -> Iterator[tuple[int, TokenLogprob | None]]:
        ids, logprobs = choice.get("token_ids"), choice.get("logprobs") or {}
        if ids:  # vLLM
            values = logprobs.get("token_logprobs") or []
            wanted = self._request.params.logprobs is not None and len(values) == len(ids)
            for place, i in enumerate(ids):
                yield int(i), TokenLogprob(int(i), float(values[place])) if wanted else None
            return
        text = choice.get("text") or ""
        entries = logprobs.get("content") or ()
        # llama-server names the last id only where a character took several tokens.
        named = b"".join(self._tokenizer.token_bytes(e["id"]) for e in entries if "id" in e)
        if entries and named == text.encode():
            yield from ((int(e["id"]), self._logprob(e)) for e in entries)
        elif text:
            yield from ((i, None) for i in encode_exactly(self._tokenizer, text))

    def _logprob(self, entry: Mapping[str, Any]) -> TokenLogprob | None:
        count = self._request.params.logprobs
        if count is None:
            return None
        top = [(int(t["id"]), float(t["logprob"])) for t in entry.get("top_logprobs", ())]
        return TokenLogprob(int(entry["id"]), float(entry["logprob"]), tuple(top[:count]))

    def timings(self) -> Timings:
        """As seen from here: ``prefill`` is all until the first token came."""
        first = self._first or time.perf_counter()
        return Timings(
            prefill=first - self._submitted,
            decode=max(self._last - first, 0.0),
            prompt_tokens=len(self._request.prompt),
            generated=self._made,
            forwards=self._made,
        )


def payload(request: Request, model: str, limit: int) -> dict[str, Any]:
    """The body of a completion request: OpenAI's fields, and those of llama-server and vLLM that
    are not neutral.
    """
    params = request.params
    if params.grammar is not None:
        raise InvalidRequest(
            "a server at a URL cannot be held to a grammar through token prompts; leave grammar out"
        )
    body: dict[str, Any] = {
        "model": model,
        "prompt": list(request.prompt),
        "max_tokens": limit,
        "temperature": params.temperature,
        "stream": True,
        "return_token_ids": True,
        "logprobs": max(params.logprobs or 0, 1),
    }
    optional: dict[str, tuple[Any, Any]] = {
        "top_p": (params.top_p, 1.0),
        "top_k": (params.top_k, 0),
        "min_p": (params.min_p, 0.0),
        "frequency_penalty": (params.frequency_penalty, 0.0),
        "presence_penalty": (params.presence_penalty, 0.0),
        "repetition_penalty": (params.repetition_penalty, 1.0),
        "repeat_penalty": (params.repetition_penalty, 1.0),
        "ignore_eos": (params.ignore_eos, False),
        "seed": (params.seed, None),
        "stop_token_ids": (list(params.stop_token_ids), []),
        "logit_bias": ({str(t): b for t, b in params.logit_bias.items()}, {}),
    }
    body.update({name: value for name, (value, neutral) in optional.items() if value != neutral})
    if params.temperature > 0:
        body.update(_llamacpp_only(params))
    return body


def _llamacpp_only(params: SamplingParams) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if params.xtc_probability > 0:
        found |= {"xtc_probability": params.xtc_probability, "xtc_threshold": params.xtc_threshold}
    if params.dry_multiplier > 0:
        found |= {
            "dry_multiplier": params.dry_multiplier,
            "dry_base": params.dry_base,
            "dry_allowed_length": params.dry_allowed_length,
            "dry_penalty_last_n": params.dry_window,
        }
    return found


def encode_exactly(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids whose bytes are those of ``text``, for a piece from the middle of an answer.

    Some tokenizers put a space before a text; one that follows a line break gets none. Raises
    ``EngineError``.
    """
    for before in ("", "\n", "a"):
        head = tokenizer.encode(before, add_special=False) if before else []
        ids = tokenizer.encode(before + text, add_special=False)
        if ids[: len(head)] == head:
            ids = ids[len(head) :]
            if b"".join(tokenizer.token_bytes(i) for i in ids) == text.encode():
                return ids
    raise EngineError(f"the server's text {text!r} has no ids in this model's vocabulary")


def _events(response: http.client.HTTPResponse) -> Iterator[dict[str, Any]]:
    """The JSON of server-sent events, up to ``[DONE]``."""
    for line in response:
        if line.startswith(b"data:"):
            data = line[5:].strip()
            if data == b"[DONE]":
                return
            yield json.loads(data)


def _error(url: str, status: int, body: bytes) -> RlMlxError:
    try:
        error = json.loads(body)
        message = str(error.get("error", {}).get("message") or error.get("message") or error)
    except (ValueError, AttributeError):
        message = body.decode("utf-8", "replace")
    text = f"{url} refused ({status}): {' '.join(message.split())[:300]}"
    if status == 400:
        return ContextOverflow(text) if "context" in message else InvalidRequest(text)
    kinds = {401: BackendUnavailable, 404: ModelNotFound, 422: InvalidRequest, 429: QueueFull}
    return kinds.get(status, BackendUnavailable if status == 503 else EngineError)(text)


def _info(
    files: ModelFiles,
    settings: ModelSettings,
    client: Client,
    model: Mapping[str, Any],
    tokenizer: Tokenizer,
) -> ModelInfo:
    meta = model.get("meta") or {}
    context = model.get("max_model_len") or meta.get("n_ctx") or meta.get("n_ctx_train")
    parameters = int(meta.get("n_params") or 0)
    size = int(meta.get("size") or 0)
    return ModelInfo(
        name=str(model["id"]),
        path=str(files.path),
        architecture=str(model.get("owned_by") or ""),
        parameters=parameters,
        bits_per_weight=8 * size / parameters if parameters else math.nan,
        context=settings.context or int(context or _DEFAULT_CONTEXT),
        vocab=int(meta.get("n_vocab") or tokenizer.vocab_size),
        hidden=int(meta.get("n_embd") or 0),
        layers=0,
        backend=client.url,
        device="remote",
        dtype="",
        weight_bytes=size,
        kv_bytes_per_token=0,
        memory_budget=0,
    )
