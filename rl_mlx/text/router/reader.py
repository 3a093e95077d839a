"""Reads text that is still coming. Methods that may have to wait are generators, which yield while
they do; so a format is written down as if all of its text were there, and however the text is cut,
what is read from it is the same.
"""

from __future__ import annotations

import re
from collections.abc import Generator, Mapping
from typing import Any, TypeVar

from rl_mlx.text.router.pieces import (
    Content,
    Piece,
    Reasoning,
    ToolCallArguments,
    ToolCallEnd,
    ToolCallStart,
    ToolCallWithdrawn,
)
from rl_mlx.text.router.values import load

T = TypeVar("T")
Steps = Generator[None, None, T]
MAX_NAME = 256
_SPACE = re.compile(r"\s*")
_BARE = re.compile(r'["{}\[\]]')
_QUOTED = re.compile(r'"|\\.', re.DOTALL)
_MAX_DEPTH = 128


class NotACall(Exception):
    """What looked like a call is none: raised where that is seen, never outside this package."""


class Reader:
    """The text of one answer, and the pieces it has made so far.

    ``tools`` maps the name of each tool to the JSON Schema of its arguments.
    """

    def __init__(self, tools: Mapping[str, Mapping[str, Any]], given: str) -> None:
        self.tools = tools
        self.text = given
        self.at = 0
        self.ended = False
        self.mode: type[Reasoning] | type[Content] = Content
        self.opener = ""  # what began the calls being read
        self.mark = 0  # where the call being read begins
        self.open = False  # its start was given out
        self._silent = len(given)  # what the prompt wrote is never given out
        self._live: int | None = None  # arguments from here on are given out as they come
        self._strip = False  # blank space that follows a marker is no text
        self._index = 0
        self._out: list[Piece] = []

    # Text

    def emit(self, text: str) -> None:
        """Give out text, as reasoning or as content."""
        if self._strip:
            text = text.lstrip()
        if text:
            self._strip = False
            last = self._out[-1] if self._out else None
            if isinstance(last, self.mode):
                text = last.text + text
                self._out.pop()
            self._out.append(self.mode(text))

    def emit_to(self, end: int) -> None:
        """Give out the text up to ``end`` and forget it."""
        self.emit(self.text[min(self._silent, end) : end])
        self.drop_to(end, strip=self._strip)

    def drop_to(self, end: int, *, strip: bool = True) -> None:
        """Forget the text up to ``end``, and with ``strip`` the blank space that comes next."""
        self._strip = strip
        self._silent = max(0, self._silent - end)
        self.text = self.text[end:]
        self.at = 0

    def take(self) -> list[Piece]:
        """The pieces made since the last time."""
        self._give_live()
        out, self._out = self._out, []
        return out

    # Waiting

    def space(self) -> Steps[None]:
        """Skip blank space."""
        while True:
            found = _SPACE.match(self.text, self.at)
            self.at = found.end() if found else self.at
            if self.at < len(self.text) or self.ended:
                return
            yield

    def maybe(self, literal: str) -> Steps[bool]:
        """Skip ``literal`` if it comes next."""
        while True:
            have = self.text[self.at : self.at + len(literal)]
            if have == literal:
                self.at += len(literal)
                return True
            if self.ended or not literal.startswith(have):
                return False
            yield

    def literal(self, literal: str) -> Steps[None]:
        """Skip ``literal``, which must come next."""
        if not (yield from self.maybe(literal)):
            raise NotACall

    def close(self, literal: str) -> Steps[None]:
        """Skip blank space and ``literal``, of which the end of the answer may cut off any part."""
        yield from self.space()
        if not (yield from self.maybe(literal)):
            if not literal.startswith(self.text[self.at :]):
                raise NotACall
            self.at = len(self.text)

    def until(self, *stops: str, limit: int | None = None) -> Steps[tuple[str, str]]:
        """Skip to the end of the first of ``stops``; gives the text before it, and which it was."""
        pattern = re.compile("|".join(map(re.escape, stops)))
        longest = max(map(len, stops))
        start = scanned = self.at
        while True:
            found = pattern.search(self.text, scanned)
            passed = found.start() if found else len(self.text) - longest
            if limit is not None and passed - start > limit:
                raise NotACall
            if found:
                self.at = found.end()
                return self.text[start : found.start()], found.group()
            if self.ended:
                raise NotACall
            scanned = max(start, len(self.text) - longest + 1)
            yield

    def name(self, stop: str) -> Steps[str]:
        """A short text up to ``stop``, without the blank space around it."""
        text, _ = yield from self.until(stop, limit=MAX_NAME)
        return text.strip()

    def bracket(self) -> Steps[str]:
        """Skip to after the next bracket of JSON that is not inside a string, and give it."""
        quoted = False
        while True:
            found = (_QUOTED if quoted else _BARE).search(self.text, self.at)
            if found is None:
                escape = quoted and self.text.endswith("\\")
                self.at = max(self.at, len(self.text) - escape)
                if self.ended:
                    raise NotACall
                yield
                continue
            self.at = found.end()
            if found.group() == '"':
                quoted = not quoted
            elif not quoted:
                return found.group()

    # Calls

    def start(self, name: str, id: str | None = None) -> None:
        """A call begins; only of a tool that there is."""
        if name not in self.tools:
            raise NotACall
        self.open = True
        self._out.append(ToolCallStart(self._index, name, id))

    def add(self, fragment: str) -> None:
        """More of its arguments."""
        if fragment:
            self._out.append(ToolCallArguments(self._index, fragment))

    def live(self, start: int | None) -> None:
        """Give out the text from ``start`` on as arguments while it comes; ``None`` ends that."""
        self._give_live()
        self._live = start

    @property
    def is_live(self) -> bool:
        """Whether arguments are given out as they come."""
        return self._live is not None

    def arguments(self) -> Steps[None]:
        """The arguments, a JSON object, as they are."""
        yield from self.space()
        start = self.at
        yield from self.literal("{")
        depth = 1
        self.live(start)
        while depth:
            bracket = yield from self.bracket()
            depth += 1 if bracket in "{[" else -1
            if depth > _MAX_DEPTH:
                raise NotACall
        self.live(None)
        if not isinstance(load(self.text[start : self.at]), dict):
            raise NotACall

    def end(self) -> None:
        """The call is complete."""
        self._out.append(ToolCallEnd(self._index))
        self._next_call()

    def withdraw(self) -> None:
        """The call that has begun is none."""
        self.live(None)
        begin = max(self.mark, self._silent)
        self._out.append(ToolCallWithdrawn(self._index, self.text[begin : self.at]))
        self._next_call()

    def _next_call(self) -> None:
        self._index += 1
        self.open = False
        self.mark = self.at

    def _give_live(self) -> None:
        if self._live is not None and self.at > self._live:
            self.add(self.text[self._live : self.at])
            self._live = self.at
