"""Chat templates: the Jinja program that a model comes with, which turns messages into a prompt."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from functools import cached_property
from typing import Any

import jinja2
from jinja2.exceptions import SecurityError

from rl_mlx.errors import InvalidRequest
from rl_mlx.text.sandbox import compile_template, run

# What Python raises where a template and its messages do not fit.
_FAILURES = (
    jinja2.TemplateError,
    TypeError,
    ValueError,
    LookupError,
    AttributeError,
    ArithmeticError,
    RecursionError,
    MemoryError,
)
# The author's own refusal (raise_exception), and the sandbox's: no other way of saying it helps.
_FINAL = (jinja2.TemplateError, SecurityError)
_PROBE = "(probe)"
_ASKS_FOR_NONE = re.compile(
    r"(?<!reasoning_)content['\"\]]*\s+(is\s+(not\s+)?|[!=]=\s*)none", re.IGNORECASE
)


class ChatTemplate:
    """One template, or several by name (``default``, ``tool_use``, ``rag``...).

    ``tokens`` are the variables that every template has: ``bos_token``, ``eos_token`` and so on.
    """

    def __init__(
        self, sources: str | Mapping[str, str], tokens: Mapping[str, str] | None = None
    ) -> None:
        named = {"default": sources} if isinstance(sources, str) else dict(sources)
        self._programs = {name: _Program(source, tokens or {}) for name, source in named.items()}
        self.sources: Mapping[str, str] = named

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        *,
        name: str | None = None,
        **variables: Any,
    ) -> str:
        """The prompt for ``messages`` (``role`` and ``content``, as OpenAI has them).

        ``content`` is a text or a list of ``{"type": "text", "text": ...}`` parts; the arguments of
        tool calls are an object or its JSON. ``name`` picks a template; without it ``tool_use`` is
        taken for tools where there is one. ``variables`` are the template's own
        (``enable_thinking``...). Raises ``InvalidRequest`` with the template's own words where it
        refuses the messages.
        """
        program = self._pick(name, bool(tools))
        plain = [_message(message, f"messages[{i}]") for i, message in enumerate(messages)]
        if not plain:
            raise InvalidRequest("messages is empty; give at least one message")
        return program.render(
            plain,
            {
                **{key: _plain(value, key) for key, value in variables.items()},
                "tools": [_plain(tool, "tools") for tool in tools] if tools else None,
                "add_generation_prompt": add_generation_prompt,
            },
        )

    def _pick(self, name: str | None, tools: bool) -> _Program:
        if name is None:
            name = "tool_use" if tools and "tool_use" in self._programs else "default"
            if name not in self._programs and len(self._programs) == 1:
                name = next(iter(self._programs))
        if name not in self._programs:
            raise InvalidRequest(
                f"there is no chat template {name!r}; known are {', '.join(self._programs)}"
            )
        return self._programs[name]


class _Program:
    """One template, compiled when it is first used."""

    def __init__(self, source: str, tokens: Mapping[str, str]) -> None:
        self._source = source
        self._tokens = dict(tokens)

    def render(self, messages: list[dict[str, Any]], variables: Mapping[str, Any]) -> str:
        shaped = [self._shape(message) for message in messages]
        first: BaseException | None = None
        for attempt in _ways(shaped, variables):
            try:
                return self._run(*attempt)
            except _FAILURES as error:
                first = first or error
                if type(error) in _FINAL:
                    break
        assert first is not None
        raise InvalidRequest(_words(first)) from first

    def _run(self, messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any]) -> str:
        given = {**variables, "messages": messages}
        return run(self._template, {**self._tokens, **copy.deepcopy(given)})

    @cached_property
    def _template(self) -> jinja2.Template:
        return compile_template(self._source)

    @cached_property
    def _wants_parts(self) -> bool:
        """Whether content must be a list of parts: a text is lost, and a list is not."""
        return not self._keeps(_PROBE) and self._keeps([{"type": "text", "text": _PROBE}])

    def _keeps(self, content: Any) -> bool:
        variables = {"tools": None, "add_generation_prompt": False}
        try:
            return _PROBE in self._run([{"role": "user", "content": content}], variables)
        except _FAILURES:
            return False

    def _shape(self, message: dict[str, Any]) -> dict[str, Any]:
        """The message in the form that the template reads."""
        content = message["content"]
        if content is None and not _ASKS_FOR_NONE.search(self._source):
            content = ""
        if isinstance(content, list) and not self._wants_parts:
            content = "\n".join(part["text"] for part in content)
        elif isinstance(content, str) and self._wants_parts:
            content = [{"type": "text", "text": content}]
        return {**message, "content": content}


def _ways(
    messages: list[dict[str, Any]], variables: Mapping[str, Any]
) -> Iterator[tuple[list[dict[str, Any]], Mapping[str, Any]]]:
    """Ways to say the same, for templates that read only one; the usual one first.

    The arguments of tool calls as JSON's text; no content as an empty text; no tools as an empty
    list; and ``functions`` and ``datetime``, which the earliest templates with tools want.
    """
    as_text = [_arguments_as_text(message) for message in messages]
    forms = [messages] if as_text == messages else [messages, as_text]
    for form in forms:
        yield form, variables
    tools = variables["tools"] or []
    early = {
        "functions": json.dumps(tools, ensure_ascii=False, indent=4),
        "datetime": datetime.now().strftime("%b %d %Y %H:%M:%S"),
        **variables,
        "tools": tools,
    }
    for form in forms:
        yield [{**m, "content": "" if m["content"] is None else m["content"]} for m in form], early


def _words(error: BaseException) -> str:
    """What a failed template has to say, in one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, jinja2.TemplateSyntaxError):
        return (
            f"the model's chat template is broken (line {error.lineno}: {text}); "
            "use generate, or pass template="
        )
    if type(error) is jinja2.TemplateError:  # raise_exception: the author's own message
        return f"the model's chat template refuses these messages: {text}"
    return f"the model's chat template failed on these messages: {text}"


