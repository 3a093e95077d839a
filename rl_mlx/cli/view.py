"""How a streamed answer looks: Markdown that grows in a terminal, or the bare text elsewhere."""

from __future__ import annotations

import re
import sys
import threading
from collections.abc import Generator
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.markdown import Markdown
from rich.segment import Segment, Segments
from rich.spinner import Spinner
from rich.text import Text

from rl_mlx.cli.terminal import without_echo
from rl_mlx.text.router import Content, Piece, Reasoning, Router, ToolCallWithdrawn
from rl_mlx.types import Chunk, FinishReason, Progress, Timings, Usage

FRAMES = 12
"""Redraws a second."""
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


@dataclass
class Reply:
    """What came of one question; ``interrupted`` when Ctrl-C ended it."""

    text: str = ""
    reasoning: str = ""
    finish_reason: FinishReason = "cancelled"
    timings: Timings | None = None
    usage: Usage | None = None
    interrupted: bool = False


class View(Protocol):
    """Where pieces of one answer go; a context manager around the answer."""

    def __enter__(self) -> View: ...
    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...

    def progress(self, progress: Progress) -> None:
        """So much of the prompt is read."""

    def add(self, text: str, *, reasoning: bool) -> None:
        """More of the answer, or of the reasoning before it."""


def show(chunks: Generator[Chunk, None, None], view: View, router: Router) -> Reply:
    """Stream an answer into ``view``. Ctrl-C closes ``chunks``, which cancels the request.

    ``router`` tells reasoning from the answer. There are no tools here, so there are no calls.
    """
    reply = Reply()

    def give(pieces: list[Piece]) -> None:
        for piece in pieces:
            if isinstance(piece, Reasoning):
                reply.reasoning += piece.text
                view.add(piece.text, reasoning=True)
            elif isinstance(piece, Content | ToolCallWithdrawn):
                reply.text += piece.text
                view.add(piece.text, reasoning=False)

    with without_echo(), view:
        try:
            for chunk in chunks:
                if chunk.progress is not None:
                    view.progress(chunk.progress)
                give(router.feed(chunk.text))
                if chunk.finish_reason is not None:
                    reply.finish_reason = chunk.finish_reason
                    reply.timings, reply.usage = chunk.timings, chunk.usage
            give(router.flush())
        except KeyboardInterrupt:
            reply.interrupted = True
        finally:
            chunks.close()
    return reply


class PlainView:
    """The answer's text and nothing else, on stdout as it comes."""

    def __enter__(self) -> PlainView:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            print(flush=True)

    def progress(self, progress: Progress) -> None:
        """Not shown."""

    def add(self, text: str, *, reasoning: bool) -> None:
        """Reasoning is left out: what reads a pipe wants the answer."""
        if not reasoning:
            sys.stdout.write(text)
            sys.stdout.flush()


class MarkdownView:
    """Markdown in a terminal, without flicker: a block that is complete is printed once and for
    all.

    Only the last block, which may still change, is drawn again; where it is taller than the
    terminal its end is shown until it is complete.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._spinner = Spinner("dots", "", style="dim")
        self._live = Live(self, console=console, transient=True, auto_refresh=False)
        # Live's own thread would race with what is printed above it; this one takes turns.
        self._lock = threading.RLock()
        self._done = threading.Event()
        self._painter = threading.Thread(target=self._paint, name="chat-painter", daemon=True)
        self._tail = ""
        self._reasoning = False
        self._printed = False

    def __enter__(self) -> MarkdownView:
        self._live.start()
        self._painter.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._done.set()
        self._painter.join()
        tail, self._tail = self._tail, ""
        self._live.stop()
        self._print(tail)

    def _paint(self) -> None:
        while not self._done.wait(1 / FRAMES):
            with self._lock:
                self._live.refresh()

    def progress(self, progress: Progress) -> None:
        """Next to the spinner, once there is something to wait for."""
        if progress.done < progress.total:
            percent = 100 * progress.done // max(progress.total, 1)
            words = f"reading the prompt: {percent}% of {progress.total} tokens"
            self._spinner.update(text=Text(words, style="dim", overflow="ellipsis", no_wrap=True))

    def add(self, text: str, *, reasoning: bool) -> None:
        """Draw more of it."""
        with self._lock:
            if reasoning != self._reasoning and self._tail:
                tail, self._tail = self._tail, ""
                self._print(tail)
            self._reasoning = reasoning
            self._tail += _CONTROL.sub("", text)
            if "\n" in text:
                done, rest = complete_blocks(self._tail)
                if done:
                    self._tail = rest
                    self._print(done)

    def _print(self, text: str) -> None:
        if text.strip():
            gap = [Segment.line()] if self._printed else []
            lines = self._lines(text, self._console, self._console.options)
            self._console.print(Segments([*gap, *_joined(lines), Segment.line()]))
            self._printed = True

    def _lines(self, text: str, console: Console, options: ConsoleOptions) -> list[list[Segment]]:
        """Rendered, without the blank lines that rich puts around some blocks."""
        block = Text(text.strip(), style="dim") if self._reasoning else Markdown(text)
        lines = console.render_lines(block, options, pad=False)
        shown = [i for i, line in enumerate(lines) if any(map(_is_seen, line))]
        return lines[shown[0] : shown[-1] + 1] if shown else []

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """The part that is still changing: the spinner, or the end of the last block."""
        tail = self._tail
        if not tail.strip():
            if self._live.is_started:
                yield self._spinner
            return
        lines = self._lines(tail, console, options)
        room = max(console.height - 2, 1)
        if self._printed and len(lines) < room:
            yield Segment.line()
        yield from _joined(lines[-room:])


def _is_seen(segment: Segment) -> bool:
    """True for what is not blank: text, or a coloured background."""
    colour = segment.style.bgcolor if segment.style else None
    return bool(segment.text.strip()) or colour is not None


def _joined(lines: list[list[Segment]]) -> list[Segment]:
    """The lines with ends between them and none after the last."""
    segments = [s for line in lines for s in (*line, Segment.line())]
    return segments[:-1]


def complete_blocks(text: str) -> tuple[str, str]:
    """Split streamed Markdown into the blocks that no later text can change, and the rest.

    Only whole lines count, and of those the last block may go on (CommonMark 0.31, appendix
    "a parsing strategy": a block is closed when a line opens another one beside it).
    """
    whole = text[: text.rfind("\n") + 1]
    starts = [
        token.map[0]
        for token in Markdown(whole).parsed
        if token.level == 0 and token.map is not None and token.nesting >= 0
    ]
    if len(starts) < 2:
        return "", text
    lines = text.split("\n")  # the only line ends that the parser counts
    return "\n".join(lines[: starts[-1]]) + "\n", "\n".join(lines[starts[-1] :])
