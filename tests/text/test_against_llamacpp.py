"""Random texts encode as llama.cpp's own tokenizers encode them."""

from __future__ import annotations

import ctypes
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from rl_mlx.backends.llamacpp.library import open_library
from rl_mlx.convert.gguf.pretokenize import PRE_TOKENIZERS
from rl_mlx.errors import BackendUnavailable
from rl_mlx.text.tokenizer import Tokenizer

Encode = Callable[[str, bool, bool], list[int]]
ALPHABETS = [
    " \n\t\r", " ", "\n", "abcdefgh", "ABC'sStTREreLLVEved", "0123456789",
    "!?.,;:-_/\\|{}()<>$#@&*+=~^\"'", "äöüßéèñç", "абвгдежз", "漢字中文日本", "かなカナー",
    "한국어", "😀🦙🚀", "\u200b\u00a0\u3000", "²½",
]  # fmt: skip
# llama.cpp's own rendering of these looks past the cut before digits, as the models' does not.
APPROXIMATED = {"tiny_aya", "cohere2moe", "afmoe"}
# One name for each way to cut; names that mean the same are not tried twice.
NAMES = sorted({pre: name for name, pre in PRE_TOKENIZERS.items() if not pre.spaces}.values())


@pytest.fixture(scope="module")
def llama_cpp() -> Callable[[Path], Encode]:
    """Load the vocabulary of a file into llama.cpp; gives its encoder."""
    try:
        api = open_library().api
    except BackendUnavailable as error:
        pytest.skip(str(error))
    pointer, number, flag = ctypes.c_void_p, ctypes.c_int32, ctypes.c_bool
    api.llama_tokenize.argtypes = [pointer, ctypes.c_char_p, number, pointer, number, flag, flag]

    def load(path: Path) -> Encode:
        params = api.llama_model_default_params()
        params.vocab_only = True
        vocab = api.llama_model_get_vocab(api.llama_model_load_from_file(bytes(path), params))

        def encode(text: str, add_special: bool, parse_special: bool) -> list[int]:
            data = text.encode()
            ids = (number * (len(data) + 8))()
            count = api.llama_tokenize(
                vocab, data, len(data), ids, len(ids), add_special, parse_special
            )
            return list(ids[:count])

        return encode

    return load


def _texts(seed: int, count: int, words: list[str]) -> list[str]:
    chance = random.Random(seed)

    def piece() -> str:
        if words and chance.random() < 0.1:
            return chance.choice(words)
        alphabet = chance.choice(ALPHABETS)
        return "".join(chance.choice(alphabet) for _ in range(chance.randint(1, 6)))

    return ["".join(piece() for _ in range(chance.randint(1, 12))) for _ in range(count)]


def _compare(path: Path, theirs: Encode, words: list[str]) -> None:
    tokenizer = Tokenizer.from_gguf(path)
    for text in _texts(1, 80, words):
        for parse in (False, True):
            ours = tokenizer.encode(text, add_special=False, parse_special=parse)
            assert ours == theirs(text, False, parse), text


@pytest.mark.parametrize("name", sorted(set(NAMES) - APPROXIMATED))
def test_byte_level(
    llama_cpp: Callable[[Path], Encode], bpe_file: Callable[..., Path], name: str
) -> None:
    path = bpe_file(pre=name)
    _compare(path, llama_cpp(path), ["<|im_end|>", "<tool>", " the", "It's"])


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece(
    llama_cpp: Callable[[Path], Encode], spm_file: Callable[..., Path], prefix: bool
) -> None:
    path = spm_file(add_space_prefix=prefix)
    _compare(path, llama_cpp(path), ["<|user|>", "the", " banana", "anan", "   "])


@pytest.mark.shared
def test_a_real_vocabulary(llama_cpp: Callable[[Path], Encode], shared: Path) -> None:
    path = shared / "models" / "stories260K.gguf"
    _compare(path, llama_cpp(path), ["Once upon a time", " there was", "</s>", "bananana"])
