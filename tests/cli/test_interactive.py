"""The chat in a real (pseudo-)terminal: keys in, screen out."""

from __future__ import annotations

import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from select import select

import pytest

PROGRAM = """
    import fcntl, sys, termios, time
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # so that its Ctrl-C reaches this process
    from dataclasses import replace
    import rl_mlx.llm
    from rl_mlx.backends.fake import INFO, FakeBackend
    from rl_mlx.cli import main
    from rl_mlx.text.tokenizer import Tokenizer

    tokenizer = Tokenizer.open(sys.argv[1])

    def reply(request):
        question = tokenizer.decode(request.prompt).rpartition("<user>")[2]
        text = "# Title\\n\\nSome **bold** words." if "hi" in question else "on and on " * 10000
        for byte in text.encode():
            time.sleep(0.0005)
            yield byte + 3

    def load(model, settings):
        info = replace(INFO, vocab=tokenizer.vocab_size)
        return FakeBackend(reply, info), tokenizer

    rl_mlx.llm._load = load
    sys.argv = ["rl-mlx", "chat", sys.argv[1], "--stats"]
    main.run()
"""


class Terminal:
    """A process in a terminal of 50 columns; ``until`` gives what it shows before a text."""

    def __init__(self, home: Path, model: Path) -> None:
        self._fd, inner = pty.openpty()
        fcntl.ioctl(inner, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 50, 0, 0))
        environment = {**os.environ, "TERM": "xterm", "NO_COLOR": "1", "PROMPT_TOOLKIT_NO_CPR": "1"}
        del environment["COLUMNS"]  # the terminal itself says how wide it is
        self.process = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(PROGRAM), str(model)],
            stdin=inner, stdout=inner, stderr=inner, env=environment, cwd=home,
            start_new_session=True,
        )  # fmt: skip
        os.close(inner)
        self._rest = ""

    def type(self, keys: str) -> None:
        os.write(self._fd, keys.encode())

    def until(self, text: str, seconds: float = 20.0) -> str:
        seen, end = self._rest, time.monotonic() + seconds
        while text not in seen and time.monotonic() < end:
            if select([self._fd], [], [], 0.1)[0]:
                try:
                    seen += os.read(self._fd, 65536).decode(errors="replace")
                except OSError:  # the process has closed its end
                    break
        before, found, self._rest = seen.partition(text)
        assert found, seen
        return before

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._fd)


@pytest.fixture
def terminal(home: Path, model_file: Path) -> Iterator[Terminal]:
    terminal = Terminal(home, model_file)
    yield terminal
    terminal.close()


def test_a_session(terminal: Terminal, home: Path) -> None:
    terminal.until(">")
    terminal.type("hi\r")
    seen = terminal.until("tok/s")
    assert "Title" in seen
    assert "**" not in seen  # it was rendered
    terminal.type("go on\r")
    terminal.until("on and on")
    terminal.type("\x03")  # Ctrl-C: the answer ends, the program does not
    terminal.until("(stopped)")
    terminal.type("/params temp 3\r")
    error = terminal.until("temperature?").partition("error:")[2]
    assert max(map(len, ("error:" + error).splitlines())) <= 50  # wrapped between words
    assert "did you\r\nmean " in error
    terminal.type("/save talk.json\r")
    terminal.until("saved to talk.json")
    terminal.until(">")
    terminal.type("\x04")  # Ctrl-D
    assert terminal.process.wait(timeout=20) == 0
    assert (home / "talk.json").read_text("utf-8").count('"role"') == 4
    assert "go on" in (home / ".local/state/rl-mlx/history").read_text("utf-8")
