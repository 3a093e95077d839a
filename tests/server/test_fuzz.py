"""Bodies that nobody should send: each gets a 4xx in the shape of its API, never a 5xx."""

from __future__ import annotations

import json
import os
import re
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rl_mlx.server.app import routes

FUZZ = int(os.environ.get("RL_MLX_FUZZ", "0"))
"""How many bodies of a kind are tried; 0: a few."""
HI: Any = [{"role": "user", "content": "hi"}]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
GOOD: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {
        "model": "demo", "messages": HI, "temperature": 1, "n": 1, "stop": ["x"], "seed": 1,
        "logit_bias": {"1": 1}, "tools": [TOOL], "tool_choice": "auto", "logprobs": True,
        "top_logprobs": 1, "stream": False, "stream_options": {}, "max_tokens": 2,
        "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {}}},
        "chat_template_kwargs": {}, "keep_alive": "5m", "stop_token_ids": [1],
    },
    "/v1/completions": {
        "model": "demo", "prompt": "x", "n": 1, "logprobs": 1, "echo": False, "stop": "x",
        "max_tokens": 2, "seed": 1, "top_p": 0.5,
    },
    "/v1/responses": {
        "model": "demo", "input": [{"role": "user", "content": "x"}], "instructions": "x",
        "text": {"format": {"type": "text"}}, "reasoning": {"effort": "none"},
        "max_output_tokens": 2, "tools": [{"type": "function", "name": "f"}],
    },
    "/v1/embeddings": {"model": "demo", "input": ["x"], "encoding_format": "float"},
    "/v1/messages": {
        "model": "demo", "max_tokens": 2, "messages": HI, "system": "x", "top_k": 1,
        "stop_sequences": ["x"], "tools": [{"name": "f", "input_schema": {"type": "object"}}],
        "tool_choice": {"type": "auto"}, "thinking": {"type": "disabled"},
    },
    "/v1/messages/count_tokens": {"model": "demo", "messages": HI},
    "/api/generate": {
        "model": "demo", "prompt": "x", "stream": False, "options": {"num_predict": 2},
        "format": "", "context": [1], "system": "x", "keep_alive": 5,
    },
    "/api/chat": {"model": "demo", "messages": HI, "stream": False, "options": {"num_predict": 2}},
    "/api/embed": {"model": "demo", "input": "x"},
    "/api/embeddings": {"model": "demo", "prompt": "x"},
    "/api/show": {"model": "demo", "verbose": False},
    "/api/pull": {"model": "demo", "stream": False},
}  # fmt: skip

numbers = st.sampled_from([0, -1, 1, 2**31, 2**63, 2**64, -(2**63), 10**30, 1e308, -0.5, 1e-320])
texts = st.sampled_from(["", "x", "\ud800", "\x00", "日本", "<|im_end|>", "a" * 5000, "../../etc"])
values = st.recursive(
    st.none() | st.booleans() | numbers | texts | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["type", "role", "content", "name", "x"]), inner, max_size=3
        )
    ),
    max_leaves=6,
)


@pytest.fixture(scope="module")
def asks(shared_fake: Any) -> Any:
    shared_fake.reply = lambda request: []
    with httpx.Client(base_url=shared_fake.url, timeout=20) as client:

        def ask(path: str, content: bytes) -> None:
            method = "DELETE" if path == "/api/delete" else "POST"
            reply = client.request(method, path, content=content)
            # The fake has no embeddings, and says so by a 500.
            if path.startswith(("/v1/embeddings", "/api/embed")) and "fake backend" in reply.text:
                return
            assert reply.status_code < 500, (path, content[:500], reply.text)
            if reply.status_code >= 400:
                check_shape(path, reply.json())

        yield ask
    shared_fake.reply = None


def check_shape(path: str, body: Any) -> None:
    error = body["error"]
    if path.startswith("/api/"):
        assert isinstance(error, str)
        return
    assert isinstance(error["message"], str)
    assert isinstance(error["type"], str)
    if path.startswith("/v1/messages"):
        assert body["type"] == "error"


