"""The two GGUF files in the package: size, metadata, tensors and tokenizer."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from gguf import GGMLQuantizationType, GGUFReader

from rl_mlx.demo import demo_path, draft_path, vocab
from rl_mlx.demo.network import initial
from rl_mlx.demo.train import DRAFT, TARGET

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def readers() -> tuple[GGUFReader, GGUFReader]:
    return GGUFReader(demo_path()), GGUFReader(draft_path())


def test_both_together_are_small_and_the_draft_is_several_times_smaller() -> None:
    demo, draft = demo_path().stat().st_size, draft_path().stat().st_size
    assert demo + draft <= 6_000_000
    assert draft * 4 <= demo


def test_the_tokenizers_are_the_same(readers: tuple[GGUFReader, GGUFReader]) -> None:
    fields = [
        {
            name: field.contents()
            for name, field in reader.fields.items()
            if name.startswith("tokenizer.")
        }
        for reader in readers
    ]
    assert fields[0] == fields[1]
    assert len(fields[0]["tokenizer.ggml.tokens"]) == vocab.SIZE
    assert fields[0]["tokenizer.chat_template"] == vocab.CHAT_TEMPLATE


def test_tensors_are_those_of_the_shapes_and_every_matrix_is_q8_0(
    readers: tuple[GGUFReader, GGUFReader],
) -> None:
    for reader, shape in zip(readers, (TARGET, DRAFT)):
        expected = {name: list(w.shape) for name, w in initial(shape, seed=0).items()}
        assert {t.name: list(t.shape)[::-1] for t in reader.tensors} == {
            name: [int(n) for n in size] for name, size in expected.items()
        }
        for tensor in reader.tensors:
            one_row = len(tensor.shape) == 1
            wanted = GGMLQuantizationType.F32 if one_row else GGMLQuantizationType.Q8_0
            assert tensor.tensor_type == wanted


def test_the_metadata_says_what_it_is_and_names_no_machine(
    readers: tuple[GGUFReader, GGUFReader],
) -> None:
    for reader in readers:
        texts = {n: f.contents() for n, f in reader.fields.items() if n.startswith("general.")}
        assert texts["general.license"] == "apache-2.0"
        assert texts["general.author"] == "rl-mlx"
        assert "demo" in texts["general.name"]
        assert not re.search(r"/\w+/|20\d\d-|\.local|http", " ".join(map(str, texts.values())))


def test_wheels_carry_the_files() -> None:
    tool = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["setuptools"]
    patterns = tool["package-data"]["rl_mlx.demo"]
    folder = demo_path().parent
    data = [p for p in folder.iterdir() if p.suffix not in ("", ".py")]
    assert data
    assert not [p.name for p in data if not any(p.match(pattern) for pattern in patterns)]
