"""What a model's output is made of, in the order it comes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Reasoning:
    """Text that the model thinks, and does not say."""

    text: str


@dataclass(frozen=True)
class Content:
    """Text of the answer."""

    text: str


@dataclass(frozen=True)
class ToolCallStart:
    """A call of a tool begins. ``id`` is the model's own name for it, where the format has one."""

    index: int
    name: str
    id: str | None = None


@dataclass(frozen=True)
class ToolCallArguments:
    """More of the arguments: the fragments of one call, joined, are the text of a JSON object."""

    index: int
    fragment: str


@dataclass(frozen=True)
class ToolCallEnd:
    """The call is complete and well-formed."""

    index: int


@dataclass(frozen=True)
class ToolCallWithdrawn:
    """What was begun turned out to be no call. ``text`` is all of it as the model wrote it, and is
    content.
    """

    index: int
    text: str


Piece = Reasoning | Content | ToolCallStart | ToolCallArguments | ToolCallEnd | ToolCallWithdrawn


@dataclass(frozen=True)
class ToolCall:
    """A whole call; ``arguments`` is the text of a JSON object."""

    id: str | None
    name: str
    arguments: str


@dataclass(frozen=True)
class Routed:
    """A whole answer, taken apart."""

    reasoning: str
    content: str
    calls: tuple[ToolCall, ...]


def collect(pieces: Iterable[Piece]) -> Routed:
    """The answer that pieces make together. A call that never ended is not among its calls."""
    reasoning: list[str] = []
    content: list[str] = []
    starts: dict[int, ToolCallStart] = {}
    arguments: dict[int, list[str]] = {}
    calls: list[ToolCall] = []
    for piece in pieces:
        if isinstance(piece, Reasoning):
            reasoning.append(piece.text)
        elif isinstance(piece, (Content, ToolCallWithdrawn)):
            content.append(piece.text)
        elif isinstance(piece, ToolCallStart):
            starts[piece.index], arguments[piece.index] = piece, []
        elif isinstance(piece, ToolCallArguments):
            arguments[piece.index].append(piece.fragment)
        else:
            start = starts[piece.index]
            calls.append(ToolCall(start.id, start.name, "".join(arguments[piece.index])))
    return Routed("".join(reasoning), "".join(content), tuple(calls))
