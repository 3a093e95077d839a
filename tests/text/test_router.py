"""The router: calls in every format, what only looks like one, reasoning, and streaming."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from rl_mlx.errors import InvalidRequest
from rl_mlx.text.router import (
    Content,
    Format,
    Piece,
    Reasoning,
    Routed,
    Router,
    ToolCall,
    ToolCallArguments,
    ToolCallEnd,
    ToolCallStart,
    ToolCallWithdrawn,
    collect,
)
from rl_mlx.text.router.formats import _CALLS

PARAMETERS = {
    "type": "object",
    "properties": {
        "city": {"type": "string"},
        "days": {"type": "integer"},
        "opts": {"type": "object"},
        "metric": {"type": "boolean"},
    },
}
TOOLS = [
    {"type": "function", "function": {"name": "get_weather", "parameters": PARAMETERS}},
    {"type": "function", "function": {"name": "now"}},
]

# What a template that shows the format has in it, and so on; the real ones are in ../shared.
CLUES = {name: "\n".join(clues) for name, clues, _ in _CALLS}


def route(
    text: str | list[str],
    format: Format | str = "hermes",
    *,
    tools: Any = TOOLS,
    tail: str = "",
) -> Routed:
    return collect(pieces_of(text, format, tools=tools, tail=tail))


def pieces_of(
    text: str | list[str],
    format: Format | str = "hermes",
    *,
    tools: Any = TOOLS,
    tail: str = "",
) -> list[Piece]:
    form = Format.of(CLUES[format]) if isinstance(format, str) else format
    router = Router(form, tools=tools, prompt_tail=tail)
    chunks = [text] if isinstance(text, str) else text
    return [p for chunk in chunks for p in router.feed(chunk)] + router.flush()


def merged(pieces: list[Piece]) -> list[Piece]:
    """Pieces of one kind that follow each other, as one."""
    whole: list[Piece] = []
    for piece in pieces:
        last = whole[-1] if whole else None
        if isinstance(piece, Reasoning) and isinstance(last, Reasoning):
            whole[-1] = Reasoning(last.text + piece.text)
        elif isinstance(piece, Content) and isinstance(last, Content):
            whole[-1] = Content(last.text + piece.text)
        elif isinstance(piece, ToolCallArguments) and isinstance(last, ToolCallArguments):
            whole[-1] = ToolCallArguments(last.index, last.fragment + piece.fragment)
        else:
            whole.append(piece)
    return whole


def said(routed: Routed) -> list[tuple[str, Any]]:
    return [(call.name, json.loads(call.arguments)) for call in routed.calls]


# Hand-written answers

PARIS = '{"city": "Paris"}'
CASES: dict[str, tuple[str, str]] = {
    "hermes": ("hermes", '<tool_call>\n{"name": "get_weather", "arguments": %s}\n</tool_call>'),
    "arguments first": (
        "hermes",
        '<tool_call>{"arguments": %s, "name": "get_weather"}</tool_call>',
    ),
    "arguments in a string": (
        "hermes",
        '<tool_call>{"name": "get_weather", "arguments": "{\\"city\\": \\"Paris\\"}"}</tool_call>',
    ),
    "qwen-coder": (
        "qwen-coder",
        "<tool_call>\n<function=get_weather>\n<parameter=city>\nParis\n</parameter>\n</function>\n"
        "</tool_call>",
    ),
    "qwen-coder without its tag": (
        "qwen-coder",
        "<function=get_weather>\n<parameter=city>\nParis\n</parameter>\n</function>",
    ),
    "glm": (
        "glm",
        "<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>Paris</arg_value>\n"
        "</tool_call>",
    ),
    "mistral, old": ("mistral", '[TOOL_CALLS] [{"name": "get_weather", "arguments": %s}]'),
    "mistral, new": ("mistral", "[TOOL_CALLS]get_weather[ARGS]%s"),
    "deepseek v3": (
        "deepseek",
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather\n```json\n%s\n"
        "```<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
    ),
    "deepseek v3.1": (
        "deepseek",
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>%s<｜tool▁call▁end｜>"
        "<｜tool▁calls▁end｜>",
    ),
    "dsml": (
        "dsml",
        '<｜DSML｜function_calls>\n<｜DSML｜invoke name="get_weather">\n<｜DSML｜parameter'
        ' name="city" string="true">Paris</｜DSML｜parameter>\n</｜DSML｜invoke>\n'
        "</｜DSML｜function_calls>",
    ),
    "minimax": (
        "minimax",
        '<minimax:tool_call>\n<invoke name="get_weather">\n<parameter name="city">Paris</parameter>'
        "\n</invoke>\n</minimax:tool_call>",
    ),
    "granite": ("granite", '<|tool_call|>[{"name": "get_weather", "arguments": %s}]'),
    "granite, capital": ("granite", '<|tool_call|> {"name": "get_weather", "arguments": %s}'),
    "lfm2": ("lfm2", "<|tool_call_start|>[get_weather(city='Paris')]<|tool_call_end|>"),
    "llama": ("llama", '{"name": "get_weather", "parameters": %s}'),
    "llama, tagged": (
        "llama",
        '<|python_tag|>{"type": "function", "name": "get_weather", "parameters": %s}',
    ),
    "llama, pythonic": ("llama-pythonic", '[get_weather(city="Paris")]'),
    "gemma": ("gemma", '<|tool_call>call:get_weather{city:<|"|>Paris<|"|>}<tool_call|>'),
    "functiongemma": (
        "functiongemma",
        "<start_function_call>call:get_weather{city:<escape>Paris<escape>}<end_function_call>",
    ),
    "command-r": (
        "command-r",
        'Action:\n```json\n[\n  {\n "tool_name": "get_weather",\n "parameters": %s\n  }\n]```',
    ),
    "cohere": (
        "cohere",
        '<|START_ACTION|>[{"tool_call_id": "0", "tool_name": "get_weather", "parameters": %s}]'
        "<|END_ACTION|>",
    ),
    "nemotron": ("nemotron", '<TOOLCALL>[{"name": "get_weather", "arguments": %s}]</TOOLCALL>'),
    "apriel": ("apriel", '<tool_calls>[{"name": "get_weather", "arguments": %s}]</tool_calls>'),
    "apertus": ("apertus", '<|tools_prefix|>[{"get_weather": %s}]<|tools_suffix|>'),
    "gigachat": ("gigachat", '<|function_call|>{"name": "get_weather", "arguments": %s}'),
    "firefunction": ("firefunction", ' functools[{"name": "get_weather", "arguments": %s}]'),
    "functionary 3.1": ("functionary-v3.1", "<function=get_weather>%s</function>"),
    "functionary 3.2": ("functionary-v3.2", ">>>get_weather\n%s"),
    "kimi": (
        "kimi",
        "<|tool_calls_section_begin|><|tool_call_begin|>functions.get_weather:0"
        "<|tool_call_argument_begin|>%s<|tool_call_end|><|tool_calls_section_end|>",
    ),
    "solar": (
        "solar",
        "<|tool_calls|><|tool_call:begin|>x1<|tool_call:name|>get_weather<|tool_call:args|>%s"
        "<|tool_call:end|><|calls|>",
    ),
    "mirothinker": (
        "mirothinker",
        "<use_mcp_tool>\n<server_name>s</server_name>\n<tool_name>get_weather</tool_name>\n"
        "<arguments>\n%s\n</arguments>\n</use_mcp_tool>",
    ),
    "harmony": (
        "harmony",
        "<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>%s<|call|>",
    ),
    "harmony, recipient first": (
        "harmony",
        "<|start|>assistant to=functions.get_weather<|channel|>commentary json<|message|>%s",
    ),
}


def written(case: str) -> tuple[str, str]:
    form, text = CASES[case]
    return form, text.replace("%s", PARIS)


@pytest.mark.parametrize("case", CASES)
def test_a_call(case: str) -> None:
    form, text = written(case)
    routed = route(text, form)
    assert said(routed) == [("get_weather", {"city": "Paris"})]
    assert (routed.reasoning, routed.content) == ("", "")
    assert merged(pieces_of(list(text), form)) == merged(pieces_of(text, form))


@pytest.mark.parametrize("case", sorted(case for case in CASES if CASES[case][0] != "harmony"))
def test_a_call_of_no_tool_is_text(case: str) -> None:
    form, text = written(case)
    text = text.replace("get_weather", "rm_rf")
    routed = route(text, form)
    assert routed.calls == ()
    noise = Format.of(CLUES[form]).noise
    assert routed.content == re.sub("|".join(map(re.escape, noise)) or "(?!)", "", text)


@pytest.mark.parametrize("case", sorted(case for case in CASES if CASES[case][0] != "harmony"))
def test_without_tools_no_call_is_looked_for(case: str) -> None:
    form, text = written(case)
    routed = route(text, form, tools=None)
    noise = Format.of(CLUES[form]).noise
    assert routed == Routed("", re.sub("|".join(map(re.escape, noise)) or "(?!)", "", text), ())


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_what_is_cut_off_is_never_lost(data: st.DataObject) -> None:
    """Any beginning of a call is a whole call, or comes out as it went in."""
    form, text = written(data.draw(st.sampled_from(sorted(CASES))))
    if form in ("harmony", "solar"):
        return
    cut = text[: data.draw(st.integers(0, len(text)))]
    routed = route(cut, form)
    if routed.calls:
        assert said(routed) == [("get_weather", {"city": "Paris"})]
        assert routed.content == ""
    else:
        assert routed.content == cut


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_the_cuts_do_not_matter(data: st.DataObject) -> None:
    """Calls, marks, and noise in any order, whole or torn, in any chunks."""
    form = data.draw(st.sampled_from(sorted(CLUES)))
    calls = [written(case)[1] for case in sorted(CASES) if CASES[case][0] == form]
    marks = sorted(Format.of(CLUES[form]).markers)
    words = st.sampled_from([*calls, *marks, " ", "\n", "a", '"', "{", "}", "[", "get_weather"])
    torn = st.builds(lambda t, i, j: t[i : i + j], words, st.integers(0, 99), st.integers(1, 99))
    text = "".join(data.draw(st.lists(words | torn, max_size=8)))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=12)))
    chunks = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)])]
    whole = merged(pieces_of(text, form))
    assert merged(pieces_of(chunks, form)) == whole
    assert merged(pieces_of(list(text), form)) == whole
    for call in collect(whole).calls:
        assert isinstance(json.loads(call.arguments), dict)


@settings(deadline=None)
@given(st.text(alphabet=st.characters(exclude_characters="<[>{AHf"), max_size=60), st.data())
@example("  two\n\n", None)
def test_text_without_marks_is_left_alone(text: str, data: Any) -> None:
    form = data.draw(st.sampled_from(sorted(CLUES))) if data else "hermes"
    assert route(list(text), form) == Routed("", text, ())


@pytest.mark.parametrize("name", sorted(CLUES))
def test_no_mark_hides_in_another(name: str) -> None:
    """Marks are found from the left: one inside of another would be found too soon."""
    form = Format.of(CLUES[name])
    router = Router(form, tools=TOOLS)
    marks = router._marks() | {form.tags.close}
    assert [(a, b) for a in marks for b in marks if a in b[1:]] == []


# What only looks like it


@pytest.mark.parametrize(
    "text",
    [
        "Use <tool_call> to call.",
        '<tool_call>{"name": "get_weather", "arguments": [1]}</tool_call>',
        '<tool_call>{"name": "get_weather" "arguments": {}}</tool_call>',
        "<tool_call>\n  \n</tool_call> x",
        "<tool_call>{}</tool_call>",
        'a\n\n<tool_call>{"name": 3, "arguments": {}}</tool_call>\n b ',
        "<tool_call>" * 5,
    ],
)
def test_malformed_calls_are_text(text: str) -> None:
    pieces = pieces_of(list(text))
    assert collect(pieces) == Routed("", text, ())
    assert all(isinstance(piece, Content) for piece in pieces)


@pytest.mark.parametrize(
    "text",
    [
        ' a <tool_call>{"name": "get_weather", "arguments": {"city": nope}}</tool_call> b',
        '<tool_call>{"name": "get_weather", "arguments": {"city": "x"}} and so on</tool_call>',
        '<tool_call>{"name": "get_weather", "arguments": {"city": "x"}, }</tool_call>',
        '<tool_call>{"name": "get_weather", "arguments": {"city": "x\n"}}</tool_call>',
        '<tool_call>{"name": "get_weather", "arguments": {"days": NaN}}</tool_call>',
        '<tool_call>{"name": "get_weather", "arguments": {"days": 1e999}}</tool_call>',
        '<tool_call>{"name": "get_weather", "arguments": {"city": "cut',
    ],
)
def test_what_is_seen_late_is_withdrawn(text: str) -> None:
    pieces = pieces_of(list(text))
    assert collect(pieces) == Routed("", text, ())
    assert sum(isinstance(piece, ToolCallWithdrawn) for piece in pieces) == 1
    assert not any(isinstance(piece, ToolCallEnd) for piece in pieces)


def test_after_a_bad_call_a_good_one_is_found() -> None:
    form, good = written("hermes")
    routed = route(f"x <tool_call>no</tool_call>\n{good}\n<tool_call>{good}", form)
    assert said(routed) == [("get_weather", {"city": "Paris"})] * 2
    assert routed.content == "x <tool_call>no</tool_call><tool_call>"


def test_llama_calls_only_from_the_start() -> None:
    call = written("llama")[1]
    assert said(route(f"\n{call}; {call}", "llama")) == [("get_weather", {"city": "Paris"})] * 2
    assert route(f"So: {call}", "llama") == Routed("", f"So: {call}", ())
    assert route(f"{call} is how.", "llama") == Routed("", f"{call} is how.", ())
    assert route('{"answer": 42}', "llama") == Routed("", '{"answer": 42}', ())


def test_pythonic() -> None:
    text = (
        "[get_weather(city='it\\'s', days=\"3\", opts={'a': [1., -2]}, metric=True, note=None), "
        "now()]"
    )
    arguments = {"city": "it's", "days": 3, "opts": {"a": [1.0, -2]}, "metric": True, "note": None}
    expected = [("get_weather", arguments), ("now", {})]
    assert said(route(text, "llama-pythonic")) == expected
    assert said(route(f"<|tool_call_start|>{text}<|tool_call_end|>ok", "lfm2")) == expected
    for wrong in ("[1] says", "[get_weather(", "[get_weather('x')]", "[now(a=b)]", "[now()] then"):
        assert route(list(wrong), "llama-pythonic") == Routed("", wrong, ())


# Streaming


def test_arguments_are_given_out_as_they_come() -> None:
    router = Router(Format.of("<tool_call>"), tools=TOOLS)
    assert router.feed('Hi\n<tool_call>\n{"name": "get_weather", "arguments": ') == [Content("Hi")]
    assert router.feed('{"city": "Pa') == [
        ToolCallStart(0, "get_weather"),
        ToolCallArguments(0, '{"city": "Pa'),
    ]
    assert router.feed("ris") == [ToolCallArguments(0, "ris")]
    assert router.feed('"}') == [ToolCallArguments(0, '"}')]
    assert router.feed("}\n</tool") == []
    assert router.feed("_call>") == [ToolCallEnd(0)]
    assert router.flush() == []
    with pytest.raises(RuntimeError, match="flushed"):
        router.feed("more")


def test_text_is_not_held_longer_than_a_mark() -> None:
    router = Router(Format.of("<tool_call>"), tools=TOOLS)
    assert router.feed("Hello, ") == [Content("Hello,")]
    assert router.feed("1 <to") == [Content(" 1")]
    assert router.feed("x") == [Content(" <tox")]


def test_kimi_keeps_the_models_own_id() -> None:
    form, text = written("kimi")
    assert route(text, form).calls == (ToolCall("functions.get_weather:0", "get_weather", PARIS),)


# Reasoning


@pytest.mark.parametrize(
    ("text", "tail", "expected"),
    [
        ("<think>\nhm\n</think>\n\nyes", "", ("hm", "yes")),
        ("\n<think>hm</think>yes", "", ("hm", "yes")),
        ("hm\n</think>\nyes", "assistant\n<think>\n", ("hm", "yes")),
        ("<think></think>yes", "", ("", "yes")),
        ("</think>yes", "", ("", "yes")),
        ("yes", "<think>\n</think>\n", ("", "yes")),
        ("<think>never ends </thi", "", ("never ends </thi", "")),
        ("a <think>b</think>", "", ("", "a <think>b</think>")),
        ("<think>a</think>b <think>c</think>", "", ("a", "b <think>c</think>")),
        ("<thinker> is a word", "", ("", "<thinker> is a word")),
        ("<", "", ("", "<")),
        ("", "", ("", "")),
    ],
)
def test_think_tags(text: str, tail: str, expected: tuple[str, str]) -> None:
    for chunks in ([text], list(text)):
        routed = route(chunks, "plain", tail=tail)
        assert (routed.reasoning, routed.content) == expected


def test_a_call_in_the_reasoning_is_thought() -> None:
    form, call = written("hermes")
    assert route(f"<think>I'd say {call}</think>\n{call}", form) == Routed(
        f"I'd say {call}", "", (ToolCall(None, "get_weather", PARIS),)
    )


def test_a_control_token_ends_the_reasoning() -> None:
    form, call = written("kimi")
    routed = route(f"hm {call}", form, tail="<think>")
    assert (routed.reasoning, routed.content, said(routed)) == (
        "hm",
        "",
        [("get_weather", {"city": "Paris"})],
    )


@pytest.mark.parametrize(
    ("source", "text", "tail"),
    [
        ("<seed:think><seed:tool_call>", "<seed:think>R</seed:think>A", ""),
        ("[THINK][TOOL_CALLS]", "[THINK]R[/THINK]A", ""),
        ("<|channel>thought<|tool_call>call:", "<|channel>thought\nR\n<channel|>A", ""),
        ("<|tool_call:begin|>", "<|think|>R<|end|><|begin|>assistant<|content|>A<|end|>", ""),
        ("<|inner_prefix|>", "<|inner_prefix|>R<|inner_suffix|>A", ""),
        (
            "[BEGIN FINAL RESPONSE]",
            "R\n[BEGIN FINAL RESPONSE]\nA\n[END FINAL RESPONSE]",
            "Here are my reasoning steps:\n",
        ),
        ("<think></think><response></response>", "<think>R</think>\n<response>A</response>", ""),
        (
            "<|START_THINKING|><|START_RESPONSE|>",
            "R<|END_THINKING|><|START_RESPONSE|>A<|END_RESPONSE|>",
            "<|START_THINKING|>",
        ),
    ],
)
def test_other_tags(source: str, text: str, tail: str) -> None:
    form = Format.of(source)
    assert (
        route(text, form, tail=tail) == route(list(text), form, tail=tail) == Routed("R", "A", ())
    )


def test_the_wrapping_of_an_answer_is_text_where_nothing_was_thought() -> None:
    form = Format.of("<think></think><response></response>")
    assert route("<response>1</response>", form).content == "<response>1</response>"


HARMONY = (
    "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>commentary<|message|>"
    "I'll look.<|end|><|start|>assistant<|channel|>commentary to=functions.get_weather "
    '<|constrain|>json<|message|>{"city": "Paris"}<|call|>'
)


def test_harmony() -> None:
    tail = "<|start|>user<|message|>Hi<|end|><|start|>assistant"
    routed = route(list(HARMONY), "harmony", tail=tail)
    assert routed == Routed("Hm.", "I'll look.", (ToolCall(None, "get_weather", PARIS),))
    final = "<|channel|>analysis<|message|>a</think>b<|end|><|start|>assistant"
    final += "<|channel|>final<|message|>Yes<|return|>"
    assert route(final, "harmony", tail=tail) == Routed("a</think>b", "Yes", ())
    assert route("Yes", "harmony", tail=tail + "<|channel|>final<|message|>").content == "Yes"
    assert route(" plain text", "harmony", tail=tail) == Routed("", " plain text", ())
    # A tool that is not ours is the model's own affair; broken arguments are not.
    other = "<|channel|>commentary to=python<|message|>print(1)<|call|>"
    assert route(other, "harmony", tail=tail) == Routed("print(1)", "", ())
    broken = "<|channel|>commentary to=functions.now<|message|>{nope}<|call|>"
    assert route(broken, "harmony", tail=tail) == Routed("", "{nope}", ())


def test_functionary_speaks_to_all() -> None:
    text = f"all\nLook.>>>get_weather\n{PARIS}"
    assert route(text, "functionary-v3.2", tail="\n>>>") == Routed(
        "", "Look.", (ToolCall(None, "get_weather", PARIS),)
    )
    assert route("all\nYes", "functionary-v3.2", tools=None, tail=">>>").content == "Yes"
    assert route("me\nYes", "functionary-v3.2", tail=">>>").content == "me\nYes"


def test_tools_have_names() -> None:
    with pytest.raises(InvalidRequest, match="tools"):
        Router(Format.of("<tool_call>"), tools=[{"name": "f"}])


def test_the_format_of_several_templates() -> None:
    assert Format.of({"default": "x", "tool_use": "<tool_call>"}).name == "hermes"
    assert "<tool_call>" in Format.of("<tool_call>").markers
    assert {"<|channel|>", "<|message|>", "<|call|>"} <= Format.of(HARMONY).markers
