"""Structured output and forced calls, from the real (and untaught) model through the SDKs."""

from __future__ import annotations

import json
import re
from typing import Any

import anthropic
import openai
import pydantic
import pytest

HI: Any = [{"role": "user", "content": "Tell me a story."}]
TOOLS: Any = [
    {
        "type": "function",
        "function": {
            "name": name,
            "parameters": {
                "type": "object",
                "properties": {"day": {"enum": ["today", "tomorrow"]}},
                "required": ["day"],
                "additionalProperties": False,
            },
        },
    }
    for name in ("weather", "tides")
]


@pytest.fixture(scope="module")
def real(program: Any) -> Any:
    with openai.OpenAI(base_url=f"{program.url}/v1", api_key="none", max_retries=0) as client:
        yield client


class Story(pydantic.BaseModel):
    hero: pydantic.constr(max_length=3)  # type: ignore[valid-type]
    brave: bool


def test_json_schema(real: Any) -> None:
    answer = real.chat.completions.parse(
        model="demo", messages=HI, response_format=Story, max_tokens=300, seed=1
    )
    assert answer.choices[0].finish_reason == "stop"
    assert isinstance(answer.choices[0].message.parsed, Story)


def test_json_object_streams_and_a_cut_says_so(real: Any) -> None:
    stream = real.chat.completions.create(
        model="demo", messages=HI, response_format={"type": "json_object"}, max_tokens=4,
        stream=True, temperature=0,
    )  # fmt: skip
    chunks = list(stream)
    assert "".join(c.choices[0].delta.content or "" for c in chunks).startswith("{")
    assert chunks[-1].choices[0].finish_reason in {"length", "stop"}


def test_regex_and_grammar(real: Any) -> None:
    for form, fits in (
        ({"type": "regex", "regex": "[0-9]{3}/[a-c]"}, "[0-9]{3}/[a-c]"),
        ({"type": "grammar", "grammar": 'start: ("yes" | "no") "!"'}, "(yes|no)!"),
        ({"type": "grammar", "syntax": "gbnf", "grammar": 'root ::= "a" | "b"'}, "a|b"),
    ):
        answer = real.chat.completions.create(
            model="demo", messages=HI, response_format=form, max_tokens=300
        )
        assert re.fullmatch(fits, answer.choices[0].message.content)


def test_what_is_not_supported_is_named(real: Any) -> None:
    schema = {"type": "object", "properties": {"a": {"not": {"type": "string"}}}}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    with pytest.raises(openai.BadRequestError, match="/properties/a/not"):
        real.chat.completions.create(model="demo", messages=HI, response_format=form)


def test_a_call_is_forced(real: Any) -> None:
    answer = real.chat.completions.create(
        model="demo", messages=HI, tools=TOOLS, max_tokens=300,
        tool_choice={"type": "function", "function": {"name": "tides"}},
    )  # fmt: skip
    choice = answer.choices[0]
    assert choice.finish_reason == "tool_calls"
    (made,) = choice.message.tool_calls
    assert made.function.name == "tides"
    assert json.loads(made.function.arguments)["day"] in {"today", "tomorrow"}
    assert not choice.message.content


def test_some_call_is_forced_in_a_stream(real: Any) -> None:
    stream = real.chat.completions.create(
        model="demo", messages=HI, tools=TOOLS, max_tokens=300, tool_choice="required",
        parallel_tool_calls=False, stream=True,
    )  # fmt: skip
    deltas = [p.function for c in stream for p in c.choices[0].delta.tool_calls or ()]
    assert "".join(d.name or "" for d in deltas) in {"weather", "tides"}
    assert json.loads("".join(d.arguments or "" for d in deltas))["day"] in {"today", "tomorrow"}


def test_anthropic_forces_a_call(program: Any) -> None:
    tools: Any = [
        {"name": t["function"]["name"], "input_schema": t["function"]["parameters"]} for t in TOOLS
    ]
    with anthropic.Anthropic(base_url=program.url, api_key="x", max_retries=0) as client:
        answer = client.messages.create(
            model="demo", max_tokens=300, messages=HI, tools=tools,
            tool_choice={"type": "tool", "name": "weather"},
        )  # fmt: skip
    assert answer.stop_reason == "tool_use"
    assert [b.name for b in answer.content if b.type == "tool_use"] == ["weather"]


def test_the_form_leaves_room_for_thoughts(fake: Any) -> None:
    with openai.OpenAI(base_url=f"{fake.url}/v1", api_key="x", max_retries=0) as client:
        options: Any = {"model": "demo", "messages": HI}
        form = {"type": "json_object"}
        client.chat.completions.create(**options, response_format=form)
        assert fake.requests[-1].params.grammar.kind == "json_object"
        client.chat.completions.create(**options, response_format=form, reasoning_effort="low")
        matcher = fake.requests[-1].matcher
        for token in fake.tokenizer.encode('<think>Hm.</think>\n\n{"a": 1}', add_special=False):
            matcher.advance(token)
        assert matcher.complete


def test_strict_tools_are_held_to_their_schema(fake: Any) -> None:
    strict = json.loads(json.dumps(TOOLS))
    strict[0]["function"]["strict"] = True
    with openai.OpenAI(base_url=f"{fake.url}/v1", api_key="x", max_retries=0) as client:
        client.chat.completions.create(model="demo", messages=HI, tools=strict)
    matcher = fake.requests[-1].matcher
    text = 'Well. <tool_call>\n{"name": "weather", "arguments": {"day": "to'
    for token in fake.tokenizer.encode(text, add_special=False):
        matcher.advance(token)
    banned = fake.tokenizer.encode("x", add_special=False)
    assert matcher.allowed(banned) == 0, "neither today nor tomorrow goes on so"
