"""``rl-mlx generate`` with a fake model behind it."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rl_mlx.backends.llamacpp import LlamaCppOptions
from rl_mlx.cli import terminal
from rl_mlx.cli.generate import speed
from rl_mlx.cli.main import main
from rl_mlx.errors import ContextOverflow
from rl_mlx.settings import ModelSettings
from rl_mlx.types import Timings

Loaded = Callable[[Callable[[str], str]], list[tuple[str, ModelSettings]]]
Capture = pytest.CaptureFixture[str]


def test_the_text_is_continued(loaded: Loaded, capsys: Capture) -> None:
    asked = loaded(lambda prompt: f"[{prompt}] on")
    assert main(["generate", "some.gguf", "--prompt", "Once", "--temp", "0"]) == 0
    assert capsys.readouterr().out == "[Once] on\n"
    assert asked == [("some.gguf", ModelSettings())]


def test_options_of_the_backend(loaded: Loaded, home: Path, capsys: Capture) -> None:
    asked = loaded(lambda _: "x")
    config = home / ".config" / "rl-mlx" / "config.toml"
    config.parent.mkdir(parents=True)
    config.write_text("[backend_options]\nthreads = 3\nbatch = 64\n")
    flags = ["--gpu-layers", "20", "-O", "threads=4", "-O", "mlock=true", "-O", "tensor-split=3,1",
             "--option", "rpc=one:1,two:2"]  # fmt: skip
    assert main(["generate", "m", "-p", "x", *flags]) == 0
    options = LlamaCppOptions.of(asked[0][1].backend_options)
    assert options == LlamaCppOptions(
        gpu_layers=20, threads=4, batch=64, mlock=True, tensor_split=(3, 1), rpc=("one:1", "two:2")
    )
    capsys.readouterr()
    assert main(["generate", "m", "-p", "x", "-O", "threads"]) == 2
    assert "--option takes NAME=VALUE, not 'threads'" in capsys.readouterr().err


def test_ids(loaded: Loaded, capsys: Capture) -> None:
    loaded(lambda _: "ab")
    assert main(["generate", "m", "-p", "x", "--ids"]) == 0
    assert capsys.readouterr().out.split() == [str(ord(c) + 3) for c in "ab"]


def test_json(loaded: Loaded, capsys: Capture) -> None:
    loaded(lambda _: "héllo")
    assert main(["generate", "m", "-p", "", "-n", "3", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["text"] == "hé"
    assert document["token_ids"] == [b + 3 for b in "hé".encode()]
    assert document["finish_reason"] == "length"
    assert document["usage"] == {"prompt_tokens": 1, "completion_tokens": 3, "total_tokens": 4}
    assert document["timings"]["generated"] == 3
    assert document["model"] == "bytes"


def test_the_prompt_is_stdin_where_none_is_given(
    loaded: Loaded, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded(lambda prompt: prompt.upper())
    monkeypatch.setattr("rl_mlx.cli.generate.piped_input", lambda: "piped\n")
    assert main(["generate", "m"]) == 0
    assert capsys.readouterr().out == "PIPED\n\n"
    assert main(["generate", "m", "-p", "given"]) == 0
    assert capsys.readouterr().out == "GIVEN\n"


def test_raw_leaves_the_begin_token_out(loaded: Loaded, capsys: Capture) -> None:
    loaded(lambda prompt: "x")
    for flags, count in (([], 3), (["--raw"], 2)):
        assert main(["generate", "m", "-p", "ab", "--json", *flags]) == 0
        assert json.loads(capsys.readouterr().out)["usage"]["prompt_tokens"] == count
    assert main(["generate", "m", "-p", "", "--raw"]) == 2
    assert "with --raw it encodes to no tokens" in capsys.readouterr().err


def test_stop_and_stats(loaded: Loaded, capsys: Capture) -> None:
    loaded(lambda _: "one two three")
    assert main(["generate", "m", "-p", "x", "--stop", "two", "--stop", "END", "--stats"]) == 0
    out, err = capsys.readouterr()
    assert out == "one \n"
    assert "tok/s" in err
    assert "first token after" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["m", "-p", "x", "--temp", "-1"], "temperature must be at least 0"),
        (["m", "-p", "x", "--temp", "nan"], "temperature must be a finite number"),
        (["m", "-p", "x", "--top-p", "2"], "top_p must be"),
        (["m", "-p", "x", "-n", "-3"], "max_tokens must be at least 0"),
        (["m", "-p", "x", "--stop", ""], "stop must be non-empty"),
        (["m", "-p", "x", "--kv-bits", "5"], "kv_bits must be 4, 6 or 8"),
        (["m", "-p", "x", "--memory", "lots"], "memory must look like"),
        (["m", "-p", "x", "--context", "0"], "context must be at least 1"),
        (["m", "-p", "x", "--ids", "--json"], "exclude each other"),
        (["m", "-p", "x", "--tmep", "0"], "Did you mean --temp?"),
        (["m"], "there is no prompt: give --prompt"),
        ([], "Missing argument 'MODEL'"),
    ],
)
def test_wrong_commands(
    loaded: Loaded, capsys: Capture, arguments: list[str], message: str
) -> None:
    loaded(lambda _: "")
    assert main(["generate", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1


def test_what_fails_on_the_way(loaded: Loaded, capsys: Capture) -> None:
    def answer(_: str) -> str:
        raise ContextOverflow("the prompt has 9 tokens and the context is 8")

    loaded(answer)
    assert main(["generate", "m", "-p", "x"]) == 2
    assert capsys.readouterr().err == "error: the prompt has 9 tokens and the context is 8\n"
    assert main(["--debug", "generate", "m", "-p", "x"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_settings_come_from_the_environment_under_the_flags(
    loaded: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = loaded(lambda _: "")
    monkeypatch.setenv("RL_MLX_CONTEXT", "77")
    monkeypatch.setenv("RL_MLX_DTYPE", "float16")
    assert main(["generate", "m", "-p", "x", "--dtype", "float32"]) == 0
    assert asked[0][1] == ModelSettings(context=77, dtype="float32")


class _Stdin(io.StringIO):
    def fileno(self) -> int:
        raise OSError("no file")


@pytest.mark.parametrize("stdin", [None, _Stdin("x")])
def test_no_stdin_is_no_prompt(stdin: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", stdin)
    assert terminal.piped_input() is None


@pytest.mark.shared
def test_a_folder_that_is_exported_says_so(shared: Path, home: Path, capsys: Capture) -> None:
    pytest.importorskip("xllamacpp")
    flags = ["--backend", "llama.cpp", "-O", "threads=1", "-n", "1", "--ids", "-p", "x"]
    assert main(["generate", str(shared / "hf" / "qwen2"), *flags]) == 0
    err = capsys.readouterr().err
    assert err.startswith("exporting ")
    assert "exported 100% of " in err
    assert main(["generate", str(shared / "hf" / "qwen2"), *flags]) == 0
    assert "exporting" not in capsys.readouterr().err


def test_stats_tell_what_drafts_did() -> None:
    timings = Timings(generated=13, forwards=8, drafted=10, accepted=5, speculation_gain=1.46)
    words = speed(timings)
    assert "5 of 10 drafted accepted (50%)" in words
    assert "8 forwards, about 1.5 times as fast" in words
    assert "drafted" not in speed(Timings(generated=3))
