"""Anthropic's API through its own client, and its events in the documented order."""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path
from typing import Any

import anthropic
import httpx
import pytest

from rl_mlx.errors import EngineError

TOOL: Any = {
    "name": "weather",
    "description": "Says the weather.",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}},
    "cache_control": {"type": "ephemeral"},
}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>'
KEEP_ALL = {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]}
HI: Any = [{"role": "user", "content": "hi"}]


@pytest.fixture
def sdk(fake: Any) -> Any:
    with anthropic.Anthropic(base_url=fake.url, api_key="none", max_retries=0) as client:
        yield client


def events_of(text: str) -> list[dict[str, Any]]:
    """The data of each event, whose name must be its type."""
    found = []
    for block in text.strip().split("\n\n"):
        if block.startswith(":"):
            continue
        name, content = block.split("\n", 1)
        value = json.loads(content.removeprefix("data: "))
        assert name == f"event: {value['type']}"
        found.append(value)
    return found


def shape(events: list[dict[str, Any]]) -> str:
    """The order of the events: pings left out, equal ones in a row as one."""
    names: list[str] = []
    for event in events:
        kind = event["type"]
        if kind == "content_block_delta":
            kind = event["delta"]["type"]
        if kind == "content_block_start":
            kind = f"start:{event['content_block']['type']}"
        if kind != "ping" and (not names or names[-1] != kind):
            names.append(kind)
    return " ".join(names)


def test_messages(fake: Any, sdk: Any) -> None:
    answer = sdk.messages.create(
        model="demo",
        max_tokens=100,
        system="Be kind.",
        messages=HI,
        extra_body={"temperature": 0.5, "top_k": 5, "context_management": KEEP_ALL},
    )
    assert [b.text for b in answer.content] == ["Hello there!"]
    assert (answer.stop_reason, answer.stop_sequence) == ("end_turn", None)
    assert answer.usage.input_tokens == len(fake.requests[0].prompt)
    assert answer.usage.output_tokens == len(fake.tokenizer.encode("Hello there!"))
    assert fake.prompt() == "[system]Be kind.[user]hi[assistant]"
    params = fake.requests[0].params
    assert (params.temperature, params.top_k, params.max_tokens) == (0.5, 5, 100)


def test_stop_reasons(fake: Any, sdk: Any) -> None:
    fake.text = "one two three"
    answer = sdk.messages.create(model="demo", max_tokens=9, messages=HI, stop_sequences=["thr"])
    assert (answer.stop_reason, answer.stop_sequence) == ("stop_sequence", "thr")
    assert answer.content[0].text == "one two "
    answer = sdk.messages.create(model="demo", max_tokens=1, messages=HI)
    assert answer.stop_reason == "max_tokens"


def test_a_tool_is_used_and_its_result_sent_back(fake: Any, sdk: Any) -> None:
    fake.text = "I will look.\n" + CALL
    answer = sdk.messages.create(model="demo", max_tokens=99, messages=HI, tools=[TOOL])
    assert answer.stop_reason == "tool_use"
    text, use = answer.content
    assert text.text == "I will look."
    assert (use.name, use.input) == ("weather", {"city": "Paris"})
    result = {
        "type": "tool_result",
        "tool_use_id": use.id,
        "content": [{"type": "text", "text": "sunny"}],
    }
    fake.text = "Sunny!"
    after = [*HI, {"role": "assistant", "content": answer.content},
             {"role": "user", "content": [result, {"type": "text", "text": "and?"}]}]  # fmt: skip
    answer = sdk.messages.create(model="demo", max_tokens=99, messages=after, tools=[TOOL])
    assert answer.content[0].text == "Sunny!"
    assert "I will look." in fake.prompt()
    assert '<call weather {"city": "Paris"}>[tool]sunny[user]and?[assistant]' in fake.prompt()


def test_thinking_blocks(fake: Any, sdk: Any) -> None:
    fake.text = "<think>\nHm.\n</think>\n\nYes."
    answer = sdk.messages.create(
        model="demo", max_tokens=2000, messages=HI,
        thinking={"type": "enabled", "budget_tokens": 1024},
    )  # fmt: skip
    thought, text = answer.content
    assert (thought.type, thought.thinking, text.text) == ("thinking", "Hm.", "Yes.")
    assert thought.signature
    after: Any = [*HI, {"role": "assistant", "content": answer.content}, *HI]
    sdk.messages.create(model="demo", max_tokens=9, messages=after, thinking={"type": "disabled"})
    assert "(thought: Hm.)" in fake.prompt()
    assert "<think></think>" in fake.prompt()


def test_streaming(fake: Any, sdk: Any) -> None:
    fake.text = "<think>\nHm.\n</think>\n\nI will look.\n" + CALL
    with sdk.messages.stream(model="demo", max_tokens=99, messages=HI, tools=[TOOL]) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_message()
    assert kinds[0] == "message_start"
    assert kinds[-1] == "message_stop"
    assert [b.type for b in final.content] == ["thinking", "text", "tool_use"]
    assert final.content[0].signature
    assert final.content[2].input == {"city": "Paris"}
    assert final.stop_reason == "tool_use"
    assert final.usage.output_tokens > 5


