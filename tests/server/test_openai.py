"""OpenAI's API through its own client."""

from __future__ import annotations

import asyncio
import base64
import json
from typing import Any

import httpx
import numpy as np
import openai
import pytest

TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Says the weather.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}},
            "required": ["city"],
        },
    },
}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>'
HI: Any = [{"role": "user", "content": "hi"}]


@pytest.fixture
def sdk(fake: Any) -> Any:
    with openai.OpenAI(base_url=f"{fake.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def real(program: Any) -> Any:
    with openai.OpenAI(base_url=f"{program.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_chat(fake: Any, sdk: Any) -> None:
    answer = sdk.chat.completions.create(model="demo", messages=HI, user="u", temperature=0.5)
    assert answer.choices[0].message.content == "Hello there!"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.object == "chat.completion"
    assert answer.usage.completion_tokens == len(fake.tokenizer.encode("Hello there!"))
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert fake.prompt() == "[user]hi[assistant]"
    assert answer._request_id


def test_chat_streams_the_same(fake: Any, sdk: Any) -> None:
    fake.text = "Grüße, 日本! 👋"
    stream = sdk.chat.completions.create(
        model="demo", messages=HI, stream=True, stream_options={"include_usage": True}, n=2
    )
    chunks = list(stream)
    for index in range(2):
        mine = [c.choices[0] for c in chunks if c.choices and c.choices[0].index == index]
        assert mine[0].delta.role == "assistant"
        assert "".join(c.delta.content or "" for c in mine) == fake.text
        assert [c.finish_reason for c in mine if c.finish_reason] == ["stop"]
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == 2 * len(fake.tokenizer.encode(fake.text))
    assert len({c.id for c in chunks}) == 1


def test_async_chat_many_at_once(fake: Any) -> None:
    async def ask() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{fake.url}/v1", api_key="x") as client:

            async def one() -> str:
                stream = await client.chat.completions.create(
                    model="demo", messages=HI, stream=True
                )
                return "".join([c.choices[0].delta.content or "" async for c in stream])

            return await asyncio.gather(*(one() for _ in range(20)))

    assert set(asyncio.run(ask())) == {"Hello there!"}


def test_options_reach_the_sampler(fake: Any, sdk: Any) -> None:
    sdk.chat.completions.create(
        model="demo", messages=HI, temperature=0.25, top_p=0.5, frequency_penalty=0.5,
        presence_penalty=-0.5, seed=7, stop=["END"], logit_bias={"5": -100}, n=2,
        max_completion_tokens=5, extra_body={"top_k": 3, "min_p": 0.125, "repetition_penalty": 1.5},
    )  # fmt: skip
    params = [r.params for r in fake.requests]
    assert {p.seed for p in params} == {7, 8}, "the answers must differ, and be repeatable"
    first = params[0]
    assert (first.temperature, first.top_p, first.top_k, first.min_p) == (0.25, 0.5, 3, 0.125)
    assert (first.frequency_penalty, first.presence_penalty) == (0.5, -0.5)
    assert (first.repetition_penalty, first.stop, first.max_tokens) == (1.5, ("END",), 5)
    assert first.logit_bias == {5: -100}


def test_defaults_are_the_documents(fake: Any, sdk: Any) -> None:
    sdk.chat.completions.create(model="demo", messages=HI)
    params = fake.requests[0].params
    assert (params.temperature, params.top_p, params.min_p, params.top_k) == (1.0, 1.0, 0.0, 0)


def test_stop_and_length(fake: Any, sdk: Any) -> None:
    fake.text = "one two three four"
    answer = sdk.chat.completions.create(model="demo", messages=HI, stop="three")
    assert answer.choices[0].message.content == "one two "
    assert answer.choices[0].finish_reason == "stop"
    answer = sdk.chat.completions.create(model="demo", messages=HI, max_tokens=1)
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 1


def test_a_call_of_a_tool(fake: Any, sdk: Any) -> None:
    fake.text = "I will look.\n" + CALL
    answer = sdk.chat.completions.create(model="demo", messages=HI, tools=[TOOL])
    choice = answer.choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == "I will look."
    (made,) = choice.message.tool_calls
    assert made.function.name == "weather"
    assert json.loads(made.function.arguments) == {"city": "Paris"}
    assert "weather" in fake.prompt()
    after: Any = [
        *HI,
        choice.message.model_dump(exclude_none=True),
        {"role": "tool", "tool_call_id": made.id, "content": "sunny"},
    ]
    fake.text = "It is sunny."
    answer = sdk.chat.completions.create(model="demo", messages=after, tools=[TOOL])
    assert answer.choices[0].message.content == "It is sunny."
    assert '<call weather {"city": "Paris"}>[tool]sunny' in fake.prompt()


def test_calls_stream_as_deltas(fake: Any, sdk: Any) -> None:
    fake.text = CALL + "\n" + CALL.replace("Paris", "Rome")
    calls: dict[int, dict[str, str]] = {}
    finish = None
    for chunk in sdk.chat.completions.create(model="demo", messages=HI, tools=[TOOL], stream=True):
        choice = chunk.choices[0]
        assert not choice.delta.content, "nothing of a call may leak into content"
        finish = choice.finish_reason or finish
        for part in choice.delta.tool_calls or ():
            entry = calls.setdefault(part.index, {"name": "", "arguments": "", "id": ""})
            entry["name"] += part.function.name or ""
            entry["id"] += part.id or ""
            entry["arguments"] += part.function.arguments or ""
    assert finish == "tool_calls"
    assert [json.loads(c["arguments"])["city"] for c in calls.values()] == ["Paris", "Rome"]
    assert [c["name"] for c in calls.values()] == ["weather", "weather"]
    assert calls[0]["id"] != calls[1]["id"]


def test_one_call_at_a_time(fake: Any, sdk: Any) -> None:
    fake.text = CALL + "\n" + CALL
    answer = sdk.chat.completions.create(
        model="demo", messages=HI, tools=[TOOL], parallel_tool_calls=False
    )
    assert len(answer.choices[0].message.tool_calls) == 1
    assert answer.choices[0].finish_reason == "tool_calls"


def test_no_tools_and_what_looks_like_a_call_stays_text(fake: Any, sdk: Any) -> None:
    fake.text = CALL
    for options in ({}, {"tools": [TOOL], "tool_choice": "none"}):
        answer = sdk.chat.completions.create(model="demo", messages=HI, **options)
        assert answer.choices[0].message.content == CALL
        assert answer.choices[0].message.tool_calls is None
        assert "weather" not in fake.prompt()


def test_reasoning_is_told_apart(fake: Any, sdk: Any) -> None:
    fake.text = "<think>\nLet me see.\n</think>\n\nForty-two."
    answer = sdk.chat.completions.create(model="demo", messages=HI, reasoning_effort="high")
    assert answer.choices[0].message.content == "Forty-two."
    assert answer.choices[0].message.reasoning_content == "Let me see."
    assert answer.usage.completion_tokens_details.reasoning_tokens > 0
    streamed = list(sdk.chat.completions.create(model="demo", messages=HI, stream=True))
    deltas = [c.choices[0].delta for c in streamed]
    thought = "".join(getattr(d, "reasoning_content", None) or "" for d in deltas)
    assert thought == "Let me see."
    assert "".join(d.content or "" for d in deltas) == "Forty-two."
    sdk.chat.completions.create(model="demo", messages=HI, reasoning_effort="none")
    assert "<think></think>" in fake.prompt()


def test_content_in_parts_and_developer(fake: Any, sdk: Any) -> None:
    parts: Any = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages: Any = [
        {"role": "developer", "content": "be kind"},
        {"role": "user", "content": parts},
    ]
    sdk.chat.completions.create(model="demo", messages=messages)
    assert fake.prompt() == "[system]be kind[user]a\nb[assistant]"


@pytest.mark.parametrize(
    ("more", "named"),
    [
        ({"prediction": {"type": "content", "content": "x"}}, "prediction"),
        ({"store": True}, "store"),
        ({"service_tier": "flex"}, "service_tier"),
        ({"modalities": ["audio"]}, "modalities[0]"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"n": 0}, "n"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"999999": 1}}, "logit_bias"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages[0]"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "image_url"),
        ({"messages": [{"role": "king", "content": "x"}]}, "messages[0].role"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
    ],
)
def test_what_cannot_be_honoured_is_named(client: httpx.Client, more: Any, named: str) -> None:
    body = {"model": "demo", "messages": HI, **more}
    reply = client.post("/v1/chat/completions", json=body)
    assert reply.status_code == 400, reply.text
    error = reply.json()["error"]
    assert named in error["message"]
    assert error["type"] == "invalid_request_error"


def test_the_sdk_knows_our_errors(fake: Any, sdk: Any) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        sdk.chat.completions.create(model="no-such", messages=HI)
    assert caught.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as bad:
        sdk.chat.completions.create(model="demo", messages=HI, extra_body={"foo": 1})
    assert bad.value.param == "foo"


def test_completions(fake: Any, sdk: Any) -> None:
    fake.text = " upon a time"
    answer = sdk.completions.create(model="demo", prompt="Once", max_tokens=50, echo=True)
    assert answer.choices[0].text == "Once upon a time"
    ids = fake.tokenizer.encode("Once")
    answer = sdk.completions.create(model="demo", prompt=[ids, ids], n=2)
    assert [c.index for c in answer.choices] == [0, 1, 2, 3]
    assert answer.usage.prompt_tokens == 2 * len(ids)
    assert fake.requests[-1].params.max_tokens == 16, "OpenAI's default"
    stream = sdk.completions.create(model="demo", prompt=["a", "b"], stream=True, echo=True)
    texts = {0: "", 1: ""}
    for chunk in stream:
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == {0: "a upon a time", 1: "b upon a time"}


def test_completions_refuse_suffix_and_best_of(client: httpx.Client) -> None:
    for more in ({"suffix": "end"}, {"best_of": 3}):
        reply = client.post("/v1/completions", json={"model": "demo", "prompt": "x", **more})
        assert reply.status_code == 400
        assert next(iter(more)) in reply.json()["error"]["message"]


def test_the_real_model_greedily(real: Any) -> None:
    options: Any = {"model": "demo", "prompt": "Once upon a", "max_tokens": 4, "temperature": 0}
    first = real.completions.create(**options, logprobs=2)
    again = "".join(c.choices[0].text for c in real.completions.create(**options, stream=True))
    assert first.choices[0].text == again
    found = first.choices[0].logprobs
    assert "".join(found.tokens) == first.choices[0].text
    assert all(len(top) == 2 for top in found.top_logprobs)
    assert all(max(t.values()) == p for t, p in zip(found.top_logprobs, found.token_logprobs))
    echoed = real.completions.create(**{**options, "max_tokens": 0}, logprobs=1, echo=True)
    logprobs = echoed.choices[0].logprobs
    assert echoed.choices[0].text == "Once upon a"
    assert logprobs.token_logprobs[0] is None
    assert all(p <= 0 for p in logprobs.token_logprobs[1:])


def test_the_real_model_chats_with_logprobs(real: Any) -> None:
    answer = real.chat.completions.create(
        model="demo", messages=HI, max_tokens=3, logprobs=True, top_logprobs=2, seed=1
    )
    content = answer.choices[0].logprobs.content
    assert len(content) == 3
    assert "".join(t.token for t in content) == answer.choices[0].message.content
    assert bytes(content[0].bytes).decode() == content[0].token
    stream = real.chat.completions.create(
        model="demo", messages=HI, max_tokens=3, logprobs=True, top_logprobs=2, seed=1, stream=True
    )
    found = [t for c in stream if c.choices[0].logprobs for t in c.choices[0].logprobs.content]
    assert [t.token for t in found] == [t.token for t in content]


def test_embeddings(real: Any) -> None:
    answer = real.embeddings.create(model="demo", input=["a dog", "a cat"])  # base64 by itself
    vectors = np.array([d.embedding for d in answer.data])
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    plain = real.embeddings.create(model="demo", input="a dog", encoding_format="float")
    np.testing.assert_allclose(plain.data[0].embedding, vectors[0], atol=1e-6)
    with pytest.raises(openai.BadRequestError, match="dimensions"):
        real.embeddings.create(model="demo", input="a", dimensions=2)


def test_base64_is_little_endian_float32(program: Any) -> None:
    body = {"model": "demo", "input": "a dog"}
    with httpx.Client(base_url=program.url) as client:
        plain = client.post("/v1/embeddings", json=body).json()["data"][0]["embedding"]
        coded = client.post("/v1/embeddings", json={**body, "encoding_format": "base64"}).json()
    raw = base64.b64decode(coded["data"][0]["embedding"])
    np.testing.assert_allclose(np.frombuffer(raw, "<f4"), plain, atol=1e-6)


def test_models(fake: Any, sdk: Any) -> None:
    names = {m.id for m in sdk.models.list()}
    assert {"demo", "mini"} <= names
    assert sdk.models.retrieve("demo").id == "demo"
    with pytest.raises(openai.NotFoundError):
        sdk.models.retrieve("org/none")
    answer = sdk.chat.completions.create(model="gpt-4o-mini", messages=HI)
    assert answer.model == "gpt-4o-mini"
    assert fake.requests, "a pattern of the alias map"
