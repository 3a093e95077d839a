"""Tokenizers of Hugging Face folders, against GGUF files of the same and against SentencePiece."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from rl_mlx.errors import FormatError, InvalidRequest, ModelNotFound, UnsupportedModel
from rl_mlx.text.tokenizer import Tokenizer

MESSAGES = [{"role": "user", "content": "hi"}]


def _folder(path: Path, encoder: tokenizers.Tokenizer | None = None, **files: Any) -> Path:
    """A folder with ``tokenizer.json`` and more: ``config={...}`` is config.json and so on."""
    path.mkdir(exist_ok=True)
    if encoder is not None:
        encoder.save(str(path / "tokenizer.json"))
    for name, value in files.items():
        (path / f"{name}.json").write_text(json.dumps(value), "utf-8")
    return path


@pytest.fixture
def byte_encoder(byte_level: tuple[list[str], list[str]]) -> tokenizers.Tokenizer:
    """Byte-level BPE as Llama 3's files have it: special tokens beyond the vocabulary, a BOS."""
    tokens, merges = byte_level
    index = {text: token for token, text in enumerate(tokens)}
    pairs = [(a, b) for a, b in (merge.split(" ") for merge in merges)]
    encoder = tokenizers.Tokenizer(models.BPE(index, pairs))
    encoder.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    encoder.decoder = decoders.ByteLevel()
    encoder.add_special_tokens(["<|begin_of_text|>", "<|eot_id|>", "<|python_tag|>"])
    encoder.add_tokens(["<tool_call>"])
    encoder.post_processor = processors.TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", len(tokens))]
    )
    return encoder