def test_the_events_come_in_the_documented_order(client: httpx.Client, fake: Any) -> None:
    fake.text = "<think>\nHm.\n</think>\n\nI will look.\n" + CALL + CALL
    body = {"model": "demo", "max_tokens": 400, "messages": HI, "tools": [TOOL], "stream": True}
    events = events_of(client.post("/v1/messages", json=body).text)
    block = "content_block_stop"
    use = f"start:tool_use input_json_delta {block}"
    assert shape(events) == (
        f"message_start start:thinking thinking_delta signature_delta {block} "
        f"start:text text_delta {block} {use} {use} message_delta message_stop"
    )
    starts = [e["index"] for e in events if e["type"] == "content_block_start"]
    assert starts == [0, 1, 2, 3]
    stops = [e["index"] for e in events if e["type"] == block]
    assert stops == starts


@pytest.mark.shared
@pytest.mark.parametrize("name", ["basic_response", "tool_use_response"])
def test_our_order_is_that_of_recorded_streams(
    shared: Path, client: httpx.Client, fake: Any, name: str
) -> None:
    recorded = (shared / f"api/anthropic/tests/lib/streaming/fixtures/{name}.txt").read_text()
    fake.text = "Hello!" if name == "basic_response" else "I will look.\n" + CALL
    body = {"model": "demo", "max_tokens": 99, "messages": HI, "tools": [TOOL], "stream": True}
    ours = events_of(client.post("/v1/messages", json=body).text)
    theirs = events_of(recorded)
    assert shape(ours) == shape(theirs)
    for kind in ("message_start", "message_delta"):
        mine, other = (next(e for e in found if e["type"] == kind) for found in (ours, theirs))
        part = mine.get("message", mine.get("delta"))
        assert set(other.get("message", other.get("delta"))) <= set(part)


def test_async_streaming(fake: Any) -> None:
    async def ask() -> str:
        async with (
            anthropic.AsyncAnthropic(base_url=fake.url, api_key="x") as client,
            client.messages.stream(model="demo", max_tokens=9, messages=HI) as stream,
        ):
            return "".join([text async for text in stream.text_stream])

    assert asyncio.run(ask()) == "Hello there!"


def test_count_tokens(fake: Any, sdk: Any) -> None:
    options: Any = {"model": "demo", "messages": HI, "system": "Be kind.", "tools": [TOOL]}
    counted = sdk.messages.count_tokens(**options)
    answer = sdk.messages.create(**options, max_tokens=1)
    assert counted.input_tokens == answer.usage.input_tokens > 5


def test_models(sdk: Any) -> None:
    (found,) = [m for m in sdk.models.list() if m.id == "demo"]
    assert found.display_name == "demo"
    assert sdk.models.retrieve("demo").type == "model"


def test_errors(fake: Any, sdk: Any, client: httpx.Client) -> None:
    with pytest.raises(anthropic.NotFoundError):
        sdk.messages.create(model="none", max_tokens=1, messages=HI)
    with pytest.raises(anthropic.BadRequestError, match="container"):
        sdk.messages.create(model="demo", max_tokens=1, messages=HI, extra_body={"container": "x"})
    reply = client.post("/v1/messages", json={"model": "demo", "messages": HI})
    assert reply.status_code == 400
    assert reply.json()["type"] == "error"
    assert reply.json()["error"]["type"] == "invalid_request_error"
    assert re.search("max_tokens", reply.json()["error"]["message"])

    def fail(request: Any) -> Any:
        yield fake.tokenizer.encode("a")[0]
        raise EngineError("the device is gone")

    fake.reply = fail
    body = {"model": "demo", "max_tokens": 9, "messages": HI, "stream": True}
    last = events_of(client.post("/v1/messages", json=body).text)[-1]
    assert last["type"] == "error"
    assert last["error"] == {"type": "api_error", "message": "the device is gone"}
    with pytest.raises(anthropic.APIStatusError):
        list(sdk.messages.create(**body))


@pytest.mark.parametrize(
    ("more", "named"),
    [
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, "image"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools[0].type"),
        ({"tool_choice": {"type": "any"}}, "tool_choice"),
        ({"tool_choice": {"type": "tool", "name": "x"}, "tools": [TOOL]}, "tool_choice.name"),
        ({"mcp_servers": []}, "mcp_servers"),
        (
            {"context_management": {"edits": [{"type": "clear_tool_uses_20250919"}]}},
            "context_management.edits[0].type",
        ),
        ({"temperature": 2}, "temperature"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"thinking": {"type": "enabled"}}, "budget_tokens"),
    ],
)
def test_what_cannot_be_honoured_is_named(client: httpx.Client, more: Any, named: str) -> None:
    body = {"model": "demo", "max_tokens": 5, "messages": HI, **more}
    reply = client.post("/v1/messages", json=body)
    assert reply.status_code == 400, reply.text
    assert named in reply.json()["error"]["message"]
