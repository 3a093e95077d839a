"""Tokenizers of folders as GGUF metadata."""

from __future__ import annotations

import base64
import json

import numpy as np
import pytest
import tokenizers
from tokenizers import AddedToken, Regex, models, normalizers, pre_tokenizers, processors

from rl_mlx.convert.gguf.pretokenize import PRE_TOKENIZERS
from rl_mlx.convert.gguf.tokens import describe
from rl_mlx.convert.gguf.vocab import TokenType
from rl_mlx.errors import FormatError

KEY = "tokenizer.ggml."
SPACE = "\u2581"


def write(folder, encoder, **files):
    (folder / "tokenizer.json").write_text(encoder.to_str())
    for name, value in files.items():
        (folder / f"{name}.json").write_text(json.dumps(value))


def byte_level(pre="gpt-2"):
    kind = PRE_TOKENIZERS[pre]
    vocab = {"a": 0, "b": 1, "ab": 2, "c": 3}
    model = models.BPE(vocab, [("a", "b")], ignore_merges=kind.whole_words)
    encoder = tokenizers.Tokenizer(model)
    if (normalizer := kind.normalizer()) is not None:
        encoder.normalizer = normalizer
    encoder.pre_tokenizer = kind.splitter()
    return encoder


BYTE_LEVEL = [name for name, pre in PRE_TOKENIZERS.items() if not pre.spaces and name != "default"]


# Their pattern has possessive quantifiers, which change nothing.
SAME_AS_QWEN = {"bailingmoe", "bailingmoe2", "llada-moe"}


@pytest.mark.parametrize("name", BYTE_LEVEL)
def test_the_pre_tokenizer_is_known_by_how_it_cuts(name, tmp_path):
    write(tmp_path, byte_level(name))
    found, notes = describe(tmp_path, 4)
    assert notes == ()
    told, kind = PRE_TOKENIZERS[found[KEY + "pre"]], PRE_TOKENIZERS[name]
    if name in SAME_AS_QWEN:
        kind = PRE_TOKENIZERS["deepseek-r1-qwen"]
    assert (told.patterns, told.nfc, told.whole_words) == (
        kind.patterns,
        kind.nfc,
        kind.whole_words,
    )


def test_other_spellings_of_a_pattern_are_the_same(tmp_path):
    encoder = byte_level()
    encoder.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # as GPT-2 itself has
    write(tmp_path, encoder)
    assert describe(tmp_path, 4)[0][KEY + "pre"] == "gpt-2"
    numbers = pre_tokenizers.Digits(individual_digits=True)
    encoder.pre_tokenizer = pre_tokenizers.Sequence([numbers, encoder.pre_tokenizer])
    write(tmp_path, encoder)
    assert describe(tmp_path, 4)[0][KEY + "pre"] == "starcoder"


def test_a_pre_tokenizer_of_its_own_is_noted(tmp_path):
    encoder = byte_level()
    encoder.pre_tokenizer = pre_tokenizers.Split(Regex("[aeiou]"), "isolated")
    write(tmp_path, encoder)
    found, (note,) = describe(tmp_path, 4)
    assert found[KEY + "pre"] == "default"
    assert "no pre-tokenizer" in note


def test_tokens_types_merges_and_special_ones(tmp_path):
    encoder = byte_level()
    encoder.add_special_tokens(["<s>", "</s>", "<turn>"])
    encoder.add_tokens([AddedToken("<tool>", normalized=False)])
    encoder.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 4)]
    )
    write(
        tmp_path,
        encoder,
        tokenizer_config={"bos_token": {"content": "<s>"}, "eos_token": "</s>", "pad_token": "no"},
        generation_config={"eos_token_id": [5, 6]},
    )
    found, _ = describe(tmp_path, 10)
    assert found[KEY + "model"] == "gpt2"
    assert found[KEY + "tokens"] == [
        "a", "b", "ab", "c", "<s>", "</s>", "<turn>", "<tool>", "[PAD8]", "[PAD9]",
    ]  # fmt: skip
    t = TokenType
    assert found[KEY + "token_type"].tolist() == [
        *[t.NORMAL] * 4, *[t.CONTROL] * 3, t.USER_DEFINED, t.UNUSED, t.UNUSED,
    ]  # fmt: skip
    assert found[KEY + "merges"] == ["a b"]
    ids = {key: value for key, value in found.items() if key.endswith("_id")}
    assert ids == {KEY + "bos_token_id": 4, KEY + "eos_token_id": 5, KEY + "eot_token_id": 6}
    assert found[KEY + "add_bos_token"] is True
    assert found[KEY + "add_eos_token"] is False
    assert len(describe(tmp_path, 3)[0][KEY + "tokens"]) == 3  # no more rows than the model has


