"""OpenAI's responses through its own client, and the order of their events."""

from __future__ import annotations

import json
from typing import Any

import openai
import pydantic
import pytest

from rl_mlx.errors import EngineError

TOOL: Any = {
    "type": "function",
    "name": "weather",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>'


@pytest.fixture
def sdk(fake: Any) -> Any:
    with openai.OpenAI(base_url=f"{fake.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_a_response(fake: Any, sdk: Any) -> None:
    answer = sdk.responses.create(
        model="demo", input="hi", instructions="Be kind.", max_output_tokens=50, temperature=0.5,
        metadata={"a": "b"},
    )  # fmt: skip
    assert answer.output_text == "Hello there!"
    assert (answer.status, answer.metadata, answer.temperature) == ("completed", {"a": "b"}, 0.5)
    assert answer.usage.output_tokens == len(fake.tokenizer.encode("Hello there!"))
    assert fake.prompt() == "[system]Be kind.[user]hi[assistant]"
    answer = sdk.responses.create(model="demo", input="hi", max_output_tokens=1)
    assert answer.status == "incomplete"
    assert answer.incomplete_details.reason == "max_output_tokens"


def test_it_goes_on_from_a_response(fake: Any, sdk: Any) -> None:
    first = sdk.responses.create(model="demo", input="hi", instructions="Be kind.")
    second = sdk.responses.create(model="demo", input="more", previous_response_id=first.id)
    assert fake.prompt() == "[user]hi[assistant]Hello there![user]more[assistant]"
    sdk.responses.create(model="demo", input="x", previous_response_id=second.id, store=False)
    assert "[user]more[assistant]Hello there![user]x" in fake.prompt()
    kept = sdk.responses.create(model="demo", input="hi", store=False)
    for unknown in (kept.id, "resp_none"):
        with pytest.raises(openai.BadRequestError, match="previous_response_id"):
            sdk.responses.create(model="demo", input="more", previous_response_id=unknown)


def test_what_is_stored_has_a_limit(fake: Any, sdk: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fake.state, "STORED_SIZE", 2000, raising=False)
    long = [sdk.responses.create(model="demo", input="x" * 900).id for _ in range(3)]
    kept = fake.state.conversations
    assert long[0] not in kept
    assert long[2] in kept


def test_events_in_order(fake: Any, sdk: Any) -> None:
    fake.text = "<think>\nHm.\n</think>\n\nI will look.\n" + CALL
    events = list(sdk.responses.create(model="demo", input="hi", tools=[TOOL], stream=True))
    assert [e.sequence_number for e in events] == list(range(len(events)))
    kinds = [e.type.removeprefix("response.") for e in events]
    once = [k for i, k in enumerate(kinds) if i == 0 or kinds[i - 1] != k]
    text = ["content_part.added", "{0}.delta", "{0}.done", "content_part.done"]
    added, done = ["output_item.added"], ["output_item.done"]
    assert once == [
        "created", "in_progress",
        *added, *(t.format("reasoning_text") for t in text), *done,
        *added, *(t.format("output_text") for t in text), *done,
        *added, "function_call_arguments.delta", "function_call_arguments.done", *done,
        "completed",
    ]  # fmt: skip
    final = events[-1].response
    assert [item.type for item in final.output] == ["reasoning", "message", "function_call"]
    assert final.output_text == "I will look."
    assert json.loads(final.output[2].arguments) == {"city": "Paris"}
    assert final.usage.output_tokens_details.reasoning_tokens > 0
    deltas = [e.delta for e in events if e.type == "response.output_text.delta"]
    assert "".join(deltas) == final.output_text


def test_the_sdks_own_stream_reader(fake: Any, sdk: Any) -> None:
    with sdk.responses.stream(model="demo", input="hi") as stream:
        for _ in stream:
            pass
        assert stream.get_final_response().output_text == "Hello there!"


def test_results_and_thoughts_go_back(fake: Any, sdk: Any) -> None:
    fake.text = "<think>\nHm.\n</think>\n\n" + CALL
    first = sdk.responses.create(
        model="demo", input="hi", tools=[TOOL], include=["reasoning.encrypted_content"], store=False
    )
    thought, made = first.output
    assert thought.encrypted_content
    fake.text = "Sunny."
    result = {"type": "function_call_output", "call_id": made.call_id, "output": "sunny"}
    encrypted = {"type": "reasoning", "id": thought.id, "summary": [],
                 "encrypted_content": thought.encrypted_content}  # fmt: skip
    items: Any = [
        {"role": "user", "content": [{"type": "input_text", "text": "hi"}]},
        encrypted,
        made.model_dump(),
        result,
    ]
    answer = sdk.responses.create(model="demo", input=items)
    assert answer.output_text == "Sunny."
    assert '(thought: Hm.)<call weather {"city": "Paris"}>[tool]sunny' in fake.prompt()


class Answer(pydantic.BaseModel):
    ok: bool


def test_the_real_model_keeps_to_a_form(program: Any) -> None:
    with openai.OpenAI(base_url=f"{program.url}/v1", api_key="x", max_retries=0) as client:
        answer = client.responses.parse(
            model="demo", input="hi", text_format=Answer, max_output_tokens=300
        )
        assert isinstance(answer.output_parsed, Answer)
        forced = client.responses.create(
            model="demo", input="hi", tools=[TOOL], max_output_tokens=300,
            tool_choice={"type": "function", "name": "weather"},
        )  # fmt: skip
        assert forced.output[0].type == "function_call"


@pytest.mark.parametrize(
    ("more", "named"),
    [
        ({"background": True}, "background"),
        ({"truncation": "auto"}, "truncation"),
        ({"tools": [{"type": "web_search"}]}, "tools[0]"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input"),
        ({"input": []}, "input"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input_image"),
        ({"conversation": "x"}, "conversation"),
    ],
)
def test_what_cannot_be_honoured_is_named(client: Any, more: Any, named: str) -> None:
    reply = client.post("/v1/responses", json={"model": "demo", "input": "hi", **more})
    assert reply.status_code == 400, reply.text
    assert named in reply.json()["error"]["message"]


def test_a_failure_in_the_stream(fake: Any, sdk: Any) -> None:
    def fail(request: Any) -> Any:
        yield fake.tokenizer.encode("a")[0]
        raise EngineError("the device is gone")

    fake.reply = fail
    last = list(sdk.responses.create(model="demo", input="hi", stream=True))[-1]
    assert (last.type, last.message, last.code) == ("error", "the device is gone", "server_error")
