"""``rl-mlx list``, ``rm``, ``pull`` and ``doctor``."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path

import pytest

from rl_mlx.backends.llamacpp import LlamaCppOptions
from rl_mlx.cli import doctor
from rl_mlx.cli.main import main
from rl_mlx.convert import kernels
from rl_mlx.errors import ModelNotFound
from rl_mlx.store import ModelFiles
from rl_mlx.store.hub import HubRef

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def cached(home: Path) -> Path:
    snapshot = home / ".cache/huggingface/hub/models--org--m/snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "m-Q4_0.gguf").write_bytes(b"x" * 1500)
    return snapshot / "m-Q4_0.gguf"


@pytest.fixture
def in_lmstudio(home: Path) -> Path:
    folder = home / ".lmstudio/models/org/other"
    folder.mkdir(parents=True)
    (folder / "o-Q8_0.gguf").write_bytes(b"y")
    return folder / "o-Q8_0.gguf"


def test_list(cached: Path, in_lmstudio: Path, capsys: Capture) -> None:
    assert main(["list", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    path = str(cached)
    expected = {"name": "org/m:Q4_0", "bytes": 1500, "source": "huggingface", "path": path}
    assert rows["org/m:Q4_0"] == expected
    assert rows["org/other:Q8_0"]["source"] == "lmstudio"
    assert main(["list"]) == 0
    assert "1.5 kB  huggingface\n" in capsys.readouterr().out


def test_rm(cached: Path, in_lmstudio: Path, capsys: Capture) -> None:
    assert main(["rm", "org/m:Q4_0"]) == 2
    assert "add --yes" in capsys.readouterr().err
    assert cached.exists()
    assert main(["rm", "org/m:Q4_0", "--yes"]) == 0
    assert capsys.readouterr().out == "deleted org/m:Q4_0, 1.5 kB freed\n"
    assert not cached.exists()
    assert main(["rm", "org/m:Q4_0", "--yes"]) == 1
    assert main(["rm", "org/other:Q8_0", "--yes"]) == 2
    assert "it is LM Studio's" in capsys.readouterr().err
    assert in_lmstudio.exists()


def test_pull(home: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def download(ref: HubRef) -> ModelFiles:
        asked.append(ref)
        if ref.repo == "org/none":
            raise ModelNotFound("huggingface.co has no model org/none")
        return ModelFiles(str(ref), Path("/cache/m.gguf"))

    monkeypatch.setattr("rl_mlx.store.hub.download", download)
    assert main(["pull", "org/m:Q4_0"]) == 0
    assert capsys.readouterr().out == "org/m:Q4_0 is ready: rl-mlx chat org/m:Q4_0\n"
    assert main(["pull", "hf.co/org/m", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"name": "org/m", "path": "/cache/m.gguf"}
    assert main(["pull", "org/none"]) == 1
    assert main(["pull", "llama"]) == 2
    assert asked == [HubRef("org/m", "Q4_0"), HubRef("org/m"), HubRef("org/none")]


def test_doctor(cached: Path, capsys: Capture) -> None:
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert any(backend["available"] for backend in found["backends"])
    assert found["packages"]["typer"]
    stores = {row["source"]: row for row in found["stores"]}
    assert (stores["huggingface"]["models"], stores["huggingface"]["bytes"]) == (1, 1500)
    assert not stores["ollama"]["exists"]
    assert {row["what"]: row["writable"] for row in found["folders"]}["history"] is True
    assert found["hardware"]["options"]["threads"] == found["hardware"]["cores"]


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("import os; os.kill(os.getpid(), 4)", "died of SIGILL"),
        ("raise ImportError('no such library')", "no such library"),
    ],
)
def test_doctor_outlives_what_it_looks_at(
    home: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch, code: str, reason: str
) -> None:
    monkeypatch.setattr(doctor, "probe", lambda probe=doctor.probe: probe(code))
    assert main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert out.count("does not work: ") == 2
    assert reason in out


def test_options_in_force_are_shown(
    home: Path, model_file: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = home / ".config" / "rl-mlx" / "config.toml"
    config.parent.mkdir(parents=True)
    config.write_text("[backend_options]\nthreads = 7\ntensor_split = [3, 1]\n")
    for command in (["doctor"], ["show", str(model_file)]):
        assert main(command) == 0
        words = capsys.readouterr().out.split()
        shown = {name for name, equals, _ in (w.partition("=") for w in words) if equals}
        assert shown >= {f.name for f in fields(LlamaCppOptions)}, command
        assert {"threads=7", "tensor_split=3.0,1.0"} <= {*words}
    config.write_text("[backend_options]\nthread = 7\n")
    assert main(["show", str(model_file)]) == 2
    assert "unknown option 'thread' of llama.cpp" in capsys.readouterr().err
    config.write_text('backend = "llamacpp"\n')
    assert main(["doctor"]) == 2
    assert "unknown backend 'llamacpp'" in capsys.readouterr().err


@pytest.mark.parametrize(("built", "words"), [(object(), "compiled"), (None, "a C compiler")])
def test_doctor_says_whether_loops_were_compiled(
    home: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch, built: object, words: str
) -> None:
    monkeypatch.setattr(kernels, "library", lambda: built)
    assert main(["doctor"]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "repacking" in line]
    assert words in line
    assert main(["doctor", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["kernels"] is (built is not None)


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert doctor.writable(tmp_path / "a" / "b")
    assert not doctor.writable(tmp_path / "file" / "b")
