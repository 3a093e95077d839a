"""Where output goes: answers to stdout, everything about them to stderr."""

from __future__ import annotations

import json
import os
import shutil
import stat
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console


def complain(message: str) -> None:
    """One error line on stderr, red where that is a terminal that wants colours."""
    red, end = ("\033[31m", "\033[0m") if _colours(sys.stderr) else ("", "")
    label, rest = "error:", _wrapped(f"error: {message}", sys.stderr).removeprefix("error:")
    print(f"{red}{label}{end}{rest}", file=sys.stderr)


def note(message: str) -> None:
    """A line on stderr about what is going on."""
    dim, end = ("\033[2m", "\033[0m") if _colours(sys.stderr) else ("", "")
    print(f"{dim}{_wrapped(message, sys.stderr)}{end}", file=sys.stderr, flush=True)


def say(message: str) -> None:
    """A line on stdout, for people."""
    print(_wrapped(message, sys.stdout))


def _wrapped(message: str, stream: Any) -> str:
    """In a terminal, lines that end between words; elsewhere a line stays one."""
    if not is_terminal(stream):
        return message
    width = shutil.get_terminal_size().columns
    return textwrap.fill(message, width, break_long_words=False, break_on_hyphens=False)


def _colours(stream: Any) -> bool:
    return (
        is_terminal(stream) and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    )


def is_terminal(stream: Any) -> bool:
    """True for a stream that is open and a terminal."""
    return stream is not None and not stream.closed and stream.isatty()


@contextmanager
def without_echo() -> Iterator[None]:
    """What is typed meanwhile waits for the next prompt and does not tear what is drawn."""
    if not is_terminal(sys.stdin) or sys.platform == "win32":
        yield
        return
    import termios

    before = termios.tcgetattr(sys.stdin)
    quiet = [*before[:3], before[3] & ~termios.ECHO, *before[4:]]
    termios.tcsetattr(sys.stdin, termios.TCSADRAIN, quiet)
    try:
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)


def piped_input() -> str | None:
    """All of stdin where a file or a pipe feeds it; None for a terminal and ``/dev/null``."""
    try:
        mode = os.fstat(sys.stdin.fileno()).st_mode
    except (AttributeError, OSError, ValueError):  # closed, or a test's own stream
        return None
    if not (stat.S_ISREG(mode) or stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode)):
        return None
    return sys.stdin.buffer.read().decode("utf-8", errors="replace")


def console(*, stderr: bool = False) -> Console:
    """A rich console; it respects NO_COLOR, TERM and the terminal's width."""
    from rich.console import Console

    return Console(stderr=stderr, highlight=False)


def print_json(value: Any) -> None:
    """One JSON document on stdout: a line, indented where people look at it."""
    indent = 2 if is_terminal(sys.stdout) else None
    print(json.dumps(value, indent=indent, ensure_ascii=False))


def plain(text: str) -> str:
    """``text`` without what could move a terminal's cursor, or cannot be written as UTF-8."""
    kept = (c if c.isprintable() else "?" for c in text)
    return "".join(kept).encode("utf-8", "replace").decode()


def size(count: float) -> str:
    """Bytes for people: ``4.9 GB``."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
