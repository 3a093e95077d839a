"""``Router``: the state of one answer while it comes."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from rl_mlx.errors import InvalidRequest
from rl_mlx.text.router.calls import Syntax
from rl_mlx.text.router.formats import Format
from rl_mlx.text.router.pieces import Content, Piece, Reasoning
from rl_mlx.text.router.reader import NotACall, Reader, Steps


class Router:
    """Takes one answer apart while it streams.

    ``feed`` and ``flush`` give the pieces that are certain; only what may still become a mark, and
    blank space before one, waits. However the text is cut, the pieces say the same. Text that no
    mark is in comes out as it went in. Calls are known only of ``tools`` (as OpenAI has them: none,
    and no call is looked for), and what begins like a call but is none is content unchanged:
    before its name and the opening of its arguments are certain by waiting, after that by
    ``ToolCallWithdrawn``. A call that the end of the answer cuts off in its arguments is withdrawn
    too; one that lacks only its closing marks is complete.

    ``prompt_tail`` is the end of the prompt: templates may open the reasoning there already.
    """

    def __init__(
        self,
        format: Format,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        prompt_tail: str = "",
    ) -> None:
        known = dict(map(_tool, tools or ()))
        syntaxes = [s for s in format.syntaxes if known or s.structural]
        self._format = format
        self._openers = {o: s for s in syntaxes for o in s.openers if not s.first}
        self._first = {o: s for s in syntaxes for o in s.openers if s.first}
        self._reader = Reader(known, _given(format, prompt_tail))
        self._fresh = True  # nothing but blank space so far
        self._reasoned = False
        self._steps = self._run()
        self._finished = False

    def feed(self, text: str) -> list[Piece]:
        """The pieces that are certain after more text."""
        if self._finished:
            raise RuntimeError("the answer was flushed; a router takes one answer")
        self._reader.text += text
        next(self._steps, None)
        return self._reader.take()

    def flush(self) -> list[Piece]:
        """What was held back; the answer is at its end."""
        if self._finished:
            return []
        self._finished = self._reader.ended = True
        next(self._steps, None)
        return self._reader.take()

    def _run(self) -> Steps[None]:
        while True:
            if self._fresh:
                yield from self._beginning()
            mark = yield from self._text()
            if mark is None:
                return
            if mark in self._openers:
                yield from self._calls(self._openers[mark], mark)
            else:
                self._pass(mark)

    def _beginning(self) -> Steps[None]:
        """Marks that count only where nothing was said before."""
        r = self._reader
        self._fresh = False
        yield from r.space()
        tags = self._format.tags
        # A close alone says that there was nothing to think about.
        for mark in (tags.open, tags.close) if tags.first and not self._reasoned else ():
            if (yield from r.maybe(mark)):
                self._pass(mark)
                return
        for opener, syntax in self._first.items():
            if (yield from r.maybe(opener)):
                yield from self._calls(syntax, opener)
                return
        r.at = 0

    def _pass(self, mark: str) -> None:
        """A mark that was just read is dropped, with the blank space around it."""
        r = self._reader
        tags = self._format.tags
        r.drop_to(r.at)
        if mark == tags.open:
            r.mode = Reasoning
            self._reasoned = True
        else:
            self._fresh = self._fresh or r.mode is Reasoning
            r.mode = Content

    def _marks(self) -> set[str]:
        """What is looked for now."""
        tags = self._format.tags
        marks = set(self._format.noise)
        if self._reader.mode is Reasoning:
            # A model may call from its reasoning, but only control tokens say so surely.
            return marks | {tags.close} | {o for o in self._openers if o[:2] in ("<|", "<｜", "[T")}
        marks |= self._openers.keys()
        if not tags.first:
            marks.add(tags.open)
        return marks | set(self._format.wrapping) if self._reasoned else marks

    def _text(self) -> Steps[str | None]:
        """Give out text up to the next mark, which is read; ``None`` at the end of the answer."""
        r = self._reader
        marks = self._marks()
        pattern = re.compile("|".join(map(re.escape, sorted(marks, key=len, reverse=True))))
        while True:
            found = pattern.search(r.text) if marks else None
            if found and (r.ended or not _may_grow(r.text[found.start() :], marks)):
                r.emit_to(len(r.text[: found.start()].rstrip()))
                r.at = len(r.text) - len(r.text.lstrip()) + len(found.group())
                return found.group()
            if r.ended:
                r.emit_to(len(r.text))
                return None
            held = max((_overlap(r.text, mark) for mark in marks), default=0)
            end = found.start() if found else len(r.text) - held
            r.emit_to(len(r.text[:end].rstrip()) if marks else end)
            yield

    def _calls(self, syntax: Syntax, opener: str) -> Steps[None]:
        """Calls after an opener; or it is put back as text."""
        r = self._reader
        after = r.at
        r.mark, r.opener = 0, opener
        mode = r.mode
        r.mode = Content
        if syntax.keeps:
            r.at -= len(opener)
        try:
            yield from syntax.read(r)
        except NotACall:
            if r.open:
                r.withdraw()
                r.drop_to(r.at, strip=False)
            elif r.mark:  # what came before was read, and stays so
                r.drop_to(r.mark)
            else:
                r.mode = mode
                r.emit_to(after)
        else:
            r.drop_to(r.at)


def _tool(tool: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """Name and schema of a tool."""
    function = tool.get("function")
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(name, str):
        raise InvalidRequest(
            'each of tools must be {"type": "function", "function": {"name": ...}}'
        )
    schema = function.get("parameters")
    return name, schema if isinstance(schema, Mapping) else {}


def _given(format: Format, tail: str) -> str:
    """What of the prompt belongs to the answer: a mark that it ends with."""
    tail = tail.rstrip()
    if tail.endswith(format.tags.open):
        return format.tags.open
    if format.name == "harmony":
        return "<|start|>" + tail.rpartition("<|start|>")[2] if "<|start|>" in tail[-300:] else ""
    return ">>>" if format.name == "functionary-v3.2" and tail.endswith(">>>") else ""


def _may_grow(text: str, marks: set[str]) -> bool:
    """Whether ``text`` is the start of a longer mark."""
    return any(len(mark) > len(text) and mark.startswith(text) for mark in marks)


def _overlap(text: str, mark: str) -> int:
    """How many characters at the end of ``text`` may be the start of ``mark``."""
    return next((n for n in range(len(mark) - 1, 0, -1) if text.endswith(mark[:n])), 0)
