"""``rl-mlx convert``."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
import pytest

from rl_mlx.cli import convert as module
from rl_mlx.cli.main import main

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama of one layer, with a matrix of each kind."""
    path = tmp_path_factory.mktemp("source") / "tiny-Q8_0.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(128)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_layer_norm_rms_eps(1e-5)
    rng = np.random.default_rng(0)
    matrices = ["blk.0.attn_q", "blk.0.attn_k", "blk.0.attn_v", "blk.0.attn_output"]
    matrices += ["blk.0.ffn_gate", "blk.0.ffn_up", "blk.0.ffn_down", "token_embd"]
    for name in matrices:
        weights = rng.standard_normal((64, 64)).astype(np.float32)
        kind = gguf.GGMLQuantizationType.Q8_0
        writer.add_tensor(f"{name}.weight", gguf.quants.quantize(weights, kind), raw_dtype=kind)
    for name in ("blk.0.attn_norm", "blk.0.ffn_norm", "output_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(64, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_the_table(home: Path, model: Path, tmp_path: Path, capsys: Capture) -> None:
    assert main(["convert", str(model), str(tmp_path / "out")]) == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert lines[0].split()[:3] == ["tensor", "from", "to"]
    q = next(line for line in lines if "q_proj" in line)
    assert q.split() == [
        "model.layers.0.self_attn.q_proj.weight", "Q8_0", "8-bit", "g32", "float16",
        "8.50", "9.00", "0", "0", "0%",
    ]  # fmt: skip
    assert lines[-2].startswith("all")
    assert str(tmp_path / "out") in lines[-1]
    assert "bits a weight" in lines[-1]
    assert "no tokenizer" in err


def test_json(home: Path, model: Path, tmp_path: Path, capsys: Capture) -> None:
    options = ["--quant", "q4", "--group-size", "32", "--mixed", "--role", "embed=q8"]
    options += ["--tensor", "*.ffn_none=q2", "--tensor", "*.mlp.up_proj=keep"]
    assert main(["convert", str(model), str(tmp_path / "out"), *options, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    kept = json.loads((tmp_path / "out" / "rl_mlx.json").read_text())
    assert kept.items() >= document.items()
    found = {t["name"]: t["container"] for t in document["tensors"]}
    assert found["model.layers.0.self_attn.q_proj.weight"] == "4-bit g32 float16"
    assert found["model.layers.0.self_attn.v_proj.weight"] == "6-bit g32 float16"
    assert found["model.layers.0.mlp.up_proj.weight"] == "8-bit g32 float16"
    assert document["quant"] == "q4"


def test_a_destination_that_exists(
    home: Path, model: Path, tmp_path: Path, capsys: Capture
) -> None:
    arguments = ["convert", str(model), str(tmp_path / "out")]
    assert main(arguments) == 0
    assert main(arguments) == 1
    assert "--force" in capsys.readouterr().err
    assert main([*arguments, "--force"]) == 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--mixed"], "go with --quant"),
        (["--quant", "q4", "--role", "v"], "NAME=QUANT"),
        (["--quant", "q4", "--role", "x=q4"], "v, o, down"),
        (["--quant", "q7"], "q2, q3"),
        (["--fidelity", "best"], "exact, faithful, compact"),
    ],
)
def test_wrong_commands(
    options: list[str], words: str, home: Path, model: Path, tmp_path: Path, capsys: Capture
) -> None:
    assert main(["convert", str(model), str(tmp_path / "out"), *options]) == 2
    err = capsys.readouterr().err
    assert words in err
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_the_bar_is_for_terminals(
    home: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    with module.progress_bar("x") as progress:
        assert progress is None
    monkeypatch.setattr(module, "is_terminal", lambda stream: True)
    assert main(["convert", str(model), str(tmp_path / "out")]) == 0
    assert "tensor" in capsys.readouterr().out
