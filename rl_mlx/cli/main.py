"""The program ``rl-mlx``: its commands, and what becomes of their errors.

Exit codes: 0 done, 1 the work failed, 2 the command was wrong, 130 interrupted. An error is one
line on stderr; ``--debug`` gives the traceback.
"""

from __future__ import annotations

import io
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any, NoReturn, cast

import typer
from typer.core import TyperGroup
from typer.main import get_command

from rl_mlx import __version__
from rl_mlx.cli import (
    bench,
    chat,
    convert,
    doctor,
    eval,
    export,
    fit,
    generate,
    listing,
    ps,
    pull,
    rm,
    serve,
    show,
)
from rl_mlx.cli.terminal import complain
from rl_mlx.errors import RlMlxError

NAME = "rl-mlx"
# What typer raises for a wrong command line; which module it lives in changed between its releases.
UsageError = cast("type[Exception]", typer.BadParameter.__bases__[0])


class _Group(TyperGroup):
    """Ends a command that was interrupted, or whose reader has gone, the way the shell expects."""

    def invoke(self, ctx: Any) -> Any:
        try:
            code = super().invoke(ctx)
            sys.stdout.flush()
        except KeyboardInterrupt:
            return 130
        except BrokenPipeError:
            return _hang_up()
        return code


def _hang_up() -> int:
    """The reader has all it wanted (``| head -1``): write no more, and be done."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


app = typer.Typer(
    name=NAME,
    cls=_Group,
    rich_markup_mode=None,  # rich would double the time of --help
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"{NAME} {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Say which this is.")
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show where an error came from; may stand anywhere.")
    ] = False,
) -> None:
    """Run open-weights language models on this machine."""


for _module in (chat, generate, serve, ps, show, fit, listing, pull, rm, convert, export, bench):
    app.command(_module.NAME)(_module.command)
app.command(doctor.NAME)(doctor.command)
app.add_typer(eval.app)


def main(arguments: Sequence[str]) -> int:
    """Run one command line; returns the exit code and raises nothing but bugs."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    debug = "--debug" in arguments[:end]
    rest = [a for a in arguments[:end] if a != "--debug"] + list(arguments[end:])
    try:
        code = get_command(app).main(rest or ["--help"], prog_name=NAME, standalone_mode=False)
    except SystemExit:  # typer's answer to a reader of --help that is gone
        return _hang_up()
    except UsageError as error:
        complain(_wrong_command(error))
        return 2
    except (RlMlxError, OSError, MemoryError, typer.Abort) as error:
        if debug:
            traceback.print_exception(error)
        complain(_one_line(error))
        return getattr(error, "exit_code", 1)
    return code if isinstance(code, int) else 0


def _wrong_command(error: Any) -> str:
    """A usage error in one line, the nearest option or command in it."""
    message = error.format_message().rstrip(".")
    if near := getattr(error, "possibilities", None):
        message = f"{error.message.rstrip('.')}. Did you mean {near[0]}?"
    command = error.ctx.command_path if error.ctx else NAME
    end = "" if message.endswith("?") else "."
    return f"{_one_line(message)}{end} See: {command} --help"


def _one_line(error: object) -> str:
    text = " ".join(str(error).split())
    if isinstance(error, OSError) and not isinstance(error, RlMlxError):
        named = f"{error.filename}: " if error.filename else ""
        text = f"{named}{error.strerror or text}"
    return text or type(error).__name__


def _bug(kind: type[BaseException], error: BaseException, _: TracebackType | None) -> None:
    """What nobody foresaw: one line as well, that says so."""
    complain(
        f"this should not have happened ({kind.__name__}: {_one_line(error)}); run it again with "
        "--debug and report what that shows"
    )


def run() -> NoReturn:
    """The entry point."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the shell: >&-
            setattr(sys, name, Path(os.devnull).open("w"))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # not a crash where a character cannot be written
            stream.reconfigure(errors="replace")
    if "--debug" not in sys.argv:
        sys.excepthook = _bug
    code = main(sys.argv[1:])
    try:
        sys.stdout.flush()  # what --help wrote
    except BrokenPipeError:
        code = _hang_up()
    sys.exit(code)


if __name__ == "__main__":
    run()
