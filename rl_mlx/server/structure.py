"""What an answer must look like: from a request to the grammar that holds a model to it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from llguidance import StructTag

from rl_mlx.server.problems import BadParameter
from rl_mlx.server.schemas.openai import (
    GrammarFormat,
    JsonObjectFormat,
    JsonSchemaFormat,
    RegexFormat,
    ResponseFormat,
)
from rl_mlx.text.router import Format
from rl_mlx.types import Grammar

_OPEN, _CLOSE = "<tool_call>", "</tool_call>"
# Spaces as models put them: a lost one writes blanks for ever where it may.
_SPACES = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
_PLAIN = {"x-guidance": _SPACES}
_CALLS = "start: call"
MAX_CALLS = 16
"""Of tools in one answer that is forced to call."""
# Forced calls are written so whatever the model is used to: any tokenizer can, and we can read it.
FORCED = Format.of(_OPEN)


def response_format(wanted: ResponseFormat | None) -> Grammar | None:
    """The grammar of OpenAI's ``response_format``; None for any text."""
    if isinstance(wanted, JsonObjectFormat):
        return Grammar("json_object")
    if isinstance(wanted, JsonSchemaFormat):
        return json_schema(wanted.json_schema.schema_ or {"type": "object"})
    if isinstance(wanted, RegexFormat):
        return Grammar("regex", wanted.regex)
    if isinstance(wanted, GrammarFormat):
        return Grammar(wanted.syntax, wanted.grammar)
    return None


def json_schema(schema: Mapping[str, Any]) -> Grammar:
    """The grammar of a JSON Schema."""
    return Grammar("json_schema", json.dumps(schema))


def forced_format(own: Format) -> Format:
    """How to read an answer that was forced to call: the model's own reasoning, and our calls."""
    return replace(own, name=FORCED.name, syntaxes=FORCED.syntaxes)


def with_thoughts(form: Grammar, own: Format, *, opened: bool) -> Grammar:
    """``form`` after reasoning: which the prompt has ``opened``, or which the model may open."""
    rule, rest = _rule(form)
    tags = own.tags
    first = "thought" if opened else f"({json.dumps(tags.open)} thought)?"
    return Grammar(
        "lark",
        f"start: {first} BLANK {rule}\n{rest}"
        f"thought[suffix={json.dumps(tags.close)}]: /(.|\\n)*/\n"
        "BLANK: /[ \\n]*/\n",
    )


def _rule(form: Grammar) -> tuple[str, str]:
    """A grammar as a part of one in Lark, and the rules that go with it."""
    if form.kind in ("json_schema", "json_object"):
        return f"%json {form.text or json.dumps({'type': 'object'})}", ""
    if form.kind == "regex":
        return f"/{form.text.replace('/', chr(92) + '/')}/", ""
    if form.text.startswith(_CALLS):
        rule, _, rest = form.text.removeprefix("start: ").partition("\n")
        return rule, rest
    raise BadParameter(
        "response_format", "this model thinks first, and a grammar of yours has no place for that"
    )


def calls(tools: Sequence[Mapping[str, Any]], wanted: bool | str, limit: int | None) -> Grammar:
    """Nothing but calls: of the tool that ``wanted`` names, or of any; at most ``limit``."""
    functions = [tool["function"] for tool in tools]
    chosen = [f for f in functions if wanted is True or f["name"] == wanted]
    rules = "".join(
        f"\ncall_{number}: {json.dumps(_begin(f['name']))} arguments_{number} {json.dumps(_end())}"
        f"\narguments_{number}: %json {json.dumps({**_arguments(f), **_PLAIN})}"
        for number, f in enumerate(chosen)
    )
    either = " | ".join(f"call_{number}" for number in range(len(chosen)))
    more = (limit or MAX_CALLS) - 1
    repeated = f' ("\\n" call){{0,{more}}}' if more else ""
    return Grammar("lark", f"{_CALLS}{repeated}\ncall: {either}{rules}\n")


def strict_calls(
    tools: Sequence[Mapping[str, Any]], own: Format, *, special: bool
) -> Grammar | None:
    """Free text in which calls, once begun, follow the schema of their tool; None where no tool
    asks for that.

    ``special``: the mark that begins a call is a control token. Raises ``BadParameter`` for models
    that write calls in ways which are not held to a schema.
    """
    functions = [tool["function"] for tool in tools]
    strict = next((i for i, f in enumerate(functions) if f.get("strict")), None)
    if strict is None:
        return None
    if own.name != FORCED.name:
        raise BadParameter(
            f"tools[{strict}].function.strict",
            "calls of this model cannot be held to it; leave it out, or use tool_choice",
        )
    tags = [
        StructTag(
            trigger=_OPEN,
            begin=_begin(f["name"]),
            grammar={**_arguments(f), **_PLAIN}
            if f.get("strict")
            else {"type": "object", **_PLAIN},
            end=_end(),
        )
        for f in functions
    ]
    return Grammar("lark", StructTag.to_grammar(tags, assume_special=special))


def _begin(name: str) -> str:
    return f'{_OPEN}\n{{"name": {json.dumps(name)}, "arguments": '


def _end() -> str:
    return "}\n" + _CLOSE


def _arguments(function: Mapping[str, Any]) -> dict[str, Any]:
    """The schema of a function's arguments, which are an object in any case."""
    return {"type": "object", **(function.get("parameters") or {})}
