"""A tokenizer out of a vocabulary as GGUF and SentencePiece files have it.

What a kind of vocabulary means, and what its silence means, follows llama.cpp (llama-vocab.cpp).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import tokenizers
from tokenizers import AddedToken, Regex, models, normalizers, pre_tokenizers

from rl_mlx.convert.gguf.parts import ADDED, HIDDEN, Parts, Spelling, end_ids
from rl_mlx.convert.gguf.pretokenize import PreTokenizer, pre_tokenizer
from rl_mlx.convert.gguf.vocab import TokenType, Vocab
from rl_mlx.errors import FormatError, UnsupportedModel

_NO_PRE = (
    "the file names no pre-tokenizer (tokenizer.ggml.pre), so text may be cut into other tokens "
    "than the model knows; a newer conversion of the model has one"
)
_SPACE = "\u2581"


def build(vocab: Vocab) -> Parts:
    """The parts of a tokenizer.

    Raises ``UnsupportedModel`` for a kind of tokenizer or a pre-tokenizer we do not have, and
    ``FormatError`` where tokens are not UTF-8.
    """
    make = _KINDS.get(vocab.model)
    if make is None:
        raise UnsupportedModel(
            f"tokenizers of kind {vocab.model!r} are not supported; known are {', '.join(_KINDS)}"
        )
    table = _Table(vocab)
    ends = end_ids(table.index.get, table.types, vocab.ids)
    try:
        "".join(table.tokens).encode("utf-8")
    except UnicodeEncodeError:
        raise FormatError(
            "the vocabulary has tokens that are not UTF-8; use another version of the model"
        ) from None
    kind = make(table)
    _add_tokens(kind.encoder, table)
    prefix, suffix = _around(vocab, kind)
    return Parts(
        encoder=kind.encoder,
        plain=lambda: _plain(make, table),
        tokens=table.tokens,
        types=table.types,
        spelling=kind.spelling,
        strips_space=kind.strips_space,
        prefix=prefix,
        suffix=suffix,
        ids=vocab.ids,
        ends=ends,
        templates=vocab.templates,
        notes=kind.notes,
    )


class _Table:
    """A vocabulary's tokens, to be looked up both ways."""

    def __init__(self, vocab: Vocab) -> None:
        self.vocab = vocab
        self.types: list[int] = vocab.types.tolist()
        self._name([text or f"[EMPTY_{i}]" for i, text in enumerate(vocab.tokens)])

    def _name(self, tokens: list[str]) -> None:
        self.tokens = tokens
        self.index = dict(zip(reversed(tokens), range(len(tokens) - 1, -1, -1)))  # first of equals

    def without_control(self) -> _Table:
        """The same, with control tokens under names that no text has."""
        table = copy.copy(self)
        table.types, tokens = list(self.types), list(self.tokens)
        for token in np.flatnonzero(np.isin(self.types, HIDDEN)).tolist():
            table.types[token] = TokenType.UNUSED
            tokens[token] = f"\uffff{token}"
        table._name(tokens)
        return table

    @cached_property
    def scores(self) -> npt.NDArray[np.float32]:
        """Scores [n]; zero where the file has none."""
        scores = self.vocab.scores
        return np.zeros(len(self.tokens), np.float32) if scores is None else scores

    @property
    def unknown(self) -> str | None:
        """The text of the token for what no other can say."""
        token = self.vocab.ids.get("unk")
        return None if token is None else self.tokens[token]

    @property
    def added(self) -> list[int]:
        """Tokens that are found in a text before all else."""
        found: list[int] = np.flatnonzero(np.isin(self.types, ADDED)).tolist()
        return found


@dataclass(frozen=True)
class _Kind:
    """How one kind of vocabulary encodes, and its defaults."""

    encoder: tokenizers.Tokenizer
    spelling: Spelling
    add_bos: bool = False
    add_eos: bool = False
    strips_space: bool = False
    notes: tuple[str, ...] = ()


def _around(vocab: Vocab, kind: _Kind) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The ids before and after a text; a flag whose token is not there adds nothing."""
    add_bos = kind.add_bos if vocab.add_bos is None else vocab.add_bos
    add_eos = kind.add_eos if vocab.add_eos is None else vocab.add_eos
    if vocab.model == "bert":
        first, last = vocab.ids.get("bos"), vocab.ids.get("sep")
    else:
        first = vocab.ids.get("bos") if add_bos else None
        last = vocab.ids.get("eos") if add_eos else None
    return (() if first is None else (first,)), (() if last is None else (last,))


def _add_tokens(encoder: tokenizers.Tokenizer, table: _Table) -> None:
    """Make the encoder find control and user-defined tokens in a text before all else."""
    # Phi-3's turn marks swallow the white space after them, which GGUF has no field for.
    name = table.vocab.model_name.lower()
    swallows = "phi-3" in name or "phi3" in name
    spared = {"<unk>", "<s>", "<|endoftext|>"}
    special: list[AddedToken] = []
    plain: list[AddedToken] = []
    for token in table.added:
        text = table.tokens[token]
        control = table.types[token] != TokenType.USER_DEFINED
        rstrip = swallows and text not in spared
        added = AddedToken(text, normalized=False, special=control, rstrip=rstrip)
        (special if control else plain).append(added)
    encoder.add_special_tokens(special)
    encoder.add_tokens(plain)


def _plain(make: _Make, table: _Table) -> tokenizers.Tokenizer:
    """An encoder that takes control tokens for text."""
    table = table.without_control()
    encoder = make(table).encoder
    _add_tokens(encoder, table)
    return encoder


def _byte_level(table: _Table) -> _Kind:
    """GPT-2's: merges over the bytes of words that ``pre`` cuts."""
    name = table.vocab.pre
    return _merging(table, pre_tokenizer(name or "default"), notes=() if name else (_NO_PRE,))