@pytest.fixture
def spm_encoder() -> tokenizers.Tokenizer:
    """SentencePiece BPE as Llama 2's ``tokenizer.json`` has it."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokens += ["▁", "a", "b", "c", "▁a", "ab", "▁ab"]
    merges = [("▁", "a"), ("a", "b"), ("▁a", "b"), ("▁", "ab")]
    index = {text: token for token, text in enumerate(tokens)}
    encoder = tokenizers.Tokenizer(
        models.BPE(index, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    encoder.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    encoder.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1),
        ]
    )
    encoder.add_special_tokens(["<unk>", "<s>", "</s>"])
    return encoder


@pytest.mark.shared
def test_a_folder_and_a_file_of_the_same_model(shared: Path) -> None:
    folder = Tokenizer.open(shared / "hf" / "qwen2")
    file = Tokenizer.open(shared / "parity" / "qwen2.gguf")
    assert folder.fingerprint == file.fingerprint
    assert (folder.eos_ids, folder.bos_id) == (file.eos_ids, file.bos_id)
    assert folder.vocab_size == file.vocab_size
    text = "<|im_start|>user\nIt's 12 o'clock — Zwölf 🦙<|im_end|>\n"
    for parse in (True, False):
        ids = folder.encode(text, parse_special=parse)
        assert ids == file.encode(text, parse_special=parse)
        assert folder.decode(ids, skip_special=False) == text
    assert folder.template.render(MESSAGES) == file.template.render(MESSAGES)


def test_special_tokens_beyond_the_vocabulary(
    tmp_path: Path, byte_encoder: tokenizers.Tokenizer
) -> None:
    config = {"bos_token": "<|begin_of_text|>", "eos_token": {"content": "<|eot_id|>"}}
    tokenizer = Tokenizer.from_folder(
        _folder(tmp_path / "m", byte_encoder, tokenizer_config=config)
    )
    bos = byte_encoder.token_to_id("<|begin_of_text|>")
    assert (tokenizer.bos_id, tokenizer.add_bos) == (bos, True)
    assert tokenizer.eos_ids == {bos + 1}
    assert tokenizer.encode("hi")[0] == bos
    assert tokenizer.encode("<|begin_of_text|>hi").count(bos) == 1
    text = "a<|eot_id|><tool_call>b"
    plain = tokenizer.encode(text, add_special=False, parse_special=False)
    assert bos + 1 not in plain
    assert byte_encoder.token_to_id("<tool_call>") in plain
    assert tokenizer.decode(plain) == text
    assert tokenizer.decode(tokenizer.encode(text)) == "a<tool_call>b"
    every = [tokenizer.token_bytes(token) for token in range(tokenizer.vocab_size)]
    assert {bytes([byte]) for byte in range(256)} <= set(every)


def test_flags_of_the_configuration_overrule(
    tmp_path: Path, byte_encoder: tokenizers.Tokenizer
) -> None:
    config = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}
    config |= {"add_bos_token": False, "add_eos_token": True}
    tokenizer = Tokenizer.from_folder(
        _folder(tmp_path / "m", byte_encoder, tokenizer_config=config)
    )
    assert not tokenizer.add_bos
    assert tokenizer.encode("hi")[-1] == byte_encoder.token_to_id("<|eot_id|>")


@pytest.mark.parametrize("ends", [4, [4, 5, 10**6]])
def test_end_tokens_of_the_generation_config(
    tmp_path: Path, byte_encoder: tokenizers.Tokenizer, ends: int | list[int]
) -> None:
    folder = _folder(tmp_path / "m", byte_encoder, generation_config={"eos_token_id": ends})
    named = byte_encoder.token_to_id("<|eot_id|>")
    assert Tokenizer.from_folder(folder).eos_ids == ({4, named} if ends == 4 else {4, 5, named})


def test_truncation_and_padding_are_off(tmp_path: Path, byte_encoder: tokenizers.Tokenizer) -> None:
    byte_encoder.enable_truncation(4)
    byte_encoder.enable_padding(length=100)
    tokenizer = Tokenizer.from_folder(_folder(tmp_path / "m", byte_encoder))
    text = "quite some words more than four"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.encode("a", add_special=False)) == 1


def test_sentencepiece_as_json(tmp_path: Path, spm_encoder: tokenizers.Tokenizer) -> None:
    tokenizer = Tokenizer.from_folder(_folder(tmp_path / "m", spm_encoder))
    ids = tokenizer.encode("ab é c", add_special=False)
    assert tokenizer.token_text(ids[0]) == "▁ab"
    assert tokenizer.decode(ids) == spm_encoder.decode(ids) == "ab é c"
    assert tokenizer.decode(ids, continues=True) == " ab é c"
    assert tokenizer.token_bytes(13) == b"\n"


def test_wordpiece_as_json(tmp_path: Path) -> None:
    index = {t: i for i, t in enumerate(["[UNK]", "[CLS]", "[SEP]", "un", "##able", "hello"])}
    encoder = tokenizers.Tokenizer(models.WordPiece(index, unk_token="[UNK]"))
    encoder.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    encoder.decoder = decoders.WordPiece()
    encoder.add_special_tokens(["[UNK]", "[CLS]", "[SEP]"])
    encoder.post_processor = processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    tokenizer = Tokenizer.from_folder(_folder(tmp_path / "m", encoder))
    ids = tokenizer.encode("hello unable")
    assert ids == [1, 5, 3, 4, 2]
    assert tokenizer.decode(ids) == "hello unable"


def test_where_templates_lie(tmp_path: Path, byte_encoder: tokenizers.Tokenizer) -> None:
    named = [{"name": "default", "template": "D"}, {"name": "tool_use", "template": "T"}]
    folder = _folder(tmp_path / "m", byte_encoder)
    with pytest.raises(InvalidRequest, match="no chat template"):
        _ = Tokenizer.from_folder(folder).template
    _folder(folder, tokenizer_config={"chat_template": named})
    template = Tokenizer.from_folder(folder).template
    assert template.render(MESSAGES) == "D"
    assert template.render(MESSAGES, [{"name": "f"}]) == "T"
    _folder(folder, chat_template={"chat_template": "J"})
    assert Tokenizer.from_folder(folder).template.render(MESSAGES) == "J"
    (folder / "chat_template.jinja").write_text("F", "utf-8")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "rag.jinja").write_text("R", "utf-8")
    template = Tokenizer.from_folder(folder).template
    assert template.render(MESSAGES) == "F"
    assert template.render(MESSAGES, name="rag") == "R"


def test_folders_that_cannot_be_read(tmp_path: Path, byte_encoder: tokenizers.Tokenizer) -> None:
    with pytest.raises(ModelNotFound, match="no such folder"):
        Tokenizer.from_folder(tmp_path / "nothing")
    with pytest.raises(UnsupportedModel, match=r"neither tokenizer.json nor tokenizer.model"):
        Tokenizer.from_folder(_folder(tmp_path / "empty"))
    broken = _folder(tmp_path / "broken")
    (broken / "tokenizer.json").write_text("{", "utf-8")
    with pytest.raises(FormatError, match=r"tokenizer.json: it cannot be read"):
        Tokenizer.from_folder(broken)
    config = _folder(tmp_path / "config", byte_encoder)
    (config / "tokenizer_config.json").write_text("[]", "utf-8")
    with pytest.raises(FormatError, match="must be a JSON object"):
        Tokenizer.from_folder(config)
    byte_encoder.decoder = decoders.CTC()
    with pytest.raises(UnsupportedModel, match="decoders of kind CTC"):
        Tokenizer.from_folder(_folder(tmp_path / "ctc", byte_encoder))


def test_ids_that_would_fill_the_memory(tmp_path: Path, byte_encoder: tokenizers.Tokenizer) -> None:
    folder = _folder(tmp_path / "json", byte_encoder)
    state = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    state["model"]["vocab"]["far"] = 2**32 - 1
    (folder / "tokenizer.json").write_text(json.dumps(state), "utf-8")
    with pytest.raises(FormatError, match="token of id 4294967295"):
        Tokenizer.from_folder(folder)
    added = {"4000000000": {"content": "far"}}
    folder = _folder(tmp_path / "model", tokenizer_config={"added_tokens_decoder": added})
    (folder / "tokenizer.model").write_bytes(b"")
    with pytest.raises(FormatError, match="added token of id 4000000000"):
        Tokenizer.from_folder(folder)


@pytest.mark.parametrize(
    "data", [b"", b"\xff" * 40, b"\x0a\x05abc", b"\x08\x01", b"\x0a\x02\x08\x01"]
)
def test_broken_sentencepiece_models(tmp_path: Path, data: bytes) -> None:
    folder = _folder(tmp_path / "m")
    (folder / "tokenizer.model").write_bytes(data)
    with pytest.raises(FormatError, match="no SentencePiece model"):
        Tokenizer.from_folder(folder)


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_sentencepiece_models_against_sentencepiece(tmp_path: Path, kind: str) -> None:
    library = pytest.importorskip("sentencepiece")
    words = "the quick brown fox jumps over a lazy dog and then another one says: it is 42, ok?"
    lines = [words[start:] + words[:start] for start in range(0, len(words), 2)]
    model = io.BytesIO()
    library.SentencePieceTrainer.train(
        sentence_iterator=iter(lines * 5), model_writer=model, vocab_size=360, model_type=kind,
        byte_fallback=True, hard_vocab_limit=False, user_defined_symbols=["<|x|>"],
        normalization_rule_name="identity", remove_extra_whitespaces=False, minloglevel=2,
    )  # fmt: skip
    folder = _folder(tmp_path / "m", tokenizer_config={"add_bos_token": True})
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    tokenizer = Tokenizer.from_folder(folder)
    theirs = library.SentencePieceProcessor(model_proto=model.getvalue())
    assert tokenizer.vocab_size == theirs.vocab_size()
    assert (tokenizer.bos_id, tokenizer.eos_ids) == (theirs.bos_id(), {theirs.eos_id()})
    for text in [*lines[:20], " a  dog", "über 🦙", "\n\tanother", "<|dog"]:
        ids = tokenizer.encode(text, add_special=False)
        assert ids == theirs.encode(text), text
        assert tokenizer.decode(ids) == text
    assert tokenizer.encode("dog")[0] == theirs.bos_id()
