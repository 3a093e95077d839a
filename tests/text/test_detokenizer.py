"""Streamed text is the text of all the ids, in pieces that are whole characters."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rl_mlx.errors import InvalidRequest
from rl_mlx.text.detokenizer import Detokenizer
from rl_mlx.text.tokenizer import Tokenizer

_relaxed = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(params=["bpe", "spm", "spm without prefix"])
def tokenizer(
    request: pytest.FixtureRequest, bpe_file: Callable[..., Path], spm_file: Callable[..., Path]
) -> Tokenizer:
    if request.param == "bpe":
        return Tokenizer.from_gguf(bpe_file())
    return Tokenizer.from_gguf(spm_file(add_space_prefix=request.param == "spm"))


@_relaxed
@given(data=st.data(), skip=st.booleans(), continues=st.booleans())
def test_pieces_joined_are_the_whole(
    tokenizer: Tokenizer, data: st.DataObject, skip: bool, continues: bool
) -> None:
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=40))
    stream = Detokenizer(tokenizer, skip_special=skip, continues=continues)
    text = "".join(map(stream.add, ids)) + stream.flush()
    assert text == tokenizer.decode(ids, skip_special=skip, continues=continues)


@_relaxed
@given(text=st.text(max_size=40))
def test_text_comes_back_with_no_broken_piece(tokenizer: Tokenizer, text: str) -> None:
    stream = Detokenizer(tokenizer)
    pieces = [stream.add(token) for token in tokenizer.encode(text, parse_special=False)]
    assert "".join(pieces) == text
    assert all("\ufffd" not in piece for piece in pieces if "\ufffd" not in text)
    assert stream.flush() == ""


def test_bytes_wait_for_their_character(spm_file: Callable[..., Path]) -> None:
    tokenizer = Tokenizer.from_gguf(spm_file())
    llama = [tokenizer.token_id(f"<0x{byte:02X}>") for byte in "🦙".encode()]
    stream = Detokenizer(tokenizer)
    assert [stream.add(token) for token in llama if token is not None] == ["", "", "", "🦙"]
    stream.add(llama[0] or 0)
    assert stream.flush() == "\ufffd"


def test_control_tokens_are_hidden_or_shown(bpe_file: Callable[..., Path]) -> None:
    tokenizer = Tokenizer.from_gguf(bpe_file())
    ids = tokenizer.encode("<s>a<tool>b<|im_end|>")
    assert tokenizer.decode(ids) == "a<tool>b"
    assert tokenizer.decode(ids, skip_special=False) == "<s>a<tool>b<|im_end|>"
    shown = Detokenizer(tokenizer, skip_special=False)
    assert [shown.add(token) for token in ids] == ["<s>", "a", "<tool>", "b", "<|im_end|>"]


def test_the_first_space_of_a_text_and_of_its_continuation(spm_file: Callable[..., Path]) -> None:
    tokenizer = Tokenizer.from_gguf(spm_file())
    ids = tokenizer.encode("the", add_special=False)
    assert [tokenizer.token_text(token) for token in ids] == ["▁the"]
    assert Detokenizer(tokenizer).add(ids[0]) == "the"
    assert Detokenizer(tokenizer, continues=True).add(ids[0]) == " the"
    late = Detokenizer(tokenizer)  # a hidden BOS does not count as the first
    assert late.add(tokenizer.bos_id or 0) + late.add(ids[0]) == "the"


def test_ids_outside_the_vocabulary(bpe_file: Callable[..., Path]) -> None:
    tokenizer = Tokenizer.from_gguf(bpe_file())
    for token in (-1, tokenizer.vocab_size, 10**9):
        with pytest.raises(InvalidRequest, match=f"{token} is outside the vocabulary"):
            Detokenizer(tokenizer).add(token)
        with pytest.raises(InvalidRequest, match="outside"):
            tokenizer.decode([token])