def _gemma4(table: _Table) -> _Kind:
    """Merges over lines, with visible spaces and bytes for unknown characters."""
    return _merging(table, pre_tokenizer("gemma4"))


def _merging(table: _Table, pre: PreTokenizer, notes: tuple[str, ...] = ()) -> _Kind:
    index = table.index
    merges = table.vocab.merges
    pairs = [(merge[:at], merge[at + 1 :]) for merge in merges if (at := merge.find(" ", 1)) > 0]
    model = models.BPE(
        index,
        [(a, b) for a, b in pairs if a in index and b in index and a + b in index],
        ignore_merges=pre.whole_words,
        byte_fallback=pre.spaces,
    )
    encoder = tokenizers.Tokenizer(model)
    if (normalizer := pre.normalizer()) is not None:
        encoder.normalizer = normalizer
    encoder.pre_tokenizer = pre.splitter()
    return _Kind(encoder, "spaces" if pre.spaces else "bytes", add_bos=pre.bos, notes=notes)


def _sentencepiece(table: _Table) -> _Kind:
    """SentencePiece BPE: two neighbours merge where they make a token, the best score first.

    The same as ranked merges, one for each way to cut a token in two tokens.
    """
    tokens, types, scores = table.tokens, table.types, table.scores
    mergeable = {TokenType.NORMAL, TokenType.USER_DEFINED}
    parts = {text for text, token in table.index.items() if types[token] in mergeable}
    merges = [
        (text[:at], text[at:])
        for text in (tokens[token] for token in np.argsort(-scores, kind="stable").tolist())
        if text in parts
        for at in range(1, len(text))
        if text[:at] in parts and text[at:] in parts
    ]
    encoder = tokenizers.Tokenizer(
        models.BPE(
            table.index,
            merges,
            unk_token=table.unknown,
            fuse_unk=True,
            byte_fallback=TokenType.BYTE in types,
        )
    )
    encoder.normalizer = _visible_spaces(table.vocab)
    return _Kind(encoder, "spaces", add_bos=True, strips_space=_prefixes(table.vocab))


def _unigram(table: _Table) -> _Kind:
    """SentencePiece unigram: the cut of the best total score (Kudo 2018)."""
    scores = np.where(np.equal(table.types, TokenType.USER_DEFINED), 0.0, table.scores)
    encoder = tokenizers.Tokenizer(
        models.Unigram(
            list(zip(table.tokens, scores.tolist())),
            unk_id=table.vocab.ids.get("unk"),
            byte_fallback=TokenType.BYTE in table.types,
        )
    )
    encoder.normalizer = _visible_spaces(table.vocab)
    return _Kind(encoder, "spaces", add_eos=True, strips_space=_prefixes(table.vocab))


def _prefixes(vocab: Vocab) -> bool:
    """Whether a text gets a space in front."""
    return vocab.add_space_prefix is not False


def _visible_spaces(vocab: Vocab) -> normalizers.Normalizer:
    """What a SentencePiece vocabulary does to a text first."""
    steps: list[normalizers.Normalizer] = []
    if vocab.charsmap:
        steps.append(normalizers.Precompiled(vocab.charsmap))
    if vocab.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    if _prefixes(vocab):
        steps.append(normalizers.Prepend(_SPACE))
    return normalizers.Sequence([*steps, normalizers.Replace(" ", _SPACE)])


def _wordpiece(table: _Table) -> _Kind:
    """BERT's: the longest tokens from the left, of words between spaces and punctuation.

    GGUF marks the beginning of a word (U+2581) where BERT marks the rest of one (``##``).
    """
    added = {table.tokens[token] for token in table.added} | {table.unknown}
    pieces = {_bert_spelling(text, added): token for text, token in table.index.items()}
    model = models.WordPiece(pieces, unk_token=table.unknown or "[UNK]")
    encoder = tokenizers.Tokenizer(model)
    encoder.normalizer = normalizers.BertNormalizer(lowercase=table.vocab.lowercase is not False)
    encoder.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return _Kind(encoder, "spaces", strips_space=True)


def _bert_spelling(text: str, added: set[str | None]) -> str:
    if text in added:
        return text
    return text[1:] if text.startswith(_SPACE) else "##" + text


_Make = Callable[[_Table], _Kind]
_KINDS: dict[str, _Make] = {
    "gpt2": _byte_level,
    "llama": _sentencepiece,
    "gemma4": _gemma4,
    "t5": _unigram,
    "bert": _wordpiece,
}
