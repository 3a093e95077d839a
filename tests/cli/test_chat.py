"""``rl-mlx chat``: which word is what, one question, and the loop of many."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from rl_mlx.cli.chat import understand
from rl_mlx.cli.conversation import Conversation
from rl_mlx.cli.load import best_installed
from rl_mlx.cli.main import main
from rl_mlx.cli.session import Session
from rl_mlx.cli.view import PlainView
from rl_mlx.errors import ContextOverflow, InvalidRequest
from rl_mlx.llm import LLM
from rl_mlx.settings import ModelSettings
from rl_mlx.store import InstalledModel

Loaded = Callable[[Callable[[str], str]], list[tuple[str, ModelSettings]]]
MakeLLM = Callable[[Callable[[str], str]], LLM]
Capture = pytest.CaptureFixture[str]


@pytest.mark.parametrize(
    ("words", "model", "prompt", "expected"),
    [
        ([], None, None, (None, None)),
        (["What is rl-mlx?"], None, None, (None, "What is rl-mlx?")),
        (["Why?"], None, None, (None, "Why?")),
        (["demo"], None, None, ("demo", None)),
        (["demo", "What", "is", "it"], None, None, ("demo", "What is it")),
        (["org/repo:Q4_K_M", "hello"], None, None, ("org/repo:Q4_K_M", "hello")),
        (["hello", "there"], "demo", None, ("demo", "hello there")),
        (["demo"], None, "hello", ("demo", "hello")),
        (["a model.gguf"], None, None, ("a model.gguf", None)),
    ],
)
def test_which_word_is_what(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    words: list[str], model: str | None, prompt: str | None, expected: object,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a model.gguf").touch()
    assert understand(words, model, prompt) == expected


@pytest.mark.parametrize(
    ("words", "model", "prompt"),
    [(["m", "x"], None, "y"), (["x"], "m", "y"), (["m", " "], None, None)],
)
def test_prompts_that_make_no_sense(
    words: list[str], model: str | None, prompt: str | None
) -> None:
    with pytest.raises(InvalidRequest, match="prompt is"):
        understand(words, model, prompt)


def test_one_question(loaded: Loaded, capsys: Capture) -> None:
    asked = loaded(lambda prompt: f"*{prompt}*")
    assert main(["chat", "m.gguf", "hi", "there", "-s", "Be brief."]) == 0
    assert capsys.readouterr().out == "*<system>Be brief.<user>hi there<assistant>*\n"
    assert asked[0][0] == "m.gguf"


def test_piped_text_is_the_prompt_or_its_end(
    loaded: Loaded, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded(lambda prompt: prompt)
    monkeypatch.setattr("rl_mlx.cli.chat.piped_input", lambda: "from a pipe\n")
    assert main(["chat", "m"]) == 0
    assert capsys.readouterr().out == "<user>from a pipe<assistant>\n"
    assert main(["chat", "m", "-p", "Sum up:"]) == 0
    assert capsys.readouterr().out == "<user>Sum up:\n\nfrom a pipe<assistant>\n"
    monkeypatch.setattr("rl_mlx.cli.chat.piped_input", lambda: " \n")
    assert main(["chat", "m"]) == 2
    assert "what was piped in is empty" in capsys.readouterr().err


def test_why_an_answer_ended(loaded: Loaded, capsys: Capture) -> None:
    loaded(lambda _: "abcdef")
    assert main(["chat", "m", "hi", "-n", "2", "--stats"]) == 0
    out, err = capsys.readouterr()
    assert out == "ab\n"
    assert "(stopped at max_tokens 2)" in err
    assert "tok/s" in err


def test_the_demo_is_taken_where_nothing_is_installed(home: Path, capsys: Capture) -> None:
    assert best_installed() == "demo"
    assert "built-in demo" in capsys.readouterr().err


def test_the_largest_that_chats_and_fits(
    home: Path, model_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    broken, folder = home / "broken.gguf", home / "folder"
    broken.write_bytes(b"GGUF")
    folder.mkdir()
    models = [
        InstalledModel("demo", model_file, "built in", 1),
        InstalledModel("small", model_file, "huggingface", 10),
        InstalledModel("good", model_file, "ollama", 40),
        InstalledModel("no-template", folder, "huggingface", 45),
        InstalledModel("broken", broken, "huggingface", 49),
        InstalledModel("large", model_file, "huggingface", 60),
    ]
    monkeypatch.setattr("rl_mlx.store.installed", lambda: iter(models))
    monkeypatch.setattr("rl_mlx.backends.machine.memory_total", lambda: 100)
    assert best_installed() == "good"
    assert "good (40 B), the largest installed" in capsys.readouterr().err


# --- the loop


class Script:
    """An editor that types lines; exceptions are raised, with an argument if text was typed."""

    def __init__(self, lines: Iterable[str | BaseException]) -> None:
        self._lines = iter(lines)
        self.offered: list[str] = []
        self.was_empty = True

    def read(self) -> str:
        line = next(self._lines, EOFError())
        if isinstance(line, BaseException):
            self.was_empty = not line.args
            raise line
        return line

    def offer(self, text: str) -> None:
        self.offered.append(text)


@pytest.fixture
def session(make_llm: MakeLLM) -> Session:
    def answer(prompt: str) -> str:
        question = prompt.rpartition("<user>")[2].removesuffix("<assistant>")
        if question == "too long":
            raise ContextOverflow("the prompt has 500 tokens and the context is 400")
        if question == "think":
            return "<think>hm</think>yes"
        return "" if question == "silence" else f"re: {question}"

    return Session(make_llm(answer), Conversation(), PlainView)


def test_a_conversation(session: Session, capsys: Capture) -> None:
    session.run(Script(["one", "", "  ", "two", "/exit", "three"]))
    assert [m["content"] for m in session.conversation.messages] == [
        "one",
        "re: one",
        "two",
        "re: two",
    ]
    assert capsys.readouterr().out == "re: one\n\nre: two\n\n"


def test_reasoning_is_kept_beside_the_answer(session: Session) -> None:
    session.run(Script(["think", "silence"]))
    assert session.conversation.messages == [
        {"role": "user", "content": "think"},
        {"role": "assistant", "content": "yes", "reasoning_content": "hm"},
    ]


def test_overflow_says_what_to_do_and_loses_nothing(session: Session, capsys: Capture) -> None:
    script = Script(["one", "too long", "/drop"])
    session.run(script)
    out, err = capsys.readouterr()
    assert "the context is 400" in err
    assert "/drop forgets" in err
    assert script.offered == ["too long"]
    assert "2 messages forgotten, 0 are left" in out


def test_ctrl_c_leaves_only_twice_at_an_empty_prompt(session: Session, capsys: Capture) -> None:
    bare, typed = KeyboardInterrupt(), KeyboardInterrupt("typed")
    keys = [typed, bare, "one", bare, typed, bare, bare, "two"]
    session.run(Script(keys))
    assert [m["content"] for m in session.conversation.messages] == ["one", "re: one"]
    assert "Ctrl-C again leaves" in capsys.readouterr().err


def test_commands(session: Session, tmp_path: Path, capsys: Capture) -> None:
    path = tmp_path / "talk.json"
    session.run(Script(["/system Be brief.", "one", f"/save {path}", "/clear", f"/load {path}"]))
    assert session.conversation.system == "Be brief."
    assert len(session.conversation.messages) == 2
    assert "2 messages loaded" in capsys.readouterr().out
    session.run(Script(["/system none", "/system", "/help", "/stats"]))
    out = capsys.readouterr().out
    assert "no system message" in out
    assert all(name in out for name in session.commands)
    session.run(Script(["one", "/stats", "/params temperature 0", "/params top_k=5"]))
    out = capsys.readouterr().out
    assert "tok/s" in out
    assert "of 400 tokens" in out
    assert "* top_k                5" in out
    session.run(Script(["/params reset"]))
    assert session.conversation.changed_params() == {}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/sysem x", "did you mean /system?"),
        ("/usr/bin", "there is no command /usr/bin"),
        ("/save", "/save needs a path"),
        ("/clear all", "/clear takes nothing"),
        ("/load nowhere.json", "there is no file"),
        ("/params temperature", "needs a value"),
        ("/params temperature hot", "temperature must be"),
        ("/params heat 3", "unknown sampling option"),
        ("/save no/such/folder/x", "No such file"),
    ],
)
def test_wrong_lines_do_not_end_the_chat(
    home: Path, session: Session, capsys: Capture, line: str, message: str
) -> None:
    session.run(Script([line, "still here"]))
    out, err = capsys.readouterr()
    assert message in err
    assert err.count("error: ") == err.count("\n") == 1
    assert "re: still here" in out
