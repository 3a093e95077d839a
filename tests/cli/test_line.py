"""The line editor, driven by keys through a pipe."""

from __future__ import annotations

import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
from prompt_toolkit.application import create_app_session
from prompt_toolkit.completion import CompleteEvent
from prompt_toolkit.document import Document
from prompt_toolkit.input import PipeInput, create_pipe_input
from prompt_toolkit.output import DummyOutput

from rl_mlx.cli import line
from rl_mlx.cli.line import CommandCompleter, LineEditor, unfenced


@pytest.fixture
def keys(monkeypatch: pytest.MonkeyPatch) -> Iterator[PipeInput]:
    monkeypatch.setattr(line, "create_output", lambda **_: DummyOutput())
    with create_pipe_input() as pipe, create_app_session(input=pipe, output=DummyOutput()):
        yield pipe


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ("hello\r", "hello"),
        ("one\x1b\rtwo\r", "one\ntwo"),
        ("one\\\rtwo\r", "one\ntwo"),
        ('"""one\rtwo\r"""\r', "one\ntwo"),
        ("\x1b[200~pasted\ntwo\x1b[201~\r", "pasted\ntwo"),
        ("   \r", ""),
    ],
)
def test_keys(keys: PipeInput, tmp_path: Path, typed: str, message: str) -> None:
    keys.send_text(typed)
    assert LineEditor({}, tmp_path / "h").read() == message


def test_leaving(keys: PipeInput, tmp_path: Path) -> None:
    editor = LineEditor({}, tmp_path / "h")
    keys.send_text("\x04")
    with pytest.raises(EOFError):
        editor.read()
    keys.send_text("half\x03")
    with pytest.raises(KeyboardInterrupt):
        editor.read()
    assert not editor.was_empty
    keys.send_text("\x03")
    with pytest.raises(KeyboardInterrupt):
        editor.read()
    assert editor.was_empty


def test_an_offered_message_can_be_sent_again(keys: PipeInput, tmp_path: Path) -> None:
    editor = LineEditor({}, tmp_path / "h")
    editor.offer("too long")
    keys.send_text("!\r")
    assert editor.read() == "too long!"
    keys.send_text("next\r")
    assert editor.read() == "next"


def test_the_history_is_private_and_lasts(keys: PipeInput, tmp_path: Path) -> None:
    path = tmp_path / "state" / "rl-mlx" / "history"
    keys.send_text("remember me\r")
    LineEditor({}, path).read()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    keys.send_text("\x1b[A\r")  # up
    assert LineEditor({}, path).read() == "remember me"


def test_without_a_place_for_the_history(
    keys: PipeInput, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    keys.send_text("hi\r")
    assert LineEditor({}, tmp_path / "file" / "history").read() == "hi"
    assert "will not be remembered" in capsys.readouterr().err


def test_completion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "talk.json").touch()
    completer = CommandCompleter({"/save": ("PATH",), "/stats": (), "/params": ("top_k", "top_p")})

    def complete(text: str) -> list[str]:
        return [c.text for c in completer.get_completions(Document(text), CompleteEvent())]

    assert complete("/s") == ["/save", "/stats"]
    assert complete("/params top") == ["top_k", "top_p"]
    assert complete("/save ta") == ["lk.json"]
    for text in ("hello /s", "x", "/params top_k 1", "/nope x", "/save a\n/s"):
        assert complete(text) == []


def test_unfenced() -> None:
    assert unfenced('"""a"""') == "a"
    assert unfenced('"""a') == '"""a'
    assert unfenced('"""') == '"""'
