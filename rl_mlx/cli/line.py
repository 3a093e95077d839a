"""The line editor of the chat: many lines, a history on disk, completion of commands."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
from prompt_toolkit.document import Document
from prompt_toolkit.formatted_text import FormattedText
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.output import ColorDepth, create_output

from rl_mlx.cli.terminal import is_terminal, note

FENCE = '"""'


class LineEditor:
    """Reads one message at a time. Enter sends; Alt-Enter, a backslash at the end, or ``\"\"\"`` go
    on.
    """

    def __init__(self, commands: Mapping[str, Iterable[str]], history: Path) -> None:
        """``commands``: each slash command, and the words that may follow it or ``PATH``."""
        output = create_output(stdout=None if is_terminal(sys.stdout) else sys.stderr)
        plain = ColorDepth.DEPTH_1_BIT if os.environ.get("NO_COLOR") else None
        self._session: PromptSession[str] = PromptSession(
            message=FormattedText([("bold", "> ")]),
            prompt_continuation="  ",
            multiline=True,
            key_bindings=_bindings(),
            completer=CommandCompleter(commands),
            complete_while_typing=True,
            history=_open_history(history),
            output=output,
            color_depth=plain,
        )
        self._message = ""

    def offer(self, text: str) -> None:
        """Put ``text`` into the next line, to be edited and sent again."""
        self._message = text

    def read(self) -> str:
        """One message. Raises ``EOFError`` for Ctrl-D, ``KeyboardInterrupt`` for Ctrl-C."""
        text, self._message = self._session.prompt(default=self._message), ""
        return unfenced(text)

    @property
    def was_empty(self) -> bool:
        """True if nothing was typed when the last ``read`` ended."""
        return not self._session.default_buffer.text.strip()


def goes_on(text: str) -> bool:
    """True for a message that Enter does not send yet."""
    return text.endswith("\\") or (text.lstrip().startswith(FENCE) and not _closed(text.strip()))


def _closed(text: str) -> bool:
    return len(text) >= 2 * len(FENCE) and text.endswith(FENCE)


def unfenced(text: str) -> str:
    """The message without the quotes around it."""
    text = text.strip()
    if text.startswith(FENCE) and _closed(text):
        return text[len(FENCE) : -len(FENCE)].strip("\n")
    return text


def _bindings() -> KeyBindings:
    keys = KeyBindings()

    @keys.add("enter")
    def _(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if not goes_on(buffer.text):
            buffer.validate_and_handle()
            return
        buffer.cursor_position = len(buffer.text)
        if buffer.text.endswith("\\"):
            buffer.delete_before_cursor()
        buffer.insert_text("\n")

    @keys.add("escape", "enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    return keys


class CommandCompleter(Completer):
    """Slash commands at the start of a message, then what may follow each."""

    def __init__(self, commands: Mapping[str, Iterable[str]]) -> None:
        self._commands = {name: tuple(words) for name, words in commands.items()}
        self._paths = PathCompleter(expanduser=True)

    def get_completions(self, document: Document, event: CompleteEvent) -> Iterable[Completion]:
        """See ``Completer``."""
        text = document.text_before_cursor
        if not text.startswith("/") or "\n" in text:
            return
        command, space, rest = text.partition(" ")
        if not space:
            words = [name for name in self._commands if name.startswith(command)]
            yield from (Completion(word, -len(command)) for word in words)
        elif self._commands.get(command) == ("PATH",):
            yield from self._paths.get_completions(Document(rest), event)
        elif " " not in rest:
            words = [w for w in self._commands.get(command, ()) if w.startswith(rest)]
            yield from (Completion(word, -len(rest)) for word in words)


def _open_history(path: Path) -> History:
    """What was typed before, readable by its owner alone; in memory where the disk refuses."""
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.close(os.open(path, os.O_CREAT | os.O_RDWR | os.O_APPEND, 0o600))
        path.chmod(0o600)
    except OSError as error:
        note(f"messages will not be remembered: {path}: {error.strerror}")
        return InMemoryHistory()
    return FileHistory(path)
