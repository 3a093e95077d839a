"""``rl-mlx show``: what the headers say."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from rl_mlx.cli.main import main
from rl_mlx.cli.show import count
from rl_mlx.cli.terminal import plain, size
from rl_mlx.convert import inspect
from tests.store.fakehub import serve

Capture = pytest.CaptureFixture[str]


def show(capsys: Capture, *arguments: str) -> dict[str, object]:
    assert main(["show", *arguments, "--json"]) == 0
    document: dict[str, object] = json.loads(capsys.readouterr().out)
    return document


def test_a_gguf_file(home: Path, model_file: Path, capsys: Capture) -> None:
    found = show(capsys, str(model_file))
    assert found["name"] == "bytes-F16"
    assert found["parameters"] == 260 * 8
    assert found["types"] == {"F16": 260 * 8}
    assert found["bits_per_weight"] == 16
    assert (found["context"], found["layers"], found["kv_heads"]) == (400, 2, 2)
    # 2 layers x 2 kv heads x (2 + 2) values x 2 bytes
    assert found["kv_bytes_per_token"] == 32
    assert found["memory"] == {"context": 400, "bytes": 260 * 16 + 400 * 32}
    assert found["special_ids"] == {"bos": 1, "eos": 2}
    assert found["chat_template"] is True
    assert found["backend"] in ("mlx", "llama.cpp")
    more = show(capsys, str(model_file), "--context", "1000")
    assert more["memory"] == {"context": 1000, "bytes": 260 * 16 + 1000 * 32}


def test_an_mlx_folder(home: Path, tmp_path: Path) -> None:
    config = {
        "model_type": "llama", "hidden_size": 64, "num_hidden_layers": 3, "vocab_size": 10,
        "num_attention_heads": 4, "num_key_value_heads": 1, "max_position_embeddings": 128,
        "eos_token_id": [2, 3],
        "quantization": {"group_size": 32, "bits": 4, "model.b": {"group_size": 32, "bits": 8}},
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    scales = np.zeros((8, 2), np.float16)
    tensors = {
        "model.a.weight": np.zeros((8, 8), np.uint32), "model.a.scales": scales,
        "model.a.biases": scales, "model.b.weight": np.zeros((8, 16), np.uint32),
        "model.b.scales": scales, "model.b.biases": scales, "norm.weight": np.zeros(64, np.float16),
    }  # fmt: skip
    save_file(tensors, tmp_path / "model.safetensors")
    found = inspect(tmp_path)
    assert found.types == {"4-bit": 512, "8-bit": 512, "F16": 64}
    assert found.parameters == 1088
    assert found.weight_bytes == sum(t.nbytes for t in tensors.values())
    assert found.kv_bytes_per_token == 3 * 1 * (16 + 16) * 2
    assert found.special_ids == {"eos": [2, 3]}
    assert found.format == "MLX folder"
    assert not found.chat_template


def test_for_people(home: Path, model_file: Path, capsys: Capture) -> None:
    assert main(["show", str(model_file)]) == 0
    out = capsys.readouterr().out
    assert "4.2 kB, 16.00 bits a weight (F16 100%)" in out
    assert "chat template  yes" in out


@pytest.mark.shared
def test_real_files(shared: Path, home: Path, capsys: Capture) -> None:
    found = show(capsys, str(shared / "hf" / "qwen2"))
    other = show(capsys, str(shared / "parity" / "qwen2.gguf"))
    for key in ("layers", "hidden", "heads", "kv_heads", "vocab", "kv_bytes_per_token"):
        assert found[key] == other[key]
    lfm2 = show(capsys, str(shared / "parity" / "lfm2.gguf"))
    assert lfm2["kv_heads"] == 2  # one number a layer in the file


@pytest.mark.shared
def test_broken_files_are_one_line(shared: Path, home: Path, capsys: Capture) -> None:
    files = [p for p in (shared / "malformed").rglob("*") if p.is_file()]
    assert files
    for path in files:
        code = main(["show", str(path)])
        err = capsys.readouterr().err
        assert (code, err.count("\n")) in ((0, 0), (1, 1), (2, 1)), (path, err)


def test_wrong_commands(home: Path, model_file: Path, capsys: Capture) -> None:
    assert main(["show", str(model_file), "--context", "0"]) == 2
    assert main(["show", "nothing"]) == 1
    assert "rl-mlx pull" in capsys.readouterr().err


def test_hostile_text_is_made_plain() -> None:
    assert plain("a\x1b[31m\udc80é\n") == "a?[31m?é?"


def test_numbers_for_people() -> None:
    assert [size(n) for n in (0, 999, 1500, 4_920_000_000, 2.5e12, 123e6)] == [
        "0 B", "999 B", "1.5 kB", "4.9 GB", "2.5 TB", "123 MB",
    ]  # fmt: skip
    assert [count(n) for n in (12, 292_800, 8_030_000_000)] == ["12", "293 k", "8.03 B"]


def test_a_model_on_the_hub_is_not_downloaded(
    home: Path, model_file: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = model_file.read_bytes()
    with serve() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        hub.repos["org/m"] = {"m-F16.gguf": content + bytes(8 << 20)}
        found = show(capsys, "org/m:F16")
        assert hub.sent <= 1 << 20
        hub.ranges = False
        assert main(["show", "org/m"]) == 1
    assert capsys.readouterr().err.count("\n") == 1
    assert (found["name"], found["parameters"]) == ("org/m:F16", 260 * 8)
    assert found["path"] == "https://huggingface.co/org/m (not downloaded)"
    assert not (home / ".cache").exists()
