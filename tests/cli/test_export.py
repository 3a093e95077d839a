"""``rl-mlx export``."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import safetensors.numpy

from rl_mlx.cli.main import main

Capture = pytest.CaptureFixture[str]
CONFIG = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1,
    "num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 64, "rms_norm_eps": 1e-5,
    "max_position_embeddings": 128, "tie_word_embeddings": True,
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama of one layer, in bfloat16's values."""
    folder = tmp_path_factory.mktemp("tiny")
    rng = np.random.default_rng(0)
    at = "model.layers.0."
    matrices = [f"{at}self_attn.{n}_proj" for n in "qkvo"]
    matrices += [f"{at}mlp.{n}_proj" for n in ("gate", "up", "down")] + ["model.embed_tokens"]
    arrays = {f"{n}.weight": rng.normal(size=(64, 64)).astype(np.float16) for n in matrices}
    for name in (f"{at}input_layernorm", f"{at}post_attention_layernorm", "model.norm"):
        arrays[f"{name}.weight"] = np.ones(64, np.float16)
    safetensors.numpy.save_file(arrays, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


def test_the_table(home: Path, model: Path, tmp_path: Path, capsys: Capture) -> None:
    assert main(["export", str(model), str(tmp_path / "out.gguf")]) == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert lines[0].split()[:3] == ["tensor", "from", "to"]
    q = next(line for line in lines if "attn_q" in line)
    assert q.split() == ["blk.0.attn_q.weight", "float16", "F16", "16.00", "16.00", "0", "0"]
    assert lines[-2].startswith("all")
    assert "bits a weight" in lines[-1]
    assert "token ids alone" in err


def test_json_and_a_quant(home: Path, model: Path, tmp_path: Path, capsys: Capture) -> None:
    target = tmp_path / "out.gguf"
    assert main(["export", str(model), str(target), "--quant", "q8_0", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["quant"] == "Q8_0"
    assert told["file_bytes"] == target.stat().st_size
    assert {t["container"] for t in told["tensors"]} == {"Q8_0", "F32"}
    kinds = {t.tensor_type.name for t in gguf.GGUFReader(target).tensors}
    assert kinds == {"Q8_0", "F32"}


@pytest.mark.parametrize(
    ("more", "code", "reason"),
    [
        (["--quant", "Q9"], 2, "no quant"),
        (["--imatrix", "x.dat"], 2, "goes with a quant"),
        ([], 1, "--force"),
    ],
)
def test_what_cannot_be_is_one_line(
    more: list[str], code: int, reason: str, home: Path, model: Path, tmp_path: Path,
    capsys: Capture,
) -> None:  # fmt: skip
    target = tmp_path / "out.gguf"
    target.write_bytes(b"mine")
    assert main(["export", str(model), str(target), *more]) == code
    err = capsys.readouterr().err
    assert reason in err
    assert len(err.splitlines()) == 1
    assert target.read_bytes() == b"mine"
