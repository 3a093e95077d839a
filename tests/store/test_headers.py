"""Headers by ranges, against a small server on this machine that counts what it sends."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest

from rl_mlx.convert import inspect
from rl_mlx.errors import FormatError, ModelNotFound, RlMlxError
from rl_mlx.store.headers import peek, repository
from rl_mlx.store.hub import HubRef
from tests.store.fakehub import FakeHub


def gguf_file(path: Path, words: int, part: tuple[int, int] | None = None) -> bytes:
    """A GGUF file with 4 MB of weights and a vocabulary of so many words."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(512)
    writer.add_embedding_length(64)
    writer.add_head_count(4)
    if part:
        writer.add_uint16("split.no", part[0])
        writer.add_uint16("split.count", part[1])
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"a rather long word {i:040}" for i in range(words)])
    writer.add_tensor(f"weight.{part}", np.ones((1024, 1024), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


def safetensors_file(tensors: int) -> bytes:
    """Tensors of 4 kB each, and of a name long enough to fill a header."""
    header = {
        f"model.layers.{i:0200}.weight": {
            "dtype": "BF16", "shape": [32, 64], "data_offsets": [4096 * i, 4096 * (i + 1)],
        }
        for i in range(tensors)
    }  # fmt: skip
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(4096 * tensors)


@pytest.mark.parametrize("words", [10, 10_000])
def test_a_gguf_header_says_what_the_file_says(
    fake_hub: FakeHub, tmp_path: Path, words: int
) -> None:
    content = gguf_file(tmp_path / "m-Q4_0.gguf", words)
    fake_hub.repos["org/m"] = {"m-Q4_0.gguf": content, "m-Q8_0.gguf": content}
    with peek(repository(HubRef("org/m", "Q4_0"))) as files:
        assert files.name == "org/m:Q4_0"
        assert inspect(files.path) == inspect(tmp_path / "m-Q4_0.gguf")
        assert files.path.stat().st_size == len(content)
    assert not files.path.exists()
    assert fake_hub.sent <= len(content) // 2
    assert {name for name, _ in fake_hub.asked} == {"m-Q4_0.gguf"}


def test_every_part_of_a_split_file_is_looked_at(fake_hub: FakeHub, tmp_path: Path) -> None:
    names = [f"m-Q4_0-0000{i}-of-00002.gguf" for i in (1, 2)]
    parts = [gguf_file(tmp_path / name, 10, (i, 2)) for i, name in enumerate(names)]
    fake_hub.repos["org/m"] = dict(zip(names, parts, strict=True))
    with peek(repository(HubRef("org/m"))) as files:
        assert inspect(files.path).parameters == 2 << 20
    assert fake_hub.sent <= 2 << 20


def test_safetensors_headers_and_the_small_files(fake_hub: FakeHub, tmp_path: Path) -> None:
    config = {
        "model_type": "llama", "hidden_size": 64, "num_attention_heads": 4,
        "num_hidden_layers": 2, "max_position_embeddings": 256,
    }  # fmt: skip
    files = {
        "config.json": json.dumps(config).encode(),
        "tokenizer_config.json": b'{"tokenizer_class": "TheirTokenizer"}',
        "tokenizer.json": b" " * (2 << 20),
        "model-00001-of-00002.safetensors": safetensors_file(1),
        "model-00002-of-00002.safetensors": safetensors_file(3000),
    }
    fake_hub.repos["org/m"] = files
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with peek(repository(HubRef("org/m"))) as found:
        facts = inspect(found.path)
    assert facts == inspect(tmp_path)
    assert facts.parameters == 3001 * 2048
    assert facts.tokenizer == "TheirTokenizer"
    assert fake_hub.sent < 1 << 20
    assert "tokenizer.json" not in {name for name, _ in fake_hub.asked}


def test_a_file_that_is_no_gguf_costs_one_request(fake_hub: FakeHub) -> None:
    fake_hub.repos["org/m"] = {"m-Q4_0.gguf": b"<html>" + bytes(4 << 20)}
    with peek(repository(HubRef("org/m"))) as files, pytest.raises(FormatError, match="web page"):
        inspect(files.path)
    assert len(fake_hub.asked) == 1


def test_a_server_without_ranges_is_left_at_once(fake_hub: FakeHub) -> None:
    fake_hub.repos["org/m"] = {"m-Q4_0.gguf": b"GGUF" + bytes(4 << 20)}
    fake_hub.ranges = False
    with pytest.raises(RlMlxError, match="whole files only"), peek(repository(HubRef("org/m"))):
        pass


@pytest.mark.parametrize(
    ("status", "code", "said"),
    [(404, "RepoNotFound", "has no model"), (403, "GatedRepo", "is gated"), (500, "", "failed")],
)
def test_what_the_hub_refuses(
    fake_hub: FakeHub, monkeypatch: pytest.MonkeyPatch, status: int, code: str, said: str
) -> None:
    monkeypatch.setattr("time.sleep", lambda _: None)
    fake_hub.statuses["org/m"] = (status, code)
    with pytest.raises((ModelNotFound, RlMlxError), match=said) as error:
        repository(HubRef("org/m"))
    assert "\n" not in str(error.value)


def test_a_file_that_is_gone(fake_hub: FakeHub) -> None:
    fake_hub.repos["org/m"] = {"m-Q4_0.gguf": b"GGUF"}
    found = repository(HubRef("org/m"))
    fake_hub.repos["org/m"] = {"other": b""}
    with pytest.raises(RlMlxError) as error, peek(found):
        pass
    assert "\n" not in str(error.value)
