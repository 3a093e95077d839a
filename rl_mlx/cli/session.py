"""A chat in the terminal: questions, answers and slash commands, until it is left."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from rl_mlx.cli.conversation import Conversation
from rl_mlx.cli.generate import speed
from rl_mlx.cli.terminal import complain, note, say
from rl_mlx.cli.view import Reply, View, show
from rl_mlx.errors import ContextOverflow, InvalidRequest, RlMlxError
from rl_mlx.text.router import Router
from rl_mlx.types import Message, SamplingParams

if TYPE_CHECKING:
    from rl_mlx.llm import LLM


_ROOM = "/drop forgets the oldest turn, /clear all; --context N at the start makes room"

_TAIL = 300  # characters of a prompt that show whether it has opened reasoning itself


class Editor(Protocol):
    """Where messages come from; ``LineEditor`` in a terminal."""

    def read(self) -> str:
        """One message. Raises ``EOFError`` or ``KeyboardInterrupt``."""

    def offer(self, text: str) -> None:
        """Let the next message begin with ``text``."""

    @property
    def was_empty(self) -> bool:
        """True if nothing was typed when ``read`` ended."""


@dataclass(frozen=True)
class Command:
    """One slash command: what follows it, what it does, and the words it completes."""

    run: Callable[[str], None]
    takes: str
    help: str
    words: tuple[str, ...] = ()


def ask(llm: LLM, conversation: Conversation, question: str, view: View) -> Reply:
    """Put a question to the model and its answer into the conversation.

    A question that got no answer at all is taken back. Raises what ``LLM.chat`` raises.
    """
    message: Message = {"role": "user", "content": question}
    conversation.messages.append(message)
    reply = Reply()
    try:
        messages = conversation.prompt()
        tail = llm.apply_template(messages)[-_TAIL:]
        router = Router(llm.tokenizer.format, prompt_tail=tail)
        chunks = llm.chat(messages, stream=True, show_markers=True, params=conversation.params)
        reply = show(chunks, view, router)  # type: ignore[arg-type]
    finally:
        if reply.text or reply.reasoning:
            answer: Message = {"role": "assistant", "content": reply.text}
            if reply.reasoning:
                answer["reasoning_content"] = reply.reasoning
            conversation.messages.append(answer)
        else:
            conversation.messages.remove(message)
    return reply


class Session:
    """The loop of an interactive chat. ``view`` makes the place where the next answer is shown."""

    def __init__(
        self, llm: LLM, conversation: Conversation, view: Callable[[], View], *, stats: bool = False
    ) -> None:
        self.conversation = conversation
        self._llm = llm
        self._view = view
        self._stats = stats
        self._last: Reply | None = None
        self._left = False
        names = tuple(f.name for f in fields(SamplingParams))
        path = ("PATH",)
        self.commands = {
            "/help": Command(self._help, "", "this list"),
            "/system": Command(
                self._system, "[TEXT]", "show or set the system message; none", ("none",)
            ),
            "/clear": Command(self._clear, "", "forget the conversation"),
            "/drop": Command(self._drop, "", "forget its oldest question and answer"),
            "/save": Command(self._save, "PATH", "write the conversation to a file", path),
            "/load": Command(self._load, "PATH", "go on with a saved one", path),
            "/params": Command(
                self._params, "[NAME VALUE]", "show or set how answers are sampled", names
            ),
            "/stats": Command(
                self._show_stats, "", "speed of the last answer, room in the context"
            ),
            "/exit": Command(self._exit, "", "leave; Ctrl-D does too"),
        }

    def run(self, editor: Editor) -> None:
        """Answer until ``/exit``, Ctrl-D, or Ctrl-C twice at an empty prompt."""
        armed = False
        while not self._left:
            try:
                text = editor.read()
            except EOFError:
                return
            except KeyboardInterrupt:
                if armed and editor.was_empty:
                    return
                armed = editor.was_empty
                if armed:
                    note("Ctrl-C again leaves, as Ctrl-D and /exit do")
                continue
            armed = False
            try:
                self.handle(text)
            except ContextOverflow as error:
                editor.offer(text)
                complain(f"{error}")
                note(_ROOM)
            except KeyboardInterrupt:  # a second one, while the first was being dealt with
                note("(stopped)")
            except (RlMlxError, OSError) as error:
                complain(" ".join(str(error).split()))

    def handle(self, text: str) -> None:
        """One message: a command where it starts with a slash, else a question."""
        if text.startswith("/"):
            self._command(text)
        elif text.strip():
            self._ask(text)

    def _command(self, text: str) -> None:
        name, _, rest = text.partition(" ")
        command = self.commands.get(name)
        if command is None:
            near = difflib.get_close_matches(name, self.commands, n=1)
            hint = f"did you mean {near[0]}?" if near else "/help lists them"
            raise InvalidRequest(
                f"there is no command {name}; {hint} (a space before it makes it a message)"
            )
        rest = rest.strip()
        if rest and not command.takes:
            raise InvalidRequest(f"{name} takes nothing after it")
        if not rest and command.takes and not command.takes.startswith("["):
            raise InvalidRequest(f"{name} needs a {command.takes.lower()} after it")
        command.run(rest)

    def _ask(self, text: str) -> None:
        reply = ask(self._llm, self.conversation, text, self._view())
        if reply.timings is not None:
            self._last = reply
        if note_on_end := end_note(reply, self.conversation, self._llm.info.context):
            note(note_on_end)
        if reply.usage is not None and reply.usage.total_tokens >= self._llm.info.context:
            note(_ROOM)
        if self._stats and reply.timings is not None:
            note(speed(reply.timings))
        print()

    def _help(self, _: str) -> None:
        for name, command in self.commands.items():
            print(f"{f'{name} {command.takes}':<23} {command.help}")
        say('Alt-Enter, a backslash at the end of a line, or """ around the text: more lines')
        print("Ctrl-C stops an answer, Ctrl-D leaves")

    def _system(self, text: str) -> None:
        if text:
            self.conversation.system = None if text.casefold() == "none" else text
        print(self.conversation.system or "no system message")

    def _clear(self, _: str) -> None:
        self.conversation.messages.clear()
        self.conversation.file = None
        self._last = None
        print("cleared")

    def _drop(self, _: str) -> None:
        count = self.conversation.drop_oldest()
        print(f"{count} messages forgotten, {len(self.conversation.messages)} are left")

    def _save(self, path: str) -> None:
        self.conversation.save(Path(path).expanduser(), self._llm.info.name)
        print(f"saved to {path}")

    def _load(self, path: str) -> None:
        model = self.conversation.load(Path(path).expanduser())
        other = f", held with {model}" if model != self._llm.info.name else ""
        print(f"{len(self.conversation.messages)} messages loaded{other}")

    def _params(self, text: str) -> None:
        name, _, value = text.replace("=", " ", 1).partition(" ")
        if name == "reset" and not value:
            self.conversation.params = SamplingParams()
        elif name and not value.strip():
            raise InvalidRequest(f"/params {name} needs a value after it; /params reset undoes all")
        elif name:
            self.conversation.set_param(name, value.strip())
        changed = self.conversation.changed_params()
        for field in fields(SamplingParams):
            if not name or field.name in changed:
                mark = "*" if field.name in changed else " "
                print(f"{mark} {field.name:<20} {getattr(self.conversation.params, field.name)}")

    def _show_stats(self, _: str) -> None:
        if self._last is None or self._last.timings is None or self._last.usage is None:
            print("no answer yet")
            return
        say(speed(self._last.timings))
        say(f"context: {self._last.usage.total_tokens} of {self._llm.info.context} tokens")

    def _exit(self, _: str) -> None:
        self._left = True


def end_note(reply: Reply, conversation: Conversation, context: int) -> str | None:
    """Why an answer ended where it did, when it was not the model's own end."""
    if reply.interrupted:
        return "(stopped)"
    if reply.finish_reason != "length" or reply.usage is None:
        return None
    limit = conversation.params.max_tokens
    if limit is not None and reply.usage.completion_tokens >= limit:
        where = "while still reasoning " if not reply.text else ""
        return f"(stopped {where}at max_tokens {limit})"
    return f"(stopped: the context of {context} tokens is full)"
