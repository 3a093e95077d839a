"""Tokenizer files out of GGUF vocabularies: they say what the vocabulary says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import gguf
import pytest

from rl_mlx.convert.gguf.reader import GGUFFile
from rl_mlx.convert.tokenizer import tokenizer_files
from rl_mlx.text.tokenizer import Tokenizer

VOCABS = ["gpt-2", "llama-bpe", "llama-spm", "phi-3"]


@pytest.mark.shared
@pytest.mark.parametrize("name", VOCABS)
def test_published_cases_come_out_the_same(name: str, shared: Path, tmp_path: Path) -> None:
    path = shared / "vocab" / f"ggml-vocab-{name}.gguf"
    with GGUFFile.open(path) as file:
        files = tokenizer_files(file, 4096)
    for text, content in files.items():
        (tmp_path / text).parent.mkdir(exist_ok=True)
        (tmp_path / text).write_text(content, "utf-8")
    first, second = Tokenizer.from_gguf(path), Tokenizer.from_folder(tmp_path)
    cases = Path(f"{path}.inp").read_text("utf-8").split("\n__ggml_vocab_test__\n")
    for case in [*cases, "<s>hi</s> <|im_end|> <|eot_id|>"]:
        ids = first.encode(case)
        assert second.encode(case) == ids
        assert second.encode(case, parse_special=False) == first.encode(case, parse_special=False)
        assert second.decode(ids) == first.decode(ids)
    assert second.fingerprint == first.fingerprint
    assert second.has_template == first.has_template


def test_a_file_without_a_vocabulary_has_none(make_gguf: Callable[..., Path]) -> None:
    with GGUFFile.open(make_gguf()) as file:
        assert tokenizer_files(file, None) == {}


def test_no_template_is_written_outside_the_folder(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_tokenizer_model("llama")
    writer.add_token_list(["<unk>", "<s>", "</s>"])
    writer.add_string("tokenizer.chat_template.../../../evil", "{{ 1 }}")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with GGUFFile.open(tmp_path / "m.gguf") as file:
        names = [name for name in tokenizer_files(file, None) if name.endswith(".jinja")]
    assert names == ["additional_chat_templates/_________evil.jinja"]
