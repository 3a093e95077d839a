"""The program as a whole: help, errors and exit codes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

import pytest

from rl_mlx import __version__
from rl_mlx.cli.main import main

Capture = pytest.CaptureFixture[str]
COMMANDS = ("chat", "generate", "show", "list", "pull", "rm", "doctor")


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["chta"], 2, "Did you mean 'chat'? See: rl-mlx --help"),
        (["chat", "--sistem", "x"], 2, "Did you mean --system? See: rl-mlx chat --help"),
        (["generate", "m", "--temp", "warm"], 2, "'--temp'"),
        (["show"], 2, "Missing argument 'MODEL'"),
        (["--nope"], 2, "No such option: --nope"),
        (["show", "./gone.gguf"], 1, "no file or folder './gone.gguf'"),
        (["show", "bad\nname"], 1, "no model"),
        (["show", ""], 2, "empty"),
        (["list", "extra"], 2, "unexpected extra argument"),
    ],
)
def test_errors_are_one_line(
    home: Path, capsys: Capture, arguments: list[str], code: int, message: str
) -> None:
    assert main(arguments) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1


def test_debug_stands_anywhere_and_shows_where(home: Path, capsys: Capture) -> None:
    for arguments in (["--debug", "show", "gone.gguf"], ["show", "gone.gguf", "--debug"]):
        assert main(arguments) == 1
        err = capsys.readouterr().err
        assert "Traceback" in err
        assert err.splitlines()[-1].startswith("error: no file or folder")
    assert main(["show", "--", "--debug"]) == 1
    assert "Traceback" not in capsys.readouterr().err


def test_files_that_cannot_be_read(
    home: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse() -> None:
        raise PermissionError(13, "Permission denied", "/some/folder")

    monkeypatch.setattr("rl_mlx.store.installed", refuse)
    assert main(["list"]) == 1
    assert capsys.readouterr().err == "error: /some/folder: Permission denied\n"


def test_help_and_version(capsys: Capture) -> None:
    assert main([]) == main(["--help"]) == main(["-h"]) == 0
    out = capsys.readouterr().out
    assert all(out.count(f"\n  {name} ") == 3 for name in COMMANDS)
    for name in COMMANDS:
        assert main([name, "--help"]) == 0
        assert f"rl-mlx {name}" in capsys.readouterr().out
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"rl-mlx {__version__}\n"


# --- in a process of its own


def python(code: str) -> list[str]:
    return [sys.executable, "-c", textwrap.dedent(code)]


def output(command: Sequence[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_help_imports_neither_mlx_nor_numpy() -> None:
    code = """
        import sys
        from rl_mlx.cli.main import main
        main(["--help"])
        heavy = {"mlx", "numpy", "rich", "prompt_toolkit", "huggingface_hub", "tokenizers"}
        print(sorted(heavy & set(sys.modules)))
    """
    assert output(python(code)).splitlines()[-1] == "[]"


SLOW = """
    import sys, time
    from rl_mlx.cli import generate, main
    from rl_mlx.types import Chunk

    class LLM:
        def __enter__(self): return self
        def __exit__(self, *exc): print("closed", file=sys.stderr)
        def generate(self, *args, **options):
            while True:
                yield Chunk(text="word\\n")
                time.sleep(0.001)

    generate.open_llm = lambda *_: LLM()
    sys.argv = ["rl-mlx", "generate", "m", "-p", "x"]
    main.run()
"""


def test_a_reader_that_goes_away_ends_it_quietly() -> None:
    with subprocess.Popen(
        python(SLOW), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == "word\n"
        process.stdout.close()
        assert process.wait(timeout=20) == 0
        assert process.stderr.read() == "closed\n"


def test_an_interrupt_ends_it_with_130() -> None:
    with subprocess.Popen(
        python(SLOW), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == "word\n"
        process.send_signal(signal.SIGINT)
        process.stdout.read()
        assert process.wait(timeout=20) == 130
        assert process.stderr.read() == "closed\n"


def test_a_bug_is_one_line_too(home: Path) -> None:
    code = """
        import sys
        from rl_mlx.cli import listing, main
        import rl_mlx.store
        rl_mlx.store.installed = lambda: 1 / 0
        sys.argv = ["rl-mlx", "list"]
        main.run()
    """
    done = subprocess.run(python(code), capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "ZeroDivisionError" in done.stderr
    assert "--debug" in done.stderr


def test_a_narrow_ascii_terminal_is_no_error(home: Path, model_file: Path) -> None:
    environment = {**os.environ, "COLUMNS": "20", "PYTHONIOENCODING": "ascii"}
    command = [sys.executable, "-m", "rl_mlx.cli.main", "show", str(model_file)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert "parameters" in done.stdout
