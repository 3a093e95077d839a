"""How models write the calls of tools: one function for each syntax.

Each is called just after one of the syntax's openers was read. It reads calls up to the end of what
the opener began; where the text is no call after all it raises ``NotACall``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass

from rl_mlx.text.router.pieces import Content, Reasoning
from rl_mlx.text.router.reader import MAX_NAME, NotACall, Reader, Steps
from rl_mlx.text.router.values import Literals, dump, fit, from_text, load


@dataclass(frozen=True)
class Syntax:
    """One way to write calls.

    ``openers`` are the texts that begin one. ``inner`` are other control tokens in it. ``first``:
    only at the very start of the answer. ``keeps``: the opener is already part of the call.
    ``structural``: the openers structure every answer, calls or none, tools or none.
    """

    read: Callable[[Reader], Steps[None]]
    openers: tuple[str, ...]
    inner: tuple[str, ...] = ()
    first: bool = False
    keeps: bool = False
    structural: bool = False


_STRING = r'"\s*:\s*"([^"\\]*)"\s*,\s*'
_HEAD = re.compile(
    rf'\{{\s*(?:"(?:type|tool_call_id){_STRING}|"id"\s*:\s*"(?P<id>[^"\\]*)"\s*,\s*)*'
    r'"(?:tool_)?name"\s*:\s*"(?P<name>[^"\\]*)"\s*,\s*"(?:arguments|parameters)"\s*:\s*'
)
_SHORT_HEAD = re.compile(r'\{\s*"(?P<name>[^"\\]*)"\s*:\s*(?P<id>(?!))?')


def _object(r: Reader, head: re.Pattern[str] = _HEAD) -> Steps[None]:
    """One call as a JSON object. With its name first, arguments are given out as they come."""
    yield from r.space()
    start, depth = r.at, 1
    yield from r.literal("{")
    while depth:
        bracket = yield from r.bracket()
        depth += 1 if bracket in "{[" else -1
        if depth == 2 and bracket == "{" and not r.open:
            found = head.fullmatch(r.text, start, r.at - 1)
            if found and found["name"] in r.tools:
                r.start(found["name"], found["id"])
                r.live(r.at - 1)
        elif depth == 1 and r.is_live:
            r.live(None)
    whole = load(r.text[start : r.at])
    if not isinstance(whole, dict):
        raise NotACall
    if not r.open:
        _whole(r, whole)


def _whole(r: Reader, call: dict[str, object]) -> None:
    """A call whose keys come in another order, or whose arguments are JSON in a string."""
    name = call.get("name", call.get("tool_name"))
    arguments = call.get("arguments", call.get("parameters"))
    if isinstance(arguments, str):
        arguments = load(arguments)
    if arguments is None:
        arguments = {}
    if not isinstance(name, str) or not isinstance(arguments, dict):
        raise NotACall
    own = call.get("id")
    r.start(name, own if isinstance(own, str) else None)
    r.add(dump(arguments))


def _list(r: Reader, head: re.Pattern[str] = _HEAD) -> Steps[None]:
    """The rest of a list of calls as JSON objects."""
    while True:
        yield from _object(r, head)
        yield from r.space()
        more = yield from r.maybe(",")
        if not more:
            yield from r.close("]")
        r.end()
        if not more:
            return


def json_until(closer: str, *, short: bool = False) -> Callable[[Reader], Steps[None]]:
    """JSON, one call or a list, up to ``closer``; ``short`` ones are ``{"name": {arguments}}``."""
    head = _SHORT_HEAD if short else _HEAD

    def read(r: Reader) -> Steps[None]:
        yield from r.space()
        if (yield from r.maybe("[")):
            yield from _list(r, head)
            yield from r.close(closer)
            r.mark = r.at
        else:
            yield from _object(r, head)
            yield from r.close(closer)
            r.end()

    return read


def llama(r: Reader) -> Steps[None]:
    """The whole answer is one JSON object, or several with ``;`` between."""
    while True:
        yield from _object(r)
        yield from r.space()
        last = r.at == len(r.text)
        if not last:
            yield from r.literal(";")
        r.end()
        if last:
            return


def fenced_actions(r: Reader) -> Steps[None]:
    """Command R: a list of objects in a Markdown fence."""
    yield from r.space()
    yield from r.literal("```json")
    yield from r.space()
    yield from r.literal("[")
    yield from _list(r)
    yield from r.close("```")
    r.mark = r.at


def mistral(r: Reader) -> Steps[None]:
    """A JSON list, or since 2025 ``name[CALL_ID]id[ARGS]{...}``."""
    yield from r.space()
    if (yield from r.maybe("[")):
        yield from _list(r)
        return
    name, stop = yield from r.until("[ARGS]", "[CALL_ID]", "{", limit=MAX_NAME)
    own = None
    if stop == "[CALL_ID]":
        own = yield from r.name("[ARGS]")
    elif stop == "{":
        r.at -= 1
    r.start(name.strip(), own)
    yield from r.arguments()
    r.end()


def deepseek(r: Reader) -> Steps[None]:
    """V3 and R1: ``function<sep>name`` and a JSON fence; V3.1: ``name<sep>{...}``."""
    while True:
        name = yield from r.name("<｜tool▁sep｜>")
        fenced = name == "function"
        if fenced:
            name = yield from r.name("\n")
            yield from r.literal("```json")
        r.start(name)
        yield from r.arguments()
        if fenced:
            yield from r.close("```")
        yield from r.close("<｜tool▁call▁end｜>")
        r.end()
        yield from r.space()
        if not (yield from r.maybe("<｜tool▁call▁begin｜>")):
            break
    yield from r.close("<｜tool▁calls▁end｜>")
    r.mark = r.at


def kimi(r: Reader) -> Steps[None]:
    """``functions.name:0`` is the id, by which the result must be named too."""
    while True:
        own = yield from r.name("<|tool_call_argument_begin|>")
        r.start(own.partition(":")[0].removeprefix("functions."), own)
        yield from r.arguments()
        yield from r.close("<|tool_call_end|>")
        r.end()
        yield from r.space()
        if not (yield from r.maybe("<|tool_call_begin|>")):
            break
    yield from r.close("<|tool_calls_section_end|>")
    r.mark = r.at


def section(opener: str, read: Callable[[Reader], Steps[None]]) -> Callable[[Reader], Steps[None]]:
    """Calls that each begin with ``opener``, in a section that has an opener of its own."""

    def read_section(r: Reader) -> Steps[None]:
        yield from r.space()
        yield from r.literal(opener)
        yield from read(r)

    return read_section


def solar(r: Reader) -> Steps[None]:
    """``id<|tool_call:name|>name<|tool_call:args|>{...}``."""
    own = yield from r.name("<|tool_call:name|>")
    name = yield from r.name("<|tool_call:args|>")
    r.start(name, own or None)
    yield from r.arguments()
    yield from r.close("<|tool_call:end|>")
    r.end()


def functionary(r: Reader) -> Steps[None]:
    """Version 3.1: ``<function=name>{...}</function>``."""
    r.start((yield from r.name(">")))
    yield from r.arguments()
    yield from r.close("</function>")
    r.end()


def functionary_recipient(r: Reader) -> Steps[None]:
    """Version 3.2: ``>>>`` and who is spoken to: ``all``, or a tool."""
    name, _ = yield from r.until("\n", limit=MAX_NAME)
    if name != "all":
        r.start(name)
        yield from r.arguments()
        r.end()


def mcp(r: Reader) -> Steps[None]:
    """MiroThinker: server, tool and arguments, each in tags."""
    while True:
        yield from r.until("</server_name>", limit=MAX_NAME)
        yield from r.space()
        yield from r.literal("<tool_name>")
        r.start((yield from r.name("</tool_name>")))
        yield from r.space()
        yield from r.literal("<arguments>")
        yield from r.arguments()
        yield from r.close("</arguments>")
        r.end()
        yield from r.space()
        if not (yield from r.maybe("<server_name>")):
            break
    yield from r.close("</use_mcp_tool>")
    r.mark = r.at


class _Fields:
    """Arguments that come one by one, each with a name, become a JSON object."""

    def __init__(self, r: Reader, tool: str) -> None:
        r.start(tool)
        self._reader, self._schema = r, r.tools[tool]
        self._seen: set[str] = set()

    def add(self, name: str, text: str, *, is_json: bool | None = None) -> None:
        """One more; where the format does not say whether it is JSON, the schema does."""
        if name in self._seen:
            raise NotACall
        if is_json is None:
            value = from_text(text, name, self._schema)
        elif is_json and load(text) is None and text.strip() != "null":
            raise NotACall
        else:
            value = text.strip() if is_json else dump(text)
        self._reader.add((", " if self._seen else "{") + dump(name) + ": " + value)
        self._seen.add(name)

    def end(self) -> None:
        """That was the last."""
        self._reader.add("}" if self._seen else "{}")
        self._reader.end()


def _inside(r: Reader, close: str, *followers: str) -> Steps[str]:
    """Text up to a ``close`` that one of ``followers`` comes after: others are part of the text.

    What comes after is next to be read, without the blank space before it.
    """
    start = r.at
    while True:
        yield from r.until(close)
        end = r.at - len(close)
        yield from r.space()
        here = r.at
        for follower in followers:
            if (yield from r.maybe(follower)):
                r.at = here
                return r.text[start:end]


def qwen_coder(r: Reader) -> Steps[None]:
    """``<function=name>`` with ``<parameter=name>`` values, in a tag that some models forget."""
    outer = not r.opener.startswith("<function")
    if outer:
        yield from r.space()
        yield from r.literal("<function=")
    while True:
        fields = _Fields(r, (yield from r.name(">")))
        yield from r.space()
        while (yield from r.maybe("<parameter=")):
            key = yield from r.name(">")
            text = yield from _inside(r, "</parameter>", "<parameter=", "</function>")
            fields.add(key, text.removeprefix("\n").removesuffix("\n"))
        yield from r.literal("</function>")
        fields.end()
        yield from r.space()
        if not (yield from r.maybe("<function=")):
            break
    if outer:
        yield from r.close("</" + r.opener[1:])
        r.mark = r.at


def glm(r: Reader) -> Steps[None]:
    """The name, then ``<arg_key>`` and ``<arg_value>`` in turn."""
    name, stop = yield from r.until("<arg_key>", "</tool_call>", limit=MAX_NAME)
    fields = _Fields(r, name.strip())
    more = stop == "<arg_key>"
    while more:
        key = yield from r.name("</arg_key>")
        yield from r.space()
        yield from r.literal("<arg_value>")
        fields.add(key, (yield from _inside(r, "</arg_value>", "<arg_key>", "</tool_call>")))
        more = yield from r.maybe("<arg_key>")
        if not more:
            yield from r.literal("</tool_call>")
    fields.end()


def invokes(prefix: str) -> Callable[[Reader], Steps[None]]:
    """MiniMax and DeepSeek's DSML: ``<invoke name="...">`` with ``<parameter name="...">``."""
    invoke, invoke_end = f'<{prefix}invoke name="', f"</{prefix}invoke>"
    parameter, parameter_end = f'<{prefix}parameter name="', f"</{prefix}parameter>"

    def read(r: Reader) -> Steps[None]:
        yield from r.space()
        yield from r.literal(invoke)
        while True:
            fields = _Fields(r, (yield from r.name('">')))
            yield from r.space()
            while (yield from r.maybe(parameter)):
                key, _, attribute = (yield from r.name(">")).partition('"')
                text = yield from _inside(r, parameter_end, parameter, invoke_end)
                is_json = {'string="true"': False, 'string="false"': True}.get(attribute.strip())
                fields.add(key, text, is_json=is_json)
            yield from r.literal(invoke_end)
            fields.end()
            yield from r.space()
            if not (yield from r.maybe(invoke)):
                break
        yield from r.close("</" + r.opener[1:])
        r.mark = r.at

    return read


