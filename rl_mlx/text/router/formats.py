"""Which format a model writes in, found from its chat template."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from rl_mlx.text.router import calls
from rl_mlx.text.router.calls import Syntax

# A control token inside of a mark.
_TOKEN = re.compile(r"<[^<>]+>|\[/?[A-Z_]+\]")


class Tags(NamedTuple):
    """What stands around reasoning. ``first``: only at the very start of the answer."""

    open: str
    close: str
    first: bool = False


@dataclass(frozen=True)
class Format:
    """How a model marks its reasoning, its answer and its calls.

    ``noise`` are marks that are dropped wherever they come, ``wrapping`` those that are after
    reasoning has been seen.
    """

    name: str
    tags: Tags
    syntaxes: tuple[Syntax, ...] = ()
    noise: tuple[str, ...] = ()
    wrapping: tuple[str, ...] = ()

    @classmethod
    def of(cls, template: str | Mapping[str, str]) -> Format:
        """The format that a chat template (or several, by name) shows.

        A template that knows no tools has no calls (``name`` is ``"plain"``); think tags are known
        in any case.
        """
        source = template if isinstance(template, str) else "\n".join(template.values())
        name, syntaxes = next(
            (name, syntaxes)
            for name, clues, syntaxes in _CALLS
            if all(clue in source for clue in clues)
        )
        tags, around = next((tags, around) for clue, tags, around in _REASONING if clue in source)
        noise = tuple(mark for clue, marks in _NOISE.items() if clue in source for mark in marks)
        return cls(name, tags, syntaxes, noise, around)

    @property
    def markers(self) -> frozenset[str]:
        """Every mark of the format. Control tokens spelled so must not be hidden from the router,
        and all others must be.
        """
        found = {self.tags.open, self.tags.close, *self.noise, *self.wrapping}
        for syntax in self.syntaxes:
            found |= {*syntax.openers, *syntax.inner}
        return frozenset(found).union(*map(_TOKEN.findall, found))


_HERMES = Syntax(calls.json_until("</tool_call>"), ("<tool_call>",), ("</tool_call>",))
_LLAMA = Syntax(calls.llama, ("{",), first=True, keeps=True)
_DEEPSEEK = (
    "<｜tool▁call▁begin｜>",
    "<｜tool▁sep｜>",
    "<｜tool▁call▁end｜>",
    "<｜tool▁calls▁end｜>",
)
_KIMI = (
    "<|tool_call_begin|>",
    "<|tool_call_argument_begin|>",
    "<|tool_call_end|>",
    "<|tool_calls_section_end|>",
)
_SOLAR = ("<|tool_call:name|>", "<|tool_call:args|>", "<|tool_call:end|>")

# Name, clues that the template has all of, and the syntaxes. The first that fits is taken.
_CALLS: tuple[tuple[str, tuple[str, ...], tuple[Syntax, ...]], ...] = (
    (
        "harmony",
        ("<|channel|>", "<|message|>"),
        (
            Syntax(
                calls.harmony,
                ("<|start|>", "<|channel|>"),
                ("<|message|>", "<|constrain|>"),
                structural=True,
            ),
        ),
    ),
    ("solar", ("<|tool_call:begin|>",), (Syntax(calls.solar, ("<|tool_call:begin|>",), _SOLAR),)),
    (
        "kimi",
        ("<|tool_calls_section_begin|>",),
        (
            Syntax(
                calls.section("<|tool_call_begin|>", calls.kimi),
                ("<|tool_calls_section_begin|>",),
                _KIMI,
            ),
        ),
    ),
    (
        "minimax",
        ("<minimax:tool_call>",),
        (Syntax(calls.invokes(""), ("<minimax:tool_call>",), ("</minimax:tool_call>",)),),
    ),
    (
        "dsml",
        ("｜DSML｜",),
        (
            Syntax(
                calls.invokes("｜DSML｜"),
                ("<｜DSML｜function_calls>", "<｜DSML｜tool_calls>"),
                ("｜DSML｜",),
            ),
        ),
    ),
    (
        "deepseek",
        ("<｜tool▁call▁begin｜>",),
        (
            Syntax(
                calls.section("<｜tool▁call▁begin｜>", calls.deepseek),
                ("<｜tool▁calls▁begin｜>",),
                _DEEPSEEK,
            ),
        ),
    ),
    (
        "gemma",
        ("<|tool_call>call:",),
        (Syntax(calls.gemma("<tool_call|>"), ("<|tool_call>call:",), ("<tool_call|>", '<|"|>')),),
    ),
    (
        "functiongemma",
        ("<start_function_call>",),
        (
            Syntax(
                calls.gemma("<end_function_call>"),
                ("<start_function_call>call:",),
                ("<end_function_call>", "<escape>"),
            ),
        ),
    ),
    (
        "seed",
        ("<seed:tool_call>",),
        (Syntax(calls.qwen_coder, ("<seed:tool_call>",), ("</seed:tool_call>",)),),
    ),
    (
        "glm",
        ("<arg_key>",),
        (
            Syntax(
                calls.glm,
                ("<tool_call>",),
                ("</tool_call>", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"),
            ),
        ),
    ),
    (
        "qwen-coder",
        ("<tool_call>", "<function=", "<parameter="),
        (Syntax(calls.qwen_coder, ("<tool_call>", "<function="), ("</tool_call>",)),),
    ),
    (
        "apriel",
        ("<tool_calls>",),
        (Syntax(calls.json_until("</tool_calls>"), ("<tool_calls>",), ("</tool_calls>",)),),
    ),
    (
        "mirothinker",
        ("<use_mcp_tool>",),
        (Syntax(calls.section("<server_name>", calls.mcp), ("<use_mcp_tool>",)), _HERMES),
    ),
    ("hermes", ("<tool_call>",), (_HERMES,)),
    ("granite", ("<|tool_call|>",), (Syntax(calls.json_until(""), ("<|tool_call|>",)),)),
    (
        "mistral",
        ("[TOOL_CALLS]",),
        (Syntax(calls.mistral, ("[TOOL_CALLS]",), ("[ARGS]", "[CALL_ID]")),),
    ),
    (
        "nemotron",
        ("<TOOLCALL>",),
        (Syntax(calls.json_until("</TOOLCALL>"), ("<TOOLCALL>",), ("</TOOLCALL>",)),),
    ),
    (
        "cohere",
        ("<|START_ACTION|>",),
        (Syntax(calls.json_until("<|END_ACTION|>"), ("<|START_ACTION|>",), ("<|END_ACTION|>",)),),
    ),
    ("command-r", ("Action:", '"tool_name"'), (Syntax(calls.fenced_actions, ("Action:",)),)),
    (
        "apertus",
        ("<|tools_prefix|>",),
        (
            Syntax(
                calls.json_until("<|tools_suffix|>", short=True),
                ("<|tools_prefix|>",),
                ("<|tools_suffix|>",),
            ),
        ),
    ),
    (
        "gigachat",
        ("<|function_call|>",),
        (Syntax(calls.json_until("<|message_sep|>"), ("<|function_call|>",)),),
    ),
    (
        "gigachat3",
        ("function call", "<|role_sep|>"),
        (
            Syntax(
                calls.json_until("<|message_sep|>"),
                ("<|message_sep|>\n\nfunction call<|role_sep|>",),
                ("<|role_sep|>",),
            ),
        ),
    ),
    ("firefunction", ("functools[",), (Syntax(calls.json_until(""), ("functools",)),)),
    (
        "functionary-v3.2",
        (">>>all",),
        (Syntax(calls.functionary_recipient, (">>>",), structural=True),),
    ),
    ("functionary-v3.1", ("<function=",), (Syntax(calls.functionary, ("<function=",)),)),
    (
        "lfm2",
        ("ist of tools: ",),
        (
            Syntax(
                calls.python_until("<|tool_call_end|>"),
                ("<|tool_call_start|>",),
                ("<|tool_call_end|>",),
            ),
        ),
    ),
    (
        "llama-pythonic",
        ("func_name1(",),
        (Syntax(calls.python_until(""), ("[",), first=True, keeps=True),),
    ),
    (
        "llama",
        ("Environment: ipython", '"parameters": '),
        (_LLAMA, Syntax(calls.llama, ("<|python_tag|>",))),
    ),
    ("plain", (), ()),
)

# A clue in the template, the tags, and what may stand around the answer after reasoning.
_REASONING: tuple[tuple[str, Tags, tuple[str, ...]], ...] = (
    ("<|channel|>", Tags("<|channel|>analysis<|message|>", "<|end|>"), ()),
    ("<seed:think>", Tags("<seed:think>", "</seed:think>", first=True), ()),
    ("<|START_THINKING|>", Tags("<|START_THINKING|>", "<|END_THINKING|>"), ()),
    ("[THINK]", Tags("[THINK]", "[/THINK]"), ()),
    ("<|channel>thought", Tags("<|channel>thought", "<channel|>"), ()),
    ("<|tool_call:begin|>", Tags("<|think|>", "<|end|>"), ()),
    ("<|inner_prefix|>", Tags("<|inner_prefix|>", "<|inner_suffix|>"), ()),
    (
        "[BEGIN FINAL RESPONSE]",
        Tags("Here are my reasoning steps:", "[BEGIN FINAL RESPONSE]", first=True),
        ("[END FINAL RESPONSE]",),
    ),
    (
        "<response></response>",
        Tags("<think>", "</think>", first=True),
        ("<response>", "</response>"),
    ),
    ("", Tags("<think>", "</think>", first=True), ()),
)

# Marks that are no text, by a clue in the template.
_NOISE: dict[str, tuple[str, ...]] = {
    "<|tool_call:begin|>": (
        "<|begin|>assistant",
        "<|content|>",
        "<|tool_calls|>",
        "<|end|>",
        "<|calls|>",
        "<|flush|>",
    ),
    "<|channel|>": ("<|end|>", "<|call|>", "<|return|>"),
    "<|START_RESPONSE|>": ("<|START_RESPONSE|>", "<|END_RESPONSE|>"),
    "<|START_TEXT|>": ("<|START_TEXT|>", "<|END_TEXT|>"),
    "<|message_sep|>": ("<|message_sep|>",),
}
