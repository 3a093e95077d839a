"""How a streamed answer looks, as it comes and at the end."""

from __future__ import annotations

import io
import re
from collections.abc import Generator

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from rich.markdown import Markdown

from rl_mlx.cli.view import MarkdownView, PlainView, complete_blocks, show
from rl_mlx.text.router import Format, Router
from rl_mlx.types import Chunk, Progress, Timings, Usage

ANSWER = """# Title

A *paragraph* of some length, which a narrow terminal has to wrap more than once.

1. one
2. two

```python
x = 1

y = 2
```

| a | b |
|---|---|
| 1 | 2 |

The end."""


def router() -> Router:
    return Router(Format.of("<think>"))


def chunks(text: str, size: int = 3) -> Generator[Chunk, None, None]:
    yield Chunk(progress=Progress(1, 2))
    for i in range(0, len(text), size):
        yield Chunk(text=text[i : i + size])
    yield Chunk(finish_reason="stop", usage=Usage(1, 2), timings=Timings(generated=2))


def screen(text: str, *, width: int = 80, terminal: bool = False, size: int = 3) -> str:
    out = io.StringIO()
    console = Console(
        file=out, width=width, height=12, force_terminal=terminal, color_system=None, _environ={}
    )
    show(chunks(text, size), MarkdownView(console), router())
    return out.getvalue()


def played(output: str) -> list[str]:
    """What a terminal shows after ``output``: rich's few controls, acted out."""
    rows, row, column = [""], 0, 0
    for part in re.split(r"(\x1b\[\??[0-9;]*[A-Za-z]|[\r\n])", output):
        if part == "\n":
            row, column = row + 1, 0
            rows += [""] * (row + 1 - len(rows))
        elif part == "\r":
            column = 0
        elif part == "\x1b[2K":
            rows[row] = ""
        elif re.fullmatch(r"\x1b\[\d+A", part):
            row -= int(part[2:-1])
            assert row >= 0
        elif not part.startswith("\x1b"):
            rows[row] = rows[row][:column].ljust(column) + part + rows[row][column + len(part) :]
            column += len(part)
    return rows


def lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.strip().splitlines() if line.strip()]


@pytest.mark.parametrize("width", [20, 40, 80])
@pytest.mark.parametrize("size", [1, 7, 1000])
@pytest.mark.parametrize("terminal", [True, False])
def test_the_end_is_what_rich_makes_of_the_whole(width: int, size: int, terminal: bool) -> None:
    out = io.StringIO()
    Console(file=out, width=width, _environ={}).print(Markdown(ANSWER))
    shown = played(screen(ANSWER, width=width, size=size, terminal=terminal))
    assert lines("\n".join(shown)) == lines(out.getvalue())


def test_nothing_on_the_screen_is_wider_than_it() -> None:
    long = "word " * 30 + "\n\n" + "x" * 90 + "\n\n```\n" + "code " * 30 + "\n```\n"
    assert max(map(len, lines(screen(long, width=40)))) <= 40


PARTS = ["a\n", "\n", "# h\n", "- i\n", "```\n", "  x\n", "> q\n", "***\n", "1. n\n", "|a|b|\n"]


@given(st.lists(st.sampled_from([*PARTS, "|-|-|\n", "===\n", "b", "<div>\n"])))
def test_a_block_that_is_done_does_not_change(parts: list[str]) -> None:
    """However the text goes on, what was given as done stays the start of what is done."""
    text, done = "", ""
    for part in parts:
        text += part
        first, rest = complete_blocks(text)
        assert first + rest == text
        assert first.startswith(done)
        done = first


def test_control_characters_do_not_reach_the_terminal() -> None:
    assert "\x1b]0;" not in screen("a\x1b]0;title\x07b\x9b31m", terminal=True)
    assert "a]0;titleb31m" in screen("a\x1b]0;title\x07b\x9b31m")


def test_a_tall_block_is_shown_by_its_end_and_then_whole() -> None:
    items = "".join(f"- item {i}\n" for i in range(50))
    out = screen(items)
    assert [line.split()[-1] for line in lines(out)] == [str(i) for i in range(50)]


def test_reasoning_is_kept_apart(capsys: pytest.CaptureFixture[str]) -> None:
    text = "<think>\nhm, well\n</think>\n\nYes."
    reply = show(chunks(text), PlainView(), router())
    assert (reply.reasoning.strip(), reply.text) == ("hm, well", "Yes.")
    assert capsys.readouterr().out == "Yes.\n"
    assert lines(screen(text)) == ["hm, well", "Yes."]


def test_ctrl_c_ends_the_answer_and_keeps_what_came(capsys: pytest.CaptureFixture[str]) -> None:
    closed = []

    def interrupted() -> Generator[Chunk, None, None]:
        try:
            yield Chunk(text="so far")
            raise KeyboardInterrupt
        finally:
            closed.append(True)

    reply = show(interrupted(), PlainView(), router())
    assert (reply.text, reply.interrupted, closed) == ("so far", True, [True])
    assert reply.finish_reason == "cancelled"