def _message(message: Any, where: str) -> dict[str, Any]:
    """A message checked, as plain data; its content is a text, a list of text parts, or None."""
    if not isinstance(message, Mapping):
        raise InvalidRequest(f"{where} must be an object with role and content, not {message!r}")
    plain: dict[str, Any] = _plain(message, where)
    if not isinstance(plain.get("role"), str) or not plain["role"]:
        raise InvalidRequest(f'{where} needs a role, such as "user"')
    plain["content"] = _content(plain.get("content"), plain, where)
    calls = plain.get("tool_calls")
    if calls:
        plain["tool_calls"] = [_arguments_as_object(call) for call in calls]
    if isinstance(plain.get("reasoning_content"), str):  # gpt-oss reads it by this name
        plain.setdefault("thinking", plain["reasoning_content"])
    return plain


def _content(content: Any, message: Mapping[str, Any], where: str) -> Any:
    if content is None:
        if message["role"] != "assistant":
            raise InvalidRequest(f"{where} needs content, a text or a list of parts")
        return None
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise InvalidRequest(f"{where}: content must be a text or a list of parts")
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        if kind != "text" or not isinstance(part.get("text"), str):
            raise InvalidRequest(f"{where}: content can have text parts only, not {kind!r}")
    return content


def _arguments_as_object(call: Any) -> Any:
    """A tool call whose arguments, where they are JSON of an object, are that object."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = json.loads(function["arguments"] or "{}")
    except ValueError:
        return call
    if not isinstance(arguments, dict):
        return call
    return {**call, "function": {**function, "arguments": arguments}}


def _arguments_as_text(message: dict[str, Any]) -> dict[str, Any]:
    """The message with the arguments of its tool calls as JSON, for templates that join texts."""
    calls = []
    for call in message.get("tool_calls") or ():
        function = call.get("function") if isinstance(call, dict) else None
        if isinstance(function, dict) and isinstance(function.get("arguments"), dict):
            arguments = json.dumps(function["arguments"], ensure_ascii=False)
            call = {**call, "function": {**function, "arguments": arguments}}
        calls.append(call)
    return {**message, "tool_calls": calls} if calls else message


def _plain(value: Any, where: str) -> Any:
    """A copy out of JSON's types alone: no object with methods reaches a template."""
    if value is None or isinstance(value, (str, bool, int, float)):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(item, where) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, (bytes, bytearray)):
        return [_plain(item, where) for item in value]
    raise InvalidRequest(f"{where} has a {type(value).__name__}, which is not JSON")
