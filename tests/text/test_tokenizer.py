"""Encoding and decoding, against the published cases of real vocabularies."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from rl_mlx.convert.gguf.pretokenize import PRE_TOKENIZERS
from rl_mlx.errors import FormatError, InvalidRequest, ModelNotFound, UnsupportedModel
from rl_mlx.text.tokenizer import Tokenizer

CONTROL, NORMAL = 3, 1
VOCABULARIES = """
    command-r deepseek-coder deepseek-llm falcon gpt-2 llama-bpe llama-spm mpt phi-3 qwen2 refact
    starcoder
""".split()  # noqa: SIM905


@pytest.mark.shared
@pytest.mark.parametrize("name", VOCABULARIES)
def test_published_cases(shared: Path, name: str) -> None:
    path = shared / "vocab" / f"ggml-vocab-{name}.gguf"
    with Path(f"{path}.inp").open(encoding="utf-8", newline="") as file:
        cases = file.read().split("\n__ggml_vocab_test__\n")
    lines = Path(f"{path}.out").read_text("utf-8").split("\n")
    expected = [[int(token) for token in line.split()] for line in lines]
    tokenizer = Tokenizer.from_gguf(path)
    assert len(cases) > 40
    for case, ids in zip(cases, expected):
        assert tokenizer.encode(case, add_special=False) == ids, case
        assert tokenizer.decode(ids) == case


@pytest.mark.shared
@pytest.mark.parametrize("name", ["gpt-2", "llama-spm"])
def test_plain_text_encodes_the_same_without_control_tokens(shared: Path, name: str) -> None:
    path = shared / "vocab" / f"ggml-vocab-{name}.gguf"
    text = Path(f"{path}.inp").read_text("utf-8")
    tokenizer = Tokenizer.from_gguf(path)
    assert tokenizer.encode(text) == tokenizer.encode(text, parse_special=False)


@pytest.mark.shared
@pytest.mark.parametrize(
    ("name", "bos", "ends"),
    [
        ("qwen2", None, {"<|endoftext|>", "<|im_end|>"}),  # and not </s>, which is HTML there
        ("llama-bpe", "<|begin_of_text|>", {"<|end_of_text|>", "<|eot_id|>"}),
        ("phi-3", "<s>", {"<|endoftext|>", "<|end|>"}),
        ("llama-spm", "<s>", {"</s>"}),
    ],
)
def test_special_tokens_of_real_models(
    shared: Path, name: str, bos: str | None, ends: set[str]
) -> None:
    tokenizer = Tokenizer.from_gguf(shared / "vocab" / f"ggml-vocab-{name}.gguf")
    assert {tokenizer.token_text(token) for token in tokenizer.eos_ids} == ends
    first = tokenizer.encode("x")[0]
    assert tokenizer.add_bos == (bos is not None)
    assert (first == tokenizer.bos_id) == (bos is not None)
    if bos is not None:
        assert tokenizer.token_text(first) == bos


@pytest.mark.shared
def test_phi3_marks_swallow_the_space_after_them(shared: Path) -> None:
    tokenizer = Tokenizer.from_gguf(shared / "vocab" / "ggml-vocab-phi-3.gguf")
    assert tokenizer.encode("<|user|>\nhi", add_special=False) == tokenizer.encode(
        "<|user|>hi", add_special=False
    )


def test_control_tokens_are_found_or_spelled_out(bpe_file: Callable[..., Path]) -> None:
    tokenizer = Tokenizer.from_gguf(bpe_file())
    mark, tool = tokenizer.token_id("<|im_end|>"), tokenizer.token_id("<tool>")
    text = "a<|im_end|><tool>b"
    assert tokenizer.encode(text, add_special=False)[1:3] == [mark, tool]
    plain = tokenizer.encode(text, add_special=False, parse_special=False)
    assert mark not in plain
    assert tool in plain  # user-defined tokens are part of the text
    assert tokenizer.decode(plain) == text


def test_a_name_that_is_a_whole_word_is_spelled_out_too(gguf_file: Callable[..., Path]) -> None:
    letters = [chr(c) for c in range(33, 127)]
    types = [NORMAL] * len(letters) + [CONTROL]
    path = gguf_file("gpt2", [*letters, "stop"], types, merges=["x y"], pre="llama-bpe")
    tokenizer = Tokenizer.from_gguf(path)
    assert tokenizer.encode("stop") == [len(letters)]
    spelled = tokenizer.encode("stop", parse_special=False)
    assert [tokenizer.token_text(token) for token in spelled] == ["s", "t", "o", "p"]


def test_bos_and_eos_by_flag(bpe_file: Callable[..., Path]) -> None:
    silent = Tokenizer.from_gguf(bpe_file())  # llama-bpe means a BOS and no EOS
    bos, eos = silent.bos_id, silent.token_id("</s>")
    plain = silent.encode("hi", add_special=False)
    assert silent.encode("hi") == [bos, *plain]
    assert silent.encode("<s>hi") == [bos, *plain]  # no second one
    both = Tokenizer.from_gguf(bpe_file(add_bos_token=True, add_eos_token=True))
    assert both.encode("hi") == [bos, *plain, eos]
    none = Tokenizer.from_gguf(bpe_file(add_bos_token=False))
    assert not none.add_bos
    assert none.encode("hi") == plain
    assert none.encode("") == []


def test_scores_decide_merges_and_bytes_fill_in(spm_file: Callable[..., Path]) -> None:
    tokenizer = Tokenizer.from_gguf(spm_file())

    def pieces(text: str, **options: bool) -> list[str]:
        ids = tokenizer.encode(text, add_special=False, **options)
        return [tokenizer.token_text(token) for token in ids]

    assert pieces("the banana and") == ["▁the", "▁", "b", "an", "an", "a", "▁and"]
    assert pieces("é") == ["▁", "<0xC3>", "<0xA9>"]
    assert pieces("<|user|>the<|user|> the") == ["<|user|>", "▁the", "<|user|>", "▁", "▁the"]
    bare = Tokenizer.from_gguf(spm_file(add_space_prefix=False))
    assert bare.decode(bare.encode(" the")) == " the"
    assert bare.token_text(bare.encode("the", add_special=False)[0]) == "▁the"[1:2]


def test_bytes_of_tokens(bpe_file: Callable[..., Path], spm_file: Callable[..., Path]) -> None:
    spm = Tokenizer.from_gguf(spm_file())
    texts = {"<0x0A>": b"\n", "▁the": b" the", "▁▁▁": b"   ", "<s>": b"<s>"}
    for text, data in texts.items():
        token = spm.token_id(text)
        assert token is not None
        assert spm.token_bytes(token) == data
    bpe = Tokenizer.from_gguf(bpe_file())
    alphabet = {bpe.token_bytes(token) for token in range(bpe.vocab_size)}
    assert {bytes([byte]) for byte in range(256)} <= alphabet


def test_fingerprints_compare_content(bpe_file: Callable[..., Path]) -> None:
    one = Tokenizer.from_gguf(bpe_file())
    same = Tokenizer.from_gguf(bpe_file(add_bos_token=False, pre="qwen2"))
    assert one.fingerprint == same.fingerprint


def test_padding_does_not_change_a_fingerprint(gguf_file: Callable[..., Path]) -> None:
    unused = 5
    short = gguf_file("gpt2", ["a", "b"], [NORMAL] * 2, merges=["a b"], pre="gpt-2")
    padded = gguf_file(
        "gpt2", ["a", "b", "[PAD2]"], [NORMAL] * 2 + [unused], merges=["a b"], pre="gpt-2"
    )
    other = gguf_file("gpt2", ["a", "c"], [NORMAL] * 2, merges=["a c"], pre="gpt-2")
    prints = [Tokenizer.from_gguf(path).fingerprint for path in (short, padded, other)]
    assert prints[0] == prints[1] != prints[2]
    assert Tokenizer.from_gguf(padded).token_bytes(2) == b""


def test_gpt_oss_ends_with_return_and_call_but_not_end(gguf_file: Callable[..., Path]) -> None:
    names = ["a", "b", "<|return|>", "<|call|>", "<|end|>", "<|endoftext|>"]
    types = [NORMAL] * 2 + [CONTROL] * 4
    path = gguf_file("gpt2", names, types, merges=["a b"], pre="gpt-4o", eos_token_id=2)
    assert Tokenizer.from_gguf(path).eos_ids == {2, 3, 5}


def test_wordpiece(gguf_file: Callable[..., Path]) -> None:
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "▁un", "able", "▁hello", "▁,", "▁é"]
    types = [CONTROL] * 4 + [NORMAL] * 5
    path = gguf_file(
        "bert", tokens, types,
        bos_token_id=2, seperator_token_id=3, unknown_token_id=1, padding_token_id=0,
    )  # fmt: skip
    tokenizer = Tokenizer.from_gguf(path)
    ids = tokenizer.encode("Hello, unable qq")
    assert ids == [2, 6, 7, 4, 5, 1, 3]
    assert tokenizer.decode(ids) == "hello , unable"


def test_a_file_without_a_pre_tokenizer_says_so(gguf_file: Callable[..., Path]) -> None:
    tokens = ["a", "b", "ab"]
    tokenizer = Tokenizer.from_gguf(gguf_file("gpt2", tokens, merges=["a b"]))
    assert "names no pre-tokenizer" in tokenizer.notes[0]
    assert tokenizer.encode("ab") == [2]


@pytest.mark.parametrize("name", sorted(n for n, pre in PRE_TOKENIZERS.items() if not pre.spaces))
def test_every_pre_tokenizer_loses_nothing(bpe_file: Callable[..., Path], name: str) -> None:
    tokenizer = Tokenizer.from_gguf(bpe_file(pre=name))
    text = " The  q's 1234567\n\n\t 漢字 ÄÖ I'LL!? ...x\u3000…🦙 "
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize(
    ("model", "more", "words"),
    [
        ("rwkv", {}, "kind 'rwkv' are not supported"),
        ("gpt2", {"pre": "from-the-future"}, "'from-the-future'.*update rl-mlx"),
    ],
)
def test_kinds_we_do_not_have(
    gguf_file: Callable[..., Path], model: str, more: dict[str, str], words: str
) -> None:
    with pytest.raises(UnsupportedModel, match=words):
        Tokenizer.from_gguf(gguf_file(model, ["a", "b"], merges=["a b"], **more))


def test_tokens_that_are_no_text(gguf_file: Callable[..., Path]) -> None:
    path = gguf_file("gpt2", ["QQQ", "b"], merges=["a b"], pre="gpt-2")
    path.write_bytes(path.read_bytes().replace(b"QQQ", b"Q\xff\xfe"))
    with pytest.raises(FormatError, match="not UTF-8"):
        Tokenizer.from_gguf(path)


def test_text_that_is_no_text(bpe_file: Callable[..., Path]) -> None:
    with pytest.raises(InvalidRequest, match="lone surrogates"):
        Tokenizer.from_gguf(bpe_file()).encode("a\ud800b")


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound):
        Tokenizer.open(tmp_path / "no.gguf")


def test_template_of_the_file(bpe_file: Callable[..., Path]) -> None:
    messages = [{"role": "user", "content": "hi"}]
    source = "{{ bos_token }}{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    assert Tokenizer.from_gguf(bpe_file(templates=source)).template.render(messages) == "<s>hi</s>"
    bare = Tokenizer.from_gguf(bpe_file())
    assert not bare.has_template
    with pytest.raises(InvalidRequest, match="no chat template; use generate, or pass template="):
        _ = bare.template
    assert bare.make_template("{{ eos_token }}").render(messages) == "</s>"
