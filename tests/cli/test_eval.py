"""``rl-mlx eval``: perplexity, kl, compare."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rl_mlx.cli.main import main
from rl_mlx.lab import Comparison, Perplexity
from tests.lab.conftest import TableBackend, by_last, letter_tokenizer

Capture = pytest.CaptureFixture[str]
TEXT = "thequickbrownfoxjumpsoverthelazydog" * 4


@pytest.fixture
def models(home: Path, monkeypatch: pytest.MonkeyPatch):
    """Models of letters: ``base``, ``near`` and ``far`` from it, and ``other`` of other letters."""
    usual = letter_tokenizer(home / "usual.gguf", "a")
    other = letter_tokenizer(home / "other.gguf", "z")
    base, noise = by_last(0), by_last(1)
    tables = {
        "base": base,
        "near": lambda ids: base(ids) + 0.1 * noise(ids),
        "far": lambda ids: base(ids) + noise(ids),
        "other": base,
    }
    (home / "t.txt").write_text(TEXT)
    monkeypatch.chdir(home)
    asked = []

    def load(model, settings):
        asked.append((model, settings))
        size = {"base": 16, "near": 8}.get(model, 4)
        backend = TableBackend(
            tables[model], name=model, backend=settings.backend, bits_per_weight=size,
            weight_bytes=size,
        )  # fmt: skip
        return backend, other if model == "other" else usual

    monkeypatch.setattr("rl_mlx.llm._load", load)
    return asked


CUT = ["--text", "t.txt", "--window", "16"]


def test_perplexity(models, capsys: Capture):
    assert main(["eval", "perplexity", "base", *CUT, "--save", "p.json"]) == 0
    out, err = capsys.readouterr()
    assert out.splitlines()[0].split()[0] == "perplexity"
    assert "t.txt, 140 tokens, 140 bytes" in out
    assert "16 tokens, every 8" in out
    assert err == ""
    assert f"{Perplexity.load('p.json').value:.4f}" in out


def test_json_is_one_document(models, capsys: Capture):
    assert main(["eval", "perplexity", "base", *CUT, "--json", "--stride", "4"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["kind"], found["stride"], found["tokens"]) == ("Perplexity", 4, 140)


def test_kl_against_a_file_and_a_model(models, capsys: Capture):
    assert main(["eval", "perplexity", "base", *CUT, "--save-logits", "base.logits"]) == 0
    capsys.readouterr()
    means = []
    for command in (["near", "base.logits"], ["near", "base", *CUT], ["base", "base", *CUT]):
        assert main(["eval", "kl", *command, "--json"]) == 0
        means.append(json.loads(capsys.readouterr().out)["mean"])
    assert means[0] == pytest.approx(means[1], rel=1e-3)
    assert means[0] > 1e-4
    assert means[2] == 0
    assert main(["eval", "kl", "near", "base", *CUT]) == 0
    out = capsys.readouterr().out
    assert "nats a token" in out
    assert "same five best" in out


def test_compare(models, capsys: Capture):
    command = ["eval", "compare", "base", "near", "far", *CUT, "--save", "c.parquet"]
    assert main([*command, "--plot", "c.png"]) == 0
    head, *rows, last = capsys.readouterr().out.splitlines()
    assert head.split()[:3] == ["model", "backend", "bits"]
    assert [row.split()[0] for row in rows] == ["base", "near", "far"]
    assert last == "t.txt, 140 tokens"
    found = Comparison.load("c.parquet")
    assert 0 == found.candidates[0].kl < found.candidates[1].kl < found.candidates[2].kl
    assert [c.model for c in found.frontier] == ["far", "near"]
    assert Path("c.png").read_bytes().startswith(b"\x89PNG")


def test_one_model_on_several_backends(models, capsys: Capture):
    assert main(["eval", "compare", "base", *CUT, "--backends", "mlx,llama.cpp", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [c["backend"] for c in found["candidates"]] == ["mlx", "llama.cpp"]
    assert [settings.backend for _, settings in models] == ["mlx", "llama.cpp"]


@pytest.mark.parametrize(
    ("command", "code", "says"),
    [
        (["perplexity", "base", "--text", "t.txt", "--window", "64", "--tokens", "50"], 2,
         "t.txt has 50 tokens here, fewer than a window of 64"),
        (["perplexity", "base", "--text", "none.txt"], 1, "none.txt"),
        (["perplexity", "base", "--window", "100"], 2, "more than the context of base, 64"),
        (["kl", "near", "base.logits", "--text", "u.txt"], 2, "is of another text, t.txt"),
        (["kl", "other", "base.logits"], 2, "have different vocabularies"),
        (["kl", "near", "damaged"], 1, "damaged"),
        (["compare", "base", *CUT], 2, "a comparison needs two models"),
        (["perplexity", "base", *CUT, "--plot", "x.doc"], 2, "cannot be drawn"),
        (["perplexity", "base", *CUT, "--save-logits", "base.logits"], 1, "--force"),
        ([], 2, "rl-mlx eval --help"),
        (["perplxity", "base"], 2, "Did you mean 'perplexity'?"),
    ],
)  # fmt: skip
def test_errors_are_one_line(models, capsys: Capture, command, code, says):
    assert main(["eval", "perplexity", "base", *CUT, "--save-logits", "base.logits"]) == 0
    Path("u.txt").write_text(TEXT + "a")
    Path("damaged").write_bytes(Path("base.logits").read_bytes()[:-1])
    capsys.readouterr()
    assert main(["eval", *command]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert says in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1


def test_a_missing_package_is_one_line(models, capsys: Capture, monkeypatch):
    def nothing(name):
        raise ImportError(f"No module named {name!r}", name=name)

    monkeypatch.setattr("rl_mlx.lab.measurement.importlib.import_module", nothing)
    assert main(["eval", "perplexity", "base", *CUT, "--save", "p.parquet"]) == 1
    err = capsys.readouterr().err
    assert "pip install 'rl-mlx[lab]'" in err
    assert err.count("\n") == 1