def python_until(closer: str) -> Callable[[Reader], Steps[None]]:
    """LFM2 and Llama: a Python list of calls, up to ``closer`` or the end of the answer."""

    def read(r: Reader) -> Steps[None]:
        yield from r.space()
        yield from r.literal("[")
        yield from r.space()
        start = r.at
        name = yield from r.name("(")
        if name not in r.tools:
            raise NotACall
        if closer:
            yield from r.until(closer)
        else:
            yield from _rest(r)
        text = r.text[start : r.at].removesuffix(closer)
        try:
            calls = _python_calls(text)
        except ValueError:
            raise NotACall from None
        if any(name not in r.tools for name, _ in calls):
            raise NotACall
        for name, arguments in calls:
            r.start(name)
            schema = r.tools[name]
            pairs = (f"{dump(key)}: {fit(value, key, schema)}" for key, value in arguments.items())
            r.add("{" + ", ".join(pairs) + "}")
            r.end()

    return read


def _rest(r: Reader) -> Steps[None]:
    """Skip to the end of the answer."""
    while not r.ended:
        yield
    r.at = len(r.text)


def _python_calls(text: str) -> list[tuple[str, dict[str, str]]]:
    """Names and arguments as JSON, of ``f(a=1), g()]``. Raises ``ValueError``."""
    reader = Literals(text)
    calls: list[tuple[str, dict[str, str]]] = []
    while not calls or reader.skip(","):
        name, arguments = reader.word(), dict[str, str]()
        if not reader.skip("("):
            raise ValueError("no call")
        while not reader.skip(")"):
            if arguments and not reader.skip(","):
                raise ValueError("a comma is missing")
            key = reader.word()
            if not reader.skip("=") or key in arguments:
                raise ValueError("no keyword argument")
            arguments[key] = reader.value()
        calls.append((name, arguments))
    if not reader.skip("]") or text[reader.at :].strip():
        raise ValueError("no list of calls")
    return calls


