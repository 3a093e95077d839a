"""Small vocabularies that the tests make themselves, written with gguf-py."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from gguf import GGUFWriter
from tokenizers import models, pre_tokenizers, trainers

TEXT = """The quick brown fox jumps over the lazy dog. It's 12345 o'clock, isn't it? We'll see!
    def encode(self, text: str) -> list[int]:  # 3.14159
Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich. Où est l'été ? ¿Qué tal, señor?
Съешь же ещё этих мягких французских булок, да выпей чаю. いろはにほへと 漢字とカナ。한국어 문장.
🦙🦙 ok 🙂 ((a+b)*c) == "x"; 1,000,000.00 € == 100% -- [done]
"""
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6


@pytest.fixture
def gguf_file(tmp_path: Path) -> Callable[..., Path]:
    """Write a vocabulary: ``gguf_file("gpt2", tokens, types, merges=..., bos_token_id=...)``."""

    def write(model: str, tokens: list[str], types: list[int] | None = None, **more: Any) -> Path:
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.gguf"
        writer = GGUFWriter(path, "llama")
        writer.add_tokenizer_model(model)
        writer.add_token_list(tokens)
        if types is not None:
            writer.add_token_types(types)
        for name, value in more.items():
            if name == "templates":
                writer.add_chat_template(value)
            elif name == "name":
                writer.add_name(value)
            elif isinstance(value, bool):
                writer.add_bool(f"tokenizer.ggml.{name}", value)
            elif isinstance(value, int):
                writer.add_uint32(f"tokenizer.ggml.{name}", value)
            elif isinstance(value, str):
                writer.add_string(f"tokenizer.ggml.{name}", value)
            else:
                writer.add_array(f"tokenizer.ggml.{name}", value)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.close()
        return path

    return write


@pytest.fixture(scope="session")
def byte_level() -> tuple[list[str], list[str]]:
    """(tokens, merges) of a byte-level BPE trained here on a few lines of several scripts."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT] * 3, trainer)
    vocab = tokenizer.get_vocab()
    pairs = [
        f"{a} {b}"
        for token in sorted(vocab, key=vocab.__getitem__)
        for a, b in [(token[:at], token[at:]) for at in range(1, len(token))]
        if a in vocab and b in vocab
    ]
    return sorted(vocab, key=vocab.__getitem__), pairs


@pytest.fixture
def bpe_file(
    gguf_file: Callable[..., Path], byte_level: tuple[list[str], list[str]]
) -> Callable[..., Path]:
    """A byte-level vocabulary with ``<s> </s> <|im_end|>`` and a user-defined ``<tool>``."""
    tokens, merges = byte_level
    size = len(tokens)

    def write(**more: Any) -> Path:
        return gguf_file(
            "gpt2",
            [*tokens, "<s>", "</s>", "<|im_end|>", "<tool>"],
            [NORMAL] * size + [CONTROL, CONTROL, CONTROL, USER_DEFINED],
            merges=merges,
            **{"pre": "llama-bpe", "bos_token_id": size, "eos_token_id": size + 1, **more},
        )

    return write


@pytest.fixture
def spm_file(gguf_file: Callable[..., Path]) -> Callable[..., Path]:
    """A SentencePiece vocabulary with bytes; scores fall with the id."""
    words = ["▁the", "▁th", "he", "▁t", "▁a", "nd", "▁and", "▁▁", "▁▁▁", "in", "ing", "an", "na"]
    letters = ["▁", *"abcdefghijklmnopqrstuvwxyz.,!T"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *words, *letters]
    types = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256, *[NORMAL] * (len(words) + len(letters))]

    def write(**more: Any) -> Path:
        scores = [0.0] * 259 + [-float(i) for i in range(len(words) + len(letters))]
        return gguf_file(
            "llama",
            [*tokens, "<|user|>"],
            [*types, CONTROL],
            scores=[*scores, -1000.0],
            **{"bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0, **more},
        )

    return write
