"""The vocabulary that a GGUF file's metadata describe."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader, GGUFWriter

from rl_mlx.convert.gguf.reader import GGUFFile
from rl_mlx.convert.gguf.vocab import TokenType, Vocab, read_vocab
from rl_mlx.errors import FormatError

Fill = Callable[[GGUFWriter], None]


@pytest.fixture
def vocab_of(tmp_path: Path) -> Callable[[Fill], Vocab]:
    """The vocabulary of a file that ``fill`` has written with gguf-py."""

    def read(fill: Fill) -> Vocab:
        path = tmp_path / "vocab.gguf"
        writer = GGUFWriter(path, "llama")
        fill(writer)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.close()
        with GGUFFile.open(path) as file:
            return read_vocab(file)

    return read


def test_everything_is_read(vocab_of: Callable[[Fill], Vocab]) -> None:
    def fill(writer: GGUFWriter) -> None:
        writer.add_name("Some Model")
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("qwen2")
        writer.add_token_list(["a", "b", "ab", "<e>"])
        writer.add_token_types([1, 1, 1, 3])
        writer.add_token_scores([0.0, -1.0, -2.5, 0.0])
        writer.add_token_merges(["a b"])
        writer.add_bos_token_id(0)
        writer.add_eos_token_id(3)
        writer.add_pad_token_id(2**32 - 1)
        writer.add_add_bos_token(True)
        writer.add_add_eos_token(False)
        writer.add_add_space_prefix(False)
        writer.add_chat_template(
            [{"name": "default", "template": "D"}, {"name": "tool_use", "template": "T"}]
        )

    vocab = vocab_of(fill)
    assert (vocab.model, vocab.pre, vocab.model_name) == ("gpt2", "qwen2", "Some Model")
    assert list(vocab.tokens) == ["a", "b", "ab", "<e>"]
    assert vocab.types.tolist() == [1, 1, 1, TokenType.CONTROL]
    assert vocab.scores is not None
    assert vocab.scores.tolist() == [0.0, -1.0, -2.5, 0.0]
    assert list(vocab.merges) == ["a b"]
    assert vocab.ids == {"bos": 0, "eos": 3}  # 2^32 - 1 says that there is none
    assert (vocab.add_bos, vocab.add_eos, vocab.add_space_prefix) == (True, False, False)
    assert vocab.templates == {"default": "D", "tool_use": "T"}


def test_silence_is_none(vocab_of: Callable[[Fill], Vocab]) -> None:
    def fill(writer: GGUFWriter) -> None:
        writer.add_tokenizer_model("llama")
        writer.add_token_list(["<unk>", "<s>", "</s>", "x"])

    vocab = vocab_of(fill)
    assert vocab.types.tolist() == [TokenType.NORMAL] * 4
    assert vocab.scores is None
    assert vocab.add_bos is None
    assert vocab.templates == {}
    assert vocab.ids == {"unk": 0, "bos": 1, "eos": 2}  # what this kind of file means by silence


def test_types_that_nobody_knows_are_undefined(vocab_of: Callable[[Fill], Vocab]) -> None:
    def fill(writer: GGUFWriter) -> None:
        writer.add_tokenizer_model("gpt2")
        writer.add_token_list(["a", "b", "c"])
        writer.add_token_types([1, 77, -5])

    assert vocab_of(fill).types.tolist() == [1, TokenType.UNDEFINED, TokenType.UNDEFINED]


def _no_tokens(writer: GGUFWriter) -> None:
    writer.add_tokenizer_model("llama")


def _few_scores(writer: GGUFWriter) -> None:
    writer.add_tokenizer_model("llama")
    writer.add_token_list(["a", "b"])
    writer.add_token_scores([1.0])


def _types_of_text(writer: GGUFWriter) -> None:
    writer.add_tokenizer_model("llama")
    writer.add_token_list(["a", "b"])
    writer.add_array("tokenizer.ggml.token_type", ["1", "1"])


def _numbers_as_tokens(writer: GGUFWriter) -> None:
    writer.add_tokenizer_model("llama")
    writer.add_array("tokenizer.ggml.tokens", [1, 2])


def _text_as_flag(writer: GGUFWriter) -> None:
    writer.add_tokenizer_model("llama")
    writer.add_token_list(["a", "b"])
    writer.add_string("tokenizer.ggml.add_bos_token", "yes")


@pytest.mark.parametrize(
    ("fill", "words"),
    [
        (_no_tokens, "has no vocabulary"),
        (_few_scores, "scores has 1 values"),
        (_types_of_text, "token_type"),
        (_numbers_as_tokens, "must be strings"),
        (_text_as_flag, "add_bos_token"),
    ],
)
def test_bad_metadata(vocab_of: Callable[[Fill], Vocab], fill: Fill, words: str) -> None:
    with pytest.raises(FormatError, match=words) as caught:
        vocab_of(fill)
    assert "\n" not in str(caught.value)


@pytest.mark.shared
def test_a_real_file_against_gguf_py(shared: Path) -> None:
    path = shared / "models" / "stories260K.gguf"
    fields = GGUFReader(path).fields
    with GGUFFile.open(path) as file:
        vocab = read_vocab(file)
    assert list(vocab.tokens) == fields["tokenizer.ggml.tokens"].contents()
    assert vocab.types.tolist() == fields["tokenizer.ggml.token_type"].contents()
    assert vocab.scores is not None
    np.testing.assert_array_equal(vocab.scores, fields["tokenizer.ggml.scores"].contents())