def gemma(closer: str) -> Callable[[Reader], Steps[None]]:
    """``call:name{key:<|"|>text<|"|>,other:3}``, up to ``closer``."""

    def read(r: Reader) -> Steps[None]:
        name = yield from r.name("{")
        if name not in r.tools:
            raise NotACall
        start = r.at - 1
        yield from r.until(closer)
        text = r.text[start : r.at - len(closer)]
        try:
            arguments = json.loads(Literals(text).whole())
        except (ValueError, RecursionError):
            raise NotACall from None
        schema = r.tools[name]
        pairs = (f"{dump(k)}: {fit(dump(v), k, schema)}" for k, v in arguments.items())
        r.start(name)
        r.add("{" + ", ".join(pairs) + "}")
        r.end()

    return read


_HARMONY_RECIPIENT = re.compile(r"\bto=([^\s<]+)")
_HARMONY_NEXT = ("<|channel|>", "<|message|>", "<|constrain|>", " to=")


def harmony(r: Reader) -> Steps[None]:
    """gpt-oss: the header of a message says its channel, and the tool if it is a call.

    https://cookbook.openai.com/articles/openai-harmony
    """
    if r.opener == "<|start|>":
        yield from r.literal("assistant")
        for follower in _HARMONY_NEXT:
            here = r.at
            if (yield from r.maybe(follower)):
                r.at = here
                break
        else:
            raise NotACall
    header, _ = yield from r.until("<|message|>", limit=MAX_NAME)
    channel = (r.opener + header).partition("<|channel|>")[2].split("<")[0].split()[:1]
    recipient = _HARMONY_RECIPIENT.search(header)
    r.mark = r.at
    if recipient and (name := recipient[1].removeprefix("functions.")) in r.tools:
        r.mode = Content
        r.start(name)
        yield from r.arguments()
        r.end()
    else:
        r.mode = Reasoning if recipient or channel == ["analysis"] else Content
