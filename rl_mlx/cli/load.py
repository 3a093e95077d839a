"""From the command line to a loaded model: which one, and what is said about it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rl_mlx.cli.options import ModelFlags
from rl_mlx.cli.terminal import console, is_terminal, note, size

if TYPE_CHECKING:
    from rl_mlx.llm import LLM

SHARE = 0.5
"""Of the machine's memory, for the weights of a model that is chosen without being named."""


def open_llm(reference: str, flags: ModelFlags) -> LLM:
    """Load ``reference`` with a spinner on stderr where that is a terminal."""
    import sys

    settings = flags.settings()
    waiting: AbstractContextManager[Any] = nullcontext()
    tell: Callable[[str], None] = note
    if is_terminal(sys.stderr):
        from rl_mlx.store import find
        from rl_mlx.store.models import ModelFiles

        # A download draws bars of its own, which a spinner would tear.
        here = isinstance(find(reference), ModelFiles)
        name = reference.rpartition("/")[2]
        if here:
            waiting = spinner = console(stderr=True).status(f"loading {name}")
            tell = spinner.update
    with waiting, _telling(tell):
        from rl_mlx.llm import LLM

        return LLM(reference, **asdict(settings))


@contextmanager
def _telling(tell: Callable[[str], None]) -> Iterator[None]:
    """Tells what backends say while they load: that a folder is exported, and how far."""
    from logging import INFO, Handler, LogRecord, getLogger

    class Told(Handler):
        def emit(self, record: LogRecord) -> None:
            tell(record.getMessage())

    told, logger = Told(), getLogger("rl_mlx.backends")
    logger.addHandler(told)
    logger.setLevel(INFO)
    try:
        yield
    finally:
        logger.removeHandler(told)


def best_installed() -> str:
    """The model that ``chat`` takes when none is named, said on stderr.

    It is the largest installed one that has a chat template and whose weights fit in half of this
    machine's memory; with none of those, the built-in demo.
    """
    from rl_mlx.backends.machine import memory_total
    from rl_mlx.store import installed
    from rl_mlx.store.resolve import DEMO

    room = memory_total() * SHARE
    models = [m for m in installed() if m.name != DEMO and m.bytes <= room]
    for model in sorted(models, key=lambda m: m.bytes, reverse=True):
        if _chats(model.path):
            note(
                f"{model.name} ({size(model.bytes)}), the largest installed model that fits; "
                "-m names another"
            )
            return model.name
    note(
        "the built-in demo model, as no other is installed; get a real one by: rl-mlx pull org/repo"
    )
    return DEMO


def _chats(path: Path) -> bool:
    """True for a model with a chat template; false also for one that cannot be read."""
    from rl_mlx.convert.files import read_json
    from rl_mlx.convert.gguf.reader import GGUFFile
    from rl_mlx.errors import RlMlxError

    if path.is_dir():
        settings = read_json(path / "tokenizer_config.json")
        return (path / "chat_template.jinja").is_file() or "chat_template" in settings
    try:
        with GGUFFile.open(path) as file:
            return bool(file.str("tokenizer.chat_template", ""))
    except (RlMlxError, OSError):
        return False