def places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in a body."""
    found = [at] if at else []
    if isinstance(value, (dict, list)):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            found += places(inner, (*at, key))
    return found


def near(value: Any) -> st.SearchStrategy[Any]:
    """Values of the same type, half of the time, and of any."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return values
    return values | (texts | st.text(max_size=5) if isinstance(value, str) else numbers)


def at_place(body: Any, at: tuple[Any, ...]) -> Any:
    for key in at:
        body = body[key]
    return body


def put(body: Any, at: tuple[Any, ...], value: Any) -> Any:
    copy = json.loads(json.dumps(body))
    node = copy
    for key in at[:-1]:
        node = node[key]
    node[at[-1]] = value
    return copy


def encode(value: Any) -> bytes:
    return json.dumps(value).encode("utf-8", "surrogatepass")


def test_the_document_describes_every_route(shared_fake: Any) -> None:
    found = httpx.get(shared_fake.url + "/openapi.json").json()
    text = json.dumps(found)
    for name in re.findall(r'"#/components/schemas/([^"]+)"', text):
        assert name in found["components"]["schemas"]
    for path in GOOD:
        body = found["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
        schema = found["components"]["schemas"][body["$ref"].rpartition("/")[2]]
        assert set(GOOD[path]) <= set(schema["properties"]), path


def test_every_route_is_fuzzed() -> None:
    posts = {r.path for r in routes() if r.methods and "POST" in r.methods}
    assert posts == set(GOOD)


@pytest.mark.parametrize("path", GOOD)
def test_what_is_good_is_taken(shared_fake: Any, path: str) -> None:
    if path in ("/api/pull", "/v1/embeddings", "/api/embed", "/api/embeddings"):
        return  # need the network, or a real model
    shared_fake.reply = None
    reply = httpx.post(shared_fake.url + path, json=GOOD[path])
    assert reply.status_code == 200, reply.text


@settings(
    max_examples=FUZZ or 500, deadline=None, derandomize=True, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip
@given(data=st.data())
def test_one_value_is_wrong(asks: Any, data: st.DataObject) -> None:
    path = data.draw(st.sampled_from(sorted(set(GOOD) - {"/api/pull"})))
    at = data.draw(st.sampled_from(places(GOOD[path])))
    asks(path, encode(put(GOOD[path], at, data.draw(near(at_place(GOOD[path], at))))))


@settings(
    max_examples=FUZZ or 100, deadline=None, derandomize=True, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip
@given(data=st.data())
def test_bytes_are_wrong(asks: Any, data: st.DataObject) -> None:
    path = data.draw(st.sampled_from(sorted(GOOD)))
    content = bytearray(encode(GOOD[path]))
    kind = data.draw(st.sampled_from(["cut", "flip", "noise"]))
    if kind == "cut":
        del content[data.draw(st.integers(0, len(content) - 1)) :]
    elif kind == "flip":
        content[data.draw(st.integers(0, len(content) - 1))] ^= 0x80
    else:
        content = bytearray(data.draw(st.binary(max_size=50)))
    asks(path, bytes(content))


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages", "/api/chat"])
@pytest.mark.parametrize(
    "content",
    [
        b"", b"null", b"[]", b"1e999", b'{"model": NaN}', b'{"model": Infinity}',
        b'{"a":' * 50_000 + b"1" + b"}" * 50_000, b"[" * 200_000,
        b'{"messages": ' + b"[" * 500 + b"]" * 500 + b"}",
        b'{"model": "' + b"x" * 50_000_000 + b'"}', b'{"max_tokens": ' + b"9" * 5000 + b"}",
        b"\xff\xfe{\x00}\x00", b'{"model": "\xed\xa0\x80"}', b'{"model": "demo", "model": "demo"}',
        b'{"model": "\\ud800", "messages": [{"role": "user", "content": "\\udfff"}]}',
    ],
    ids=range(15),
)  # fmt: skip
def test_monsters(asks: Any, path: str, content: bytes) -> None:
    asks(path, content)
