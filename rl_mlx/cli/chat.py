"""``rl-mlx chat``: talk with a model, once or until it is left."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rl_mlx.cli.load import best_installed, open_llm
from rl_mlx.cli.options import ModelFlags, SamplingFlags, takes_flags
from rl_mlx.cli.terminal import console, is_terminal, note, piped_input
from rl_mlx.errors import InvalidRequest

if TYPE_CHECKING:
    from rl_mlx.cli.conversation import Conversation
    from rl_mlx.cli.view import View
    from rl_mlx.llm import LLM

NAME = "chat"


@takes_flags
def command(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="MODEL|PROMPT",
            help="A first word with a space in it, or with ? or ! at its end, is the prompt.",
        ),
    ] = None,
    *,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="The model; all words are the prompt then.")
    ] = None,
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", help="Ask this and leave.", metavar="TEXT")
    ] = None,
    system: Annotated[
        str | None, typer.Option("--system", "-s", help="The system message.", metavar="TEXT")
    ] = None,
    stats: Annotated[
        bool, typer.Option("--stats", help="Say after each answer how fast it was.")
    ] = False,
    sampling: SamplingFlags,
    loading: ModelFlags,
) -> None:
    """Talk with a model, or ask it one thing.

    With a prompt, or text piped in, the answer is printed and that is all. With no model the
    largest installed one that fits in half the memory is taken, else the built-in demo.
    """
    reference, question = understand(words or [], model, prompt)
    piped = piped_input()
    if piped is not None:
        question = "\n\n".join(part for part in (question, piped.strip()) if part)
        if not question:
            raise InvalidRequest("there is no prompt: what was piped in is empty")
    if question is None and not is_terminal(sys.stdin):
        raise InvalidRequest("there is no prompt: give one after the model, or pipe it in")
    params = sampling.params()
    with open_llm(reference or best_installed(), loading) as llm:
        from rl_mlx.cli.conversation import Conversation

        conversation = Conversation(system=system, params=params)
        if question is None:
            _talk(llm, conversation, stats=stats)
        else:
            _answer(llm, conversation, question, stats=stats)


def understand(
    words: list[str], model: str | None, prompt: str | None
) -> tuple[str | None, str | None]:
    """Which words are the model and which the prompt.

    The first is the model, unless ``--model`` was given or it can only be a prompt: it has white
    space in it, or ends with ``?`` or ``!``, and is no existing path.
    """
    rest = list(words)
    if model is None and rest and not _is_prompt(rest[0]):
        model = rest.pop(0)
    if prompt is not None and rest:
        raise InvalidRequest(f"the prompt is given twice: by --prompt, and as {' '.join(rest)!r}")
    if prompt is None and rest:
        prompt = " ".join(rest)
    if prompt is not None and not prompt.strip():
        raise InvalidRequest("the prompt is empty; leave it out to chat")
    return model, prompt


def _is_prompt(word: str) -> bool:
    try:
        exists = Path(word).expanduser().exists()
    except (OSError, RuntimeError, ValueError):
        exists = False
    return not exists and re.search(r"\s|[?!]$", word) is not None


def _view() -> View:
    from rl_mlx.cli.view import MarkdownView, PlainView

    return MarkdownView(console()) if is_terminal(sys.stdout) else PlainView()


def _answer(llm: LLM, conversation: Conversation, question: str, *, stats: bool) -> None:
    from rl_mlx.cli.generate import speed
    from rl_mlx.cli.session import ask, end_note

    reply = ask(llm, conversation, question, _view())
    if reply.interrupted:
        raise KeyboardInterrupt
    if words := end_note(reply, conversation, llm.info.context):
        note(words)
    if stats and reply.timings is not None:
        note(speed(reply.timings))


def _talk(llm: LLM, conversation: Conversation, *, stats: bool) -> None:
    from rl_mlx.cli.history import history_path
    from rl_mlx.cli.line import LineEditor
    from rl_mlx.cli.session import Session

    session = Session(llm, conversation, _view, stats=stats)
    editor = LineEditor({n: c.words for n, c in session.commands.items()}, history_path())
    info = llm.info
    note(
        f"{info.name} on {info.backend}, {info.device}, context {info.context}; "
        "/help shows the keys"
    )
    for line in info.notes:
        note(line)
    session.run(editor)