def test_flags_of_the_configuration_overrule(tmp_path):
    encoder = byte_level()
    encoder.add_special_tokens(["<s>"])
    write(tmp_path, encoder, tokenizer_config={"bos_token": "<s>", "add_bos_token": True})
    assert describe(tmp_path, 5)[0][KEY + "add_bos_token"] is True


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece(prefix, tmp_path):
    vocab = {"<unk>": 0, "<0x41>": 1, SPACE: 2, "a": 3, "b": 4, SPACE + "a": 5, SPACE + "ab": 6}
    merges = [(SPACE, "a"), (SPACE + "a", "b")]
    model = models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    encoder = tokenizers.Tokenizer(model)
    steps = [normalizers.Prepend(SPACE)] if prefix else []
    encoder.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])
    write(tmp_path, encoder)
    found, notes = describe(tmp_path, 7)
    assert notes == ()
    assert found[KEY + "model"] == "llama"
    assert found[KEY + "add_space_prefix"] is prefix
    scores = found[KEY + "scores"]
    assert scores.dtype == np.float32
    assert scores[5] > scores[6] > scores[3]  # what merges first is best
    assert found[KEY + "token_type"].tolist()[:3] == [
        TokenType.UNKNOWN, TokenType.BYTE, TokenType.NORMAL,
    ]  # fmt: skip


def test_unigram(tmp_path):
    encoder = tokenizers.Tokenizer(models.Unigram([("<unk>", 0.0), (SPACE, -1.5), ("a", -2.0)], 0))
    encoder.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    write(tmp_path, encoder)
    data = json.loads((tmp_path / "tokenizer.json").read_text())
    charsmap = base64.b64encode(b"\0\1\2").decode()
    data["normalizer"] = {"type": "Precompiled", "precompiled_charsmap": charsmap}
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    found, _ = describe(tmp_path, 3)
    assert found[KEY + "model"] == "t5"
    assert found[KEY + "scores"].tolist() == [0.0, -1.5, -2.0]
    assert found[KEY + "add_space_prefix"] is False
    assert found[KEY + "precompiled_charsmap"].tobytes() == b"\0\1\2"


def test_no_tokenizer_and_another_kind(tmp_path):
    found, (note,) = describe(tmp_path, 3)
    assert found == {KEY + "model": "no_vocab"}
    assert "not there" in note
    write(tmp_path, tokenizers.Tokenizer(models.WordPiece({"[UNK]": 0}, unk_token="[UNK]")))
    assert "of a kind" in describe(tmp_path, 3)[1][0]


def test_a_damaged_one_is_said_so(tmp_path):
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"type": "BPE", "vocab": [1]}}))
    with pytest.raises(FormatError, match="damaged"):
        describe(tmp_path, 3)


def test_templates(tmp_path):
    config = {"chat_template": [{"name": "default", "template": "D"},
                                {"name": "rag", "template": "R"}]}  # fmt: skip
    write(tmp_path, byte_level(), tokenizer_config=config)
    key = "tokenizer.chat_template"
    found, _ = describe(tmp_path, 4)
    assert (found[key], found[f"{key}.rag"]) == ("D", "R")
    (tmp_path / "chat_template.jinja").write_text("J")
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool.jinja").write_text("T")
    found, _ = describe(tmp_path, 4)
    assert (found[key], found[f"{key}.tool"]) == ("J", "T")
