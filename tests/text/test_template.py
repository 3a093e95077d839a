"""Chat templates: real ones, exact prompts written by hand, and what must not get out of hand."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rl_mlx.errors import InvalidRequest
from rl_mlx.text.template import ChatTemplate

SYSTEM = {"role": "system", "content": "Be brief."}
TURNS = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello!"},
    {"role": "user", "content": "Bye"},
]
CHAT = [SYSTEM, *TURNS]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Weather of a city",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
]
CALL = {
    "id": "abcdefgh1",
    "type": "function",
    "function": {"name": "get_weather", "arguments": '{"city": "Köln"}'},
}
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}


@pytest.fixture
def real(shared: Path) -> Callable[[str], ChatTemplate]:
    """A template of ``../shared/templates``."""

    def load(name: str) -> ChatTemplate:
        return ChatTemplate((shared / "templates" / f"{name}.jinja").read_text("utf-8"), TOKENS)

    return load


@pytest.mark.shared
def test_all_real_templates(shared: Path, real: Callable[[str], ChatTemplate]) -> None:
    names = sorted(path.stem for path in (shared / "templates").glob("*.jinja"))
    refused = {}
    for name in names:
        try:
            text = real(name).render(CHAT)
        except InvalidRequest as error:
            refused[name] = str(error)
            continue
        assert all(message["content"] in text for message in CHAT), name
    assert len(names) > 50
    assert refused == {
        "google-gemma-2-2b-it": "the model's chat template refuses these messages: "
        "System role not supported"
    }


@pytest.mark.shared
def test_all_real_templates_take_parts_as_they_take_text(
    shared: Path, real: Callable[[str], ChatTemplate]
) -> None:
    parts = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in TURNS]
    for path in sorted((shared / "templates").glob("*.jinja")):
        template = real(path.stem)
        assert template.render(parts) == template.render(TURNS), path.stem


EXPECTED = {
    "Qwen-Qwen2.5-7B-Instruct": "<|im_start|>system\nBe brief.<|im_end|>\n"
    "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello!<|im_end|>\n"
    "<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n",
    "Qwen-Qwen3-0.6B": "<|im_start|>system\nBe brief.<|im_end|>\n"
    "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello!<|im_end|>\n"
    "<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n",
    "meta-llama-Llama-3.1-8B-Instruct": "<s><|start_header_id|>system<|end_header_id|>\n\n"
    "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\nBe brief.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nHello!<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nBye<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "mistralai-Mistral-Nemo-Instruct-2407": "<s>[INST]Hi[/INST]Hello!</s>"
    "[INST]Be brief.\n\nBye[/INST]",
    "microsoft-Phi-3.5-mini-instruct": "<|system|>\nBe brief.<|end|>\n<|user|>\nHi<|end|>\n"
    "<|assistant|>\nHello!<|end|>\n<|user|>\nBye<|end|>\n<|assistant|>\n",
}


@pytest.mark.shared
@pytest.mark.parametrize("name", EXPECTED)
def test_exact_prompts(real: Callable[[str], ChatTemplate], name: str) -> None:
    assert real(name).render(CHAT) == EXPECTED[name]


@pytest.mark.shared
def test_gemma_has_no_system_role(real: Callable[[str], ChatTemplate]) -> None:
    template = real("google-gemma-2-2b-it")
    assert template.render(TURNS) == (
        "<s><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\nHello!<end_of_turn>\n"
        "<start_of_turn>user\nBye<end_of_turn>\n<start_of_turn>model\n"
    )
    with pytest.raises(InvalidRequest, match="System role not supported") as caught:
        template.render(CHAT)
    assert "\n" not in str(caught.value)


@pytest.mark.shared
def test_gpt_oss(real: Callable[[str], ChatTemplate]) -> None:
    text = real("openai-gpt-oss-120b").render(CHAT, reasoning_effort="high")
    assert re.fullmatch(
        re.escape(
            "<|start|>system<|message|>You are ChatGPT, a large language model trained by OpenAI.\n"
            "Knowledge cutoff: 2024-06\nCurrent date: DATE\n\nReasoning: high\n\n"
            "# Valid channels: analysis, commentary, final. Channel must be included for every "
            "message.<|end|><|start|>developer<|message|># Instructions\n\nBe brief.\n\n<|end|>"
            "<|start|>user<|message|>Hi<|end|>"
            "<|start|>assistant<|channel|>final<|message|>Hello!<|end|>"
            "<|start|>user<|message|>Bye<|end|><|start|>assistant"
        ).replace("DATE", r"\d{4}-\d\d-\d\d"),
        text,
    )


@pytest.mark.shared
def test_options_of_a_template(real: Callable[[str], ChatTemplate]) -> None:
    qwen = real("Qwen-Qwen3-0.6B")
    ending = "<|im_start|>assistant\n<think>\n\n</think>\n\n"
    assert qwen.render(TURNS, enable_thinking=False).endswith(ending)
    assert not qwen.render(TURNS, add_generation_prompt=False).endswith("assistant\n")
    llama = real("meta-llama-Llama-3.2-3B-Instruct")
    assert "Today Date: 1 Jan 2000\n" in llama.render(TURNS, date_string="1 Jan 2000")


@pytest.mark.shared
@pytest.mark.parametrize(
    "name",
    [
        "Qwen-Qwen3-0.6B",  # content must be a text
        "deepseek-ai-DeepSeek-R1-Distill-Qwen-32B",  # no content must be none, arguments a text
        "deepseek-ai-DeepSeek-V3.1",
        "meta-llama-Llama-3.1-8B-Instruct",  # arguments must be an object
        "mistralai-Mistral-Nemo-Instruct-2407",
        "mistralai-Ministral-3-14B-Reasoning-2512",
        "openai-gpt-oss-120b",
        "Kimi-K2-Instruct",  # appends to a list
        "llama-cpp-deepseek-r1",
        "fireworks-ai-llama-3-firefunction-v2",  # tools come as ``functions``
        "GLM-4.6",
    ],
)
def test_tool_calls_as_openai_writes_them(real: Callable[[str], ChatTemplate], name: str) -> None:
    messages = [
        TURNS[0],
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": CALL["id"], "content": "22 degrees"},
    ]
    text = real(name).render(messages, tools=TOOLS)
    assert "22 degrees" in text
    assert "get_weather" in text
    assert "Köln" in text
    assert "None" not in text


def test_named_templates() -> None:
    template = ChatTemplate({"default": "D", "tool_use": "T{{ tools | length }}", "rag": "R"})
    assert template.render(TURNS) == "D"
    assert template.render(TURNS, TOOLS) == "T1"
    assert template.render(TURNS, TOOLS, name="rag") == "R"
    with pytest.raises(InvalidRequest, match="no chat template 'x'; known are default, tool_use"):
        template.render(TURNS, name="x")
    assert ChatTemplate({"only": "O"}).render(TURNS) == "O"


def test_names_that_templates_may_use() -> None:
    source = """
{%- for m in messages -%}
    {%- if loop.index0 == 2 %}{% break %}{% endif -%}
    {% generation %}{{ m | tojson }}{% endgeneration %};
{%- endfor -%}
{{ {"b": "é<", "a": 1} | tojson(indent=2, sort_keys=True) }}{{ strftime_now("%Y") }}"""
    text = ChatTemplate(source).render(TURNS)
    body, year = text[:-4], text[-4:]
    assert body == (
        '{"role": "user", "content": "Hi"};{"role": "assistant", "content": "Hello!"};'
        '{\n  "a": 1,\n  "b": "é<"\n}'
    )
    assert year.isdigit()


def test_parts_for_a_template_that_wants_parts() -> None:
    source = "{% for m in messages %}{% for p in m.content %}[{{ p.text }}]{% endfor %}{% endfor %}"
    template = ChatTemplate(source)
    parts = [{"role": "user", "content": [{"type": "text", "text": t} for t in ("a", "b")]}]
    assert template.render(parts) == "[a][b]"
    assert template.render([{"role": "user", "content": "ab"}]) == "[ab]"


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([], "messages is empty"),
        (["hi"], r"messages\[0\] must be an object"),
        ([{"content": "hi"}], r"messages\[0\] needs a role"),
        ([TURNS[0], {"role": "user"}], r"messages\[1\] needs content"),
        ([{"role": "user", "content": 5}], "must be a text or a list of parts"),
        (
            [{"role": "user", "content": [{"type": "image_url"}]}],
            "text parts only, not 'image_url'",
        ),
        ([{"role": "user", "content": object()}], "has a object, which is not JSON"),
    ],
)
def test_bad_messages(messages: list[Any], words: str) -> None:
    with pytest.raises(InvalidRequest, match=words):
        ChatTemplate("{{ messages }}").render(messages)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("{{ raise_exception('Not\nthis way') }}", "refuses these messages: Not this way"),
        ("\n{% if %}", "broken .line 2: "),
        ("{{ nothing.at_all }}", "'nothing' is undefined"),
        ("{{ messages[0].content + 1 }}", "failed on these messages"),
        ("{{ messages.__class__.__mro__ }}", "unsafe"),
    ],
)
def test_failures_are_one_line(source: str, words: str) -> None:
    with pytest.raises(InvalidRequest, match=words) as caught:
        ChatTemplate(source).render(TURNS)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "source",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) + f(n - 1) }}{% endif %}{% endmacro %}{{ f(40) }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ 'x' * 10 ** 10 }}",
        "{{ [1] * (10 ** 10) }}",
        "{{ 9 ** 99999 }}",
        "{% set n = namespace(s='x') %}{% for i in range(60) %}{% set n.s = n.s * 2 %}{% endfor %}",
        "{% set n = namespace(s='x') %}{% for i in range(60) %}{% set n.s = n.s~n.s %}{% endfor %}",
        "{% set s = 'x' * 1000 %}{% for i in range(99999) %}{{ s }}{% endfor %}",
        "{{ range(10 ** 9) | list }}",
    ],
)
def test_templates_have_bounds(source: str) -> None:
    with pytest.raises(InvalidRequest):
        ChatTemplate(source).render(TURNS)


def test_a_template_cannot_change_the_callers_messages() -> None:
    messages = [{"role": "user", "content": "hi", "list": [1]}]
    source = "{% set _ = messages[0].list.append(2) %}{{ messages[0].list }}"
    assert ChatTemplate(source).render(messages) == "[1, 2]"
    assert messages == [{"role": "user", "content": "hi", "list": [1]}]
