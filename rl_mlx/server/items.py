"""The output items of a response, and the events that tell how they come."""

from __future__ import annotations

import base64
import secrets
from typing import Any

from rl_mlx.server.generation import Delta, call_id
from rl_mlx.server.openai_chat import logprobs_of
from rl_mlx.text.router import (
    Content,
    Piece,
    Reasoning,
    ToolCallArguments,
    ToolCallEnd,
    ToolCallStart,
    ToolCallWithdrawn,
)
from rl_mlx.text.tokenizer import Tokenizer

Event = dict[str, Any]


class Items:
    """Pieces as items: reasoning, a message, calls of functions; one is open at a time.

    ``encrypt``: thoughts get an ``encrypted_content``, which a client sends back as it came.
    """

    def __init__(self, *, encrypt: bool) -> None:
        self.output: list[dict[str, Any]] = []
        self.tokenizer: Tokenizer | None = None
        self._encrypt = encrypt
        self._open: dict[str, Any] | None = None

    def feed(self, delta: Delta) -> list[Event]:
        """The events of a delta."""
        logprobs = []
        if delta.logprobs and self.tokenizer is not None:
            logprobs = logprobs_of(delta.logprobs, self.tokenizer)["content"]
        events: list[Event] = []
        for piece in delta.pieces:
            found = self._piece(piece, logprobs)
            events += found
            if any(event["type"] == "response.output_text.delta" for event in found):
                logprobs = []
        return events

    def _piece(self, piece: Piece, logprobs: list[dict[str, Any]]) -> list[Event]:
        if isinstance(piece, (Content, ToolCallWithdrawn)):
            return self._text("message", "output_text", piece.text, logprobs)
        if isinstance(piece, Reasoning):
            return self._text("reasoning", "reasoning_text", piece.text, [])
        if isinstance(piece, ToolCallStart):
            item = {
                "type": "function_call",
                "id": _id("fc"),
                "status": "in_progress",
                "call_id": piece.id or call_id(),
                "name": piece.name,
                "arguments": "",
            }
            return [*self.close(cut=False), self._begin(item)]
        if isinstance(piece, ToolCallArguments):
            assert self._open is not None
            self._open["arguments"] += piece.fragment
            return [self._about("function_call_arguments.delta", delta=piece.fragment)]
        assert isinstance(piece, ToolCallEnd)
        return self.close(cut=False, whole=True)

    def _text(self, kind: str, part: str, text: str, logprobs: list[dict[str, Any]]) -> list[Event]:
        events: list[Event] = []
        if self._open is None or self._open["type"] != kind:
            events = self.close(cut=False)
            events.append(self._begin(_empty(kind)))
            self._item["content"].append(_part(part))
            events.append(self._about("content_part.added", content_index=0, part=_part(part)))
        content = self._item["content"][0]
        content["text"] += text
        more: dict[str, Any] = {}
        if part == "output_text":
            content["logprobs"] += logprobs
            more = {"logprobs": logprobs}
        events.append(self._about(f"{part}.delta", content_index=0, delta=text, **more))
        return events

    def close(self, *, cut: bool, whole: bool = False) -> list[Event]:
        """End the open item: by a limit (``cut``), or because all of it came (``whole``)."""
        if self._open is None:
            return []
        item, events = self._open, []
        if item["type"] == "function_call":
            item["status"] = "completed" if whole else "incomplete"
            if whole:
                done = {"name": item["name"], "arguments": item["arguments"]}
                events.append(self._about("function_call_arguments.done", **done))
        else:
            part = item["content"][0]
            more = {"logprobs": part["logprobs"]} if "logprobs" in part else {}
            done = {"content_index": 0, "text": part["text"], **more}
            events.append(self._about(f"{part['type']}.done", **done))
            events.append(self._about("content_part.done", content_index=0, part=dict(part)))
            item["status"] = "incomplete" if cut else "completed"
            if item["type"] == "reasoning" and self._encrypt:
                item["encrypted_content"] = base64.b64encode(part["text"].encode()).decode()
        at = len(self.output) - 1
        events.append({"type": "response.output_item.done", "output_index": at, "item": item})
        self._open = None
        return events

    @property
    def _item(self) -> dict[str, Any]:
        assert self._open is not None
        return self._open

    def _begin(self, item: dict[str, Any]) -> Event:
        self.output.append(item)
        self._open = item
        shown = {**item, **({"content": []} if "content" in item else {})}
        at = len(self.output) - 1
        return {"type": "response.output_item.added", "output_index": at, "item": shown}

    def _about(self, kind: str, **more: Any) -> Event:
        """An event of the open item."""
        return {
            "type": f"response.{kind}",
            "item_id": self._item["id"],
            "output_index": len(self.output) - 1,
            **more,
        }


def _id(prefix: str) -> str:
    return f"{prefix}_{secrets.token_hex(12)}"


def _empty(kind: str) -> dict[str, Any]:
    if kind == "reasoning":
        item = {"type": kind, "id": _id("rs"), "summary": []}
    else:
        item = {"type": kind, "id": _id("msg"), "role": "assistant"}
    return {**item, "status": "in_progress", "content": []}


def _part(kind: str) -> dict[str, Any]:
    extra: dict[str, Any] = {"annotations": [], "logprobs": []} if kind == "output_text" else {}
    return {"type": kind, "text": "", **extra}
