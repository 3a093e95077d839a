"""Ollama's API through its own client."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import ollama
import pytest

from rl_mlx.errors import EngineError, ModelNotFound, RlMlxError
from rl_mlx.store import hub

HI: Any = [{"role": "user", "content": "hi"}]
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>'


def weather(city: str) -> str:
    """Says the weather.

    Args:
        city: where
    """
    return city


@pytest.fixture
def sdk(fake: Any) -> Iterator[ollama.Client]:
    with ollama.Client(host=fake.url) as client:
        yield client


@pytest.fixture(scope="module")
def real(program: Any) -> Iterator[ollama.Client]:
    with ollama.Client(host=program.url) as client:
        yield client


def test_chat(fake: Any, sdk: ollama.Client) -> None:
    answer = sdk.chat("demo", HI, options={"num_predict": 50, "seed": 3, "repeat_penalty": 1.25})
    assert answer.message.content == "Hello there!"
    assert (answer.done, answer.done_reason) == (True, "stop")
    assert answer.eval_count == len(fake.tokenizer.encode("Hello there!"))
    assert answer.total_duration > 0
    params = fake.requests[0].params
    assert (params.max_tokens, params.seed, params.repetition_penalty) == (50, 3, 1.25)
    assert (params.temperature, params.top_k, params.top_p, params.min_p) == (0.8, 40, 0.9, 0)
    assert params.penalty_window == 64
    sdk.chat("demo", HI, options={"num_predict": -1, "stop": ["x"], "repeat_last_n": -1})
    params = fake.requests[-1].params
    assert (params.max_tokens, params.stop) == (None, ("x",))
    assert params.penalty_window > 10**6


def test_chat_streams_by_default(fake: Any, client: httpx.Client, sdk: ollama.Client) -> None:
    fake.text = "<think>\nHm.\n</think>\n\nHi! " + CALL
    reply = client.post("/api/chat", json={"model": "demo", "messages": HI})
    assert reply.headers["content-type"] == "application/x-ndjson"
    lines = [json.loads(text) for text in reply.text.splitlines()]
    assert [entry["done"] for entry in lines] == [False] * (len(lines) - 1) + [True]
    parts = list(sdk.chat("demo", HI, stream=True, tools=[weather], think=True))
    assert "".join(p.message.content or "" for p in parts) == "Hi!"
    assert "".join(p.message.thinking or "" for p in parts) == "Hm."
    (made,) = [c for p in parts for c in p.message.tool_calls or ()]
    assert (made.function.name, made.function.arguments) == ("weather", {"city": "Paris"})
    assert parts[-1].done_reason == "stop"


def test_calls_and_results_go_back(fake: Any, sdk: ollama.Client) -> None:
    fake.text = CALL
    answer = sdk.chat("demo", HI, tools=[weather], think=False)
    assert "<think></think>" in fake.prompt()
    after = [*HI, answer.message, {"role": "tool", "tool_name": "weather", "content": "sunny"}]
    fake.text = "Sunny."
    assert sdk.chat("demo", after).message.content == "Sunny."
    assert '<call weather {"city": "Paris"}>[tool]sunny' in fake.prompt()


def test_async_chat(fake: Any) -> None:
    async def ask() -> str:
        async with ollama.AsyncClient(host=fake.url) as client:
            stream = await client.chat("demo", HI, stream=True)
            return "".join([part.message.content or "" async for part in stream])

    assert asyncio.run(ask()) == "Hello there!"


def test_generate(fake: Any, sdk: ollama.Client) -> None:
    answer = sdk.generate("demo", "hi", system="Be kind.")
    assert answer.response == "Hello there!"
    assert fake.prompt() == "[system]Be kind.[user]hi[assistant]"
    sdk.generate("demo", "more", context=answer.context)
    assert fake.prompt().startswith("[system]Be kind.[user]hi[assistant]Hello there![user]more")
    sdk.generate("demo", "as it is", raw=True)
    assert fake.prompt() == "as it is"
    parts = list(sdk.generate("demo", "hi", stream=True, logprobs=False))
    assert "".join(p.response for p in parts) == "Hello there!"
    assert parts[-1].context


def test_format(fake: Any, sdk: ollama.Client) -> None:
    sdk.chat("demo", HI, format="json")
    assert fake.requests[-1].params.grammar.kind == "json_object"
    sdk.chat("demo", HI, format={"type": "object"})
    assert fake.requests[-1].params.grammar.kind == "json_schema"


def test_the_real_model(real: ollama.Client) -> None:
    schema = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"],
              "additionalProperties": False}  # fmt: skip
    answer = real.chat("demo", HI, format=schema, options={"num_predict": 300})
    assert json.loads(answer.message.content)["ok"] in (True, False)
    answer = real.generate("demo", "Once", raw=True, options={"num_predict": 2}, logprobs=True)
    assert answer.done_reason == "length"
    assert "".join(p.token for p in answer.logprobs) == answer.response
    assert answer.eval_duration > 0
    vectors = real.embed("demo", ["a", "b"])
    assert len(vectors.embeddings) == 2
    assert vectors.prompt_eval_count == 2
    assert len(real.embeddings("demo", "a").embedding) == len(vectors.embeddings[0])


def test_the_library(real: ollama.Client) -> None:
    (entry,) = real.list().models
    assert entry.model == "demo"
    assert entry.details.format == "gguf"
    assert entry.size > 1000
    shown = real.show("demo")
    assert "im_start" in shown.template
    assert shown.modelinfo["general.architecture"] == entry.details.family
    assert shown.modelinfo["tokenizer.ggml.tokens"] == []
    assert "completion" in shown.capabilities
    (running,) = real.ps().models
    assert running.name == "demo"
    assert running.expires_at is None, "a model that was named stays"


def test_load_and_unload_on_demand(start_fake: Any) -> None:
    lazy = start_fake(models=(), keep_alive=None)
    with ollama.Client(host=lazy.url) as sdk:
        assert sdk.ps().models == []
        assert sdk.generate("demo", "").done_reason == "load"
        assert [m.name for m in sdk.ps().models] == ["demo"]
        assert sdk.generate("demo", "", keep_alive=0).done_reason == "unload"
        assert sdk.ps().models == []
        assert sdk.chat("demo:latest", HI[:0], keep_alive="10m").done_reason == "load"
        (running,) = sdk.ps().models
        assert running.expires_at is not None
        sdk.generate("demo", "", keep_alive=0.05)
        lazy.wait(lambda: not sdk.ps().models)


@pytest.mark.parametrize(
    ("path", "more", "named"),
    [
        ("generate", {"prompt": "x", "suffix": "y"}, "suffix"),
        ("generate", {"prompt": "x", "images": ["aGk="]}, "images"),
        ("generate", {"prompt": "x", "template": "y"}, "template"),
        ("generate", {"prompt": "x", "raw": True, "system": "y"}, "raw"),
        ("generate", {"prompt": "x", "options": {"mirostat": 1}}, "options.mirostat"),
        ("generate", {"prompt": "x", "options": {"num_ctx": 10**9}}, "num_ctx"),
        ("generate", {"prompt": "x", "keep_alive": "soon"}, "keep_alive"),
        ("chat", {"messages": HI, "format": "xml"}, "format"),
        ("chat", {"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        ("embed", {"input": "x", "dimensions": 5}, "dimensions"),
        ("pull", {"model": "llama3"}, "llama3"),
    ],
)
def test_what_cannot_be_honoured_is_named(
    client: httpx.Client, path: str, more: Any, named: str
) -> None:
    reply = client.post(f"/api/{path}", json={"model": "demo", "stream": False, **more}
                        if path not in ("embed",) else {"model": "demo", **more})  # fmt: skip
    assert reply.status_code == 400, reply.text
    assert named in reply.json()["error"]


def test_errors(fake: Any, sdk: ollama.Client, client: httpx.Client) -> None:
    with pytest.raises(ollama.ResponseError) as caught:
        sdk.chat("none", HI)
    assert caught.value.status_code == 404

    def fail(request: Any) -> Any:
        yield fake.tokenizer.encode("a")[0]
        raise EngineError("the device is gone")

    fake.reply = fail
    reply = client.post("/api/generate", json={"model": "demo", "prompt": "x"})
    assert json.loads(reply.text.splitlines()[-1]) == {"error": "the device is gone"}
    with pytest.raises(ollama.ResponseError):
        sdk.delete("none")


def test_pull_says_how_far_it_is(
    sdk: ollama.Client, client: httpx.Client, fake: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped = threading.Event()

    def download(ref: Any, bar: Any) -> None:
        if ref.repo == "org/none":
            raise ModelNotFound("huggingface.co has no model org/none")
        with bar(desc="model.gguf", total=10, initial=4) as shown:
            try:
                for _ in range(6):
                    time.sleep(0.2 if ref.repo == "org/slow" else 0)
                    shown.update(1)
            except RlMlxError:
                stopped.set()
                raise

    monkeypatch.setattr(hub, "download", download)
    entries = list(sdk.pull("org/repo:Q4_K_M", stream=True))
    assert entries[-1].status == "success"
    assert [(e.total, e.completed) for e in entries if e.digest] == [(10, 10)]
    assert sdk.pull("org/repo").status == "success"
    with pytest.raises(ollama.ResponseError, match="org/none"):
        sdk.pull("org/none")
    with client.stream("POST", "/api/pull", json={"model": "org/slow"}) as reply:
        next(reply.iter_lines())
    assert stopped.wait(5), "who leaves ends the download"
