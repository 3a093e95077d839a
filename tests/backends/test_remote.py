"""A server at a URL: llama.cpp's own, and one that says whatever a test wants."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from rl_mlx.backends import open_backend
from rl_mlx.backends.remote import (
    Client,
    RemoteBackend,
    RemoteOptions,
    _Call,
    encode_exactly,
    payload,
)
from rl_mlx.errors import (
    BackendUnavailable,
    ContextOverflow,
    EngineError,
    InvalidRequest,
    ModelNotFound,
    QueueFull,
)
from rl_mlx.settings import ModelSettings
from rl_mlx.store import ModelFiles
from rl_mlx.text.tokenizer import Tokenizer
from rl_mlx.types import Failed, Request, SamplingParams

pytestmark = pytest.mark.shared
MODELS = {"data": [{"id": "m", "max_model_len": 64}]}


class Stub:
    """An OpenAI server: ``reply(body)`` gives (status, JSON or a list of events); ``bodies`` were
    asked.
    """

    def __init__(self) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.reply: Callable[[dict[str, Any]], tuple[int, Any]] = lambda body: (200, [])
        self.models: tuple[int, Any] = (200, MODELS)
        stub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.answer(*stub.models)

            def do_POST(self) -> None:
                stub.headers.append(dict(self.headers))
                stub.bodies.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                self.answer(*stub.reply(stub.bodies[-1]))

            def answer(self, status: int, data: Any) -> None:
                self.send_response(status)
                self.end_headers()
                if not isinstance(data, list):
                    self.wfile.write(json.dumps(data).encode())
                    return
                for event in data:
                    text = event if isinstance(event, str) else json.dumps(event)
                    self.wfile.write(f"data: {text}\n\n".encode())

            def log_message(self, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def stub() -> Iterator[Stub]:
    server = Stub()
    yield server
    server.close()


@pytest.fixture
def remote(stub: Stub, stories: Path) -> Iterator[RemoteBackend]:
    backend = connect(stub.url, stories)
    yield backend
    backend.close()


def connect(url: str, path: Path, **options: Any) -> RemoteBackend:
    settings = ModelSettings(backend=url, backend_options=options)
    backend = open_backend(ModelFiles("m", path), settings)
    assert isinstance(backend, RemoteBackend)
    return backend


def chunk(text: str = "", reason: str | None = None, **more: Any) -> dict[str, Any]:
    return {"choices": [{"text": text, "finish_reason": reason, **more}]}


SERVER = """
import sys, xllamacpp
params = xllamacpp.CommonParams()
params.model.path, params.verbosity, params.n_ctx, params.n_parallel = sys.argv[1], 0, 256, 2
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
server = xllamacpp.Server(params)
print(server.listening_address, flush=True)
sys.stdin.read()
"""


@pytest.fixture
def llama_server(stories: Path) -> Iterator[str]:
    """The address of llama.cpp's own server, in a process of its own."""
    pytest.importorskip("xllamacpp")
    command = [sys.executable, "-c", SERVER, str(stories)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        yield process.stdout.readline().strip()
        process.kill()


def test_llama_cpp_s_own_server_answers_as_our_engine_does(
    llama_server: str, stories: Path, start: Any, ask: Any, open_model: Any
) -> None:
    backend = connect(llama_server, stories)
    try:
        assert (backend.info.context, backend.info.vocab, backend.info.parameters) == (
            128,
            512,
            292800,
        )
        local = open_model(stories, backend="llama.cpp", dtype=None)
        options: dict[str, Any] = {"max_tokens": 40, "logprobs": 2}
        ours, theirs = (ask(b, [1, 403], **options) for b in (local, backend))
        assert theirs.ids == ours.ids
        assert theirs.finished.reason == "length"
        for a, b in zip(ours.logprobs, theirs.logprobs, strict=True):
            assert math.isclose(a.logprob, b.logprob, abs_tol=1e-3)
            assert [t for t, _ in a.top] == [t for t, _ in b.top]
        assert ask(backend, [1], eos=[ours.ids[5]], max_tokens=40).finished.reason == "stop"
        call = start(backend, [1], temperature=1.0, ignore_eos=True)
        call.first()
        backend.cancel(call.id)
        assert call.reply().finished.reason == "cancelled"
    finally:
        backend.close()


def test_ids_that_the_server_gives_are_taken(stub: Stub, remote: RemoteBackend, ask: Any) -> None:
    stub.reply = lambda body: (
        200,
        [chunk("x", token_ids=[7, 8]), chunk("y", token_ids=[9]), "[DONE]"],
    )
    reply = ask(remote, [1, 5], max_tokens=10)
    assert reply.ids == [7, 8, 9]
    assert reply.finished.reason == "stop"
    assert reply.finished.timings.prompt_tokens == 2


def test_text_without_ids_becomes_ids_with_the_same_text(
    stub: Stub, remote: RemoteBackend, ask: Any, stories: Path
) -> None:
    pieces = [" upon", "up", "on a time", "\n", "日本 é", "  two", "."]
    stub.reply = lambda body: (200, [*map(chunk, pieces), chunk(reason="length"), "[DONE]"])
    reply = ask(remote, [1], max_tokens=60)
    tokenizer = Tokenizer.from_gguf(stories)
    assert tokenizer.decode(reply.ids, continues=True) == "".join(pieces)
    assert reply.finished.reason == "length"
    assert encode_exactly(tokenizer, "Once") != encode_exactly(tokenizer, " Once")


def test_stop_tokens_and_the_limit_hold_whatever_the_server_does(
    stub: Stub, remote: RemoteBackend, ask: Any
) -> None:
    stub.reply = lambda body: (200, [chunk(token_ids=[7, 8, 9, 10]), "[DONE]"])
    assert ask(remote, [1], stop_token_ids=(9,)).ids == [7, 8]
    limited = ask(remote, [1], max_tokens=3)
    assert (limited.ids, limited.finished.reason) == ([7, 8, 9], "length")
    asked = len(stub.bodies)
    assert ask(remote, [1], max_tokens=0).finished.reason == "length"
    assert len(stub.bodies) == asked
    with pytest.raises(ContextOverflow, match="64"):
        ask(remote, [1] * 64)


@pytest.mark.parametrize(
    ("status", "error"),
    [
        (400, InvalidRequest),
        (401, BackendUnavailable),
        (404, ModelNotFound),
        (429, QueueFull),
        (500, EngineError),
    ],
)
def test_refusals_become_our_errors(
    status: int, error: type[Exception], stub: Stub, remote: RemoteBackend, ask: Any
) -> None:
    stub.reply = lambda body: (status, {"error": {"message": "no\nway"}})
    (failed,) = ask(remote, [1]).events
    assert isinstance(failed, Failed)
    assert type(failed.error) is error
    assert "no way" in str(failed.error)


def test_a_stream_that_breaks_fails_its_request(
    stub: Stub, remote: RemoteBackend, ask: Any
) -> None:
    for bad in (["{"], [{"error": {"message": "boom"}}]):
        stub.reply = lambda body, bad=bad: (200, [chunk(token_ids=[7]), *bad])
        reply = ask(remote, [1])
        assert reply.ids == [7]
        assert isinstance(reply.events[-1], Failed)


def test_only_what_is_asked_for_is_sent() -> None:
    plain = Request(id="a", prompt=(1, 2), params=SamplingParams(temperature=0, min_p=0))
    assert payload(plain, "m", 5).keys() == {
        "model", "prompt", "max_tokens", "temperature", "stream", "return_token_ids", "logprobs",
    }  # fmt: skip
    rich = SamplingParams(
        temperature=0.5, top_k=3, seed=4, repetition_penalty=1.1, logit_bias={7: -1},
        xtc_probability=0.5, dry_multiplier=1, ignore_eos=True, stop_token_ids=(9,), logprobs=5,
    )  # fmt: skip
    body = payload(Request(id="a", prompt=(1,), params=rich), "m", 5)
    assert body["logit_bias"] == {"7": -1}
    assert body["repetition_penalty"] == body["repeat_penalty"] == 1.1
    assert (body["logprobs"], body["seed"], body["xtc_probability"]) == (5, 4, 0.5)
    assert body["dry_penalty_last_n"] == 1024


def test_opening_says_what_is_wrong(stub: Stub, stories: Path) -> None:
    with pytest.raises(ModelNotFound, match="serves m"):
        connect(stub.url, stories, model="other")
    with pytest.raises(InvalidRequest, match="known are api_key"):
        connect(stub.url, stories, gpu_layers=3)
    for option in ({"kv_bits": 8}, {"prefix_cache": "1GB"}, {"parallel": 2}):
        with pytest.raises(InvalidRequest, match=next(iter(option))):
            open_backend(ModelFiles("m", stories), ModelSettings(backend=stub.url, **option))
    with pytest.raises(BackendUnavailable, match="no server answers"):
        connect("http://127.0.0.1:9", stories)
    stub.models = (200, {"data": []})
    with pytest.raises(ModelNotFound, match="no model"):
        connect(stub.url, stories)


def test_keys_embeddings_and_what_there_is_not(stub: Stub, stories: Path) -> None:
    backend = connect(f"{stub.url}/v1/", stories, api_key="secret")
    stub.reply = lambda body: (200, {"data": [{"embedding": [3.0, 4.0]}]})
    assert backend.embed([1, 2]).tolist() == pytest.approx([0.6, 0.8])
    assert stub.headers[-1]["Authorization"] == "Bearer secret"
    with pytest.raises(EngineError, match="local backend"):
        backend.logits([1])
    backend.close()


def test_answers_that_make_no_sense_are_errors_of_ours(stub: Stub, stories: Path) -> None:
    backend = connect(stub.url, stories)
    for answer in ({}, {"data": []}, {"data": [{"embedding": "x"}]}, "text"):
        stub.reply = lambda body, answer=answer: (200, answer)
        with pytest.raises(EngineError, match=r"gave no embedding|JSON object"):
            backend.embed([1, 2])
    backend.close()
    stub.models = (200, "m")
    with pytest.raises(EngineError, match="JSON object"):
        connect(stub.url, stories)


def test_a_call_that_is_cancelled_while_it_connects_stays_cancelled(stub: Stub) -> None:
    call = _Call(Client(stub.url, RemoteOptions()).connection())
    call.cancel()  # there is no socket yet
    call.open()
    assert call.socket is not None
    with pytest.raises(BrokenPipeError):
        call.socket.sendall(b"GET")
    call.connection.close()
