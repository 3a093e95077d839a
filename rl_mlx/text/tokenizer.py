"""``Tokenizer``: text to token ids and back, from a GGUF file or a Hugging Face folder alone."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path

import tokenizers

from rl_mlx.convert.gguf.parts import HIDDEN, Parts, piece_bytes
from rl_mlx.convert.gguf.reader import GGUFFile
from rl_mlx.convert.gguf.tokenizer import build
from rl_mlx.convert.gguf.vocab import TokenType, read_vocab
from rl_mlx.errors import InvalidRequest
from rl_mlx.text.folder import read_folder
from rl_mlx.text.router.formats import Format
from rl_mlx.text.template import ChatTemplate

_ROLES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")


class Tokenizer:
    """A vocabulary and the way to use it. Encoding is done in Rust, and safe from many threads."""

    def __init__(self, parts: Parts) -> None:
        """Of its parts; ``open``, ``from_gguf`` and ``from_folder`` find them."""
        self._parts = parts
        self._encoder = parts.encoder
        self._pieces: list[bytes | None] = [None] * len(parts.tokens)
        self.vocab_size = len(parts.tokens)
        """Token ids are below this; the model may have more rows, which no text makes."""
        self.bos_id = parts.ids.get("bos")
        self.eos_ids = parts.ends
        """Every token after which an answer is complete: end of text, of turn, of message."""
        self.add_bos = self.bos_id is not None and self.bos_id in parts.prefix
        self.strips_space = parts.strips_space
        self.special_ids = frozenset(i for i, kind in enumerate(parts.types) if kind in HIDDEN)
        """Control tokens, which are no part of the text."""
        self.notes = parts.notes
        """What the user should know about this vocabulary, one line each."""

    @classmethod
    def open(cls, path: str | Path) -> Tokenizer:
        """Of a GGUF file or a folder, whichever ``path`` is."""
        return cls.from_folder(path) if Path(path).is_dir() else cls.from_gguf(path)

    @classmethod
    def from_gguf(cls, file: str | Path | GGUFFile) -> Tokenizer:
        """Of a GGUF file's metadata.

        Raises ``ModelNotFound``, ``FormatError``, or ``UnsupportedModel`` for a kind of tokenizer
        or a pre-tokenizer that we do not have.
        """
        if isinstance(file, GGUFFile):
            return cls(build(read_vocab(file)))
        with GGUFFile.open(file) as opened:
            return cls(build(read_vocab(opened)))

    @classmethod
    def from_folder(cls, path: str | Path) -> Tokenizer:
        """Of ``tokenizer.json`` (or ``tokenizer.model``) and the configuration files beside it.

        Raises ``ModelNotFound``, ``FormatError``, or ``UnsupportedModel`` where there is neither.
        """
        return cls(read_folder(Path(path)))

    def encode(
        self, text: str, *, add_special: bool = True, parse_special: bool = True
    ) -> list[int]:
        """Token ids of ``text``.

        ``add_special`` puts the BOS and EOS that the model wants, but no second BOS before one
        that the text begins with. ``parse_special=False`` takes the names of control tokens as
        plain text.
        """
        encoder = self._encoder if parse_special else self._plain_encoder
        try:
            ids: list[int] = encoder.encode(text, add_special_tokens=False).ids
        except TypeError:
            raise InvalidRequest(
                "the prompt is no text, or has lone surrogates; give a str decoded from UTF-8"
            ) from None
        if not add_special:
            return ids
        prefix, suffix = self._parts.prefix, self._parts.suffix
        if prefix and ids[: len(prefix)] == [*prefix]:
            prefix = ()
        return [*prefix, *ids, *suffix]

    def decode(
        self, ids: Iterable[int], *, skip_special: bool = True, continues: bool = False
    ) -> str:
        """The text of token ids; bytes that are not UTF-8 become U+FFFD.

        ``skip_special`` leaves control tokens out. ``continues`` says that text goes before, so
        that a first space is kept (SentencePiece puts one in front of every text). Raises
        ``InvalidRequest`` for an id outside the vocabulary.
        """
        if skip_special:
            hidden = self.special_ids
            ids = (token for token in ids if token not in hidden)
        data = b"".join(map(self.token_bytes, ids))
        if self.strips_space and not continues:
            data = data.removeprefix(b" ")
        return data.decode("utf-8", "replace")

    def token_bytes(self, token: int) -> bytes:
        """The bytes that a token stands for: a control token's name, nothing for an unused one."""
        try:
            piece = self._pieces[token] if token >= 0 else None
            if piece is None:
                parts = self._parts
                piece = piece_bytes(self.token_text(token), parts.types[token], parts.spelling)
                self._pieces[token] = piece
        except IndexError:
            raise self._outside(token) from None
        return piece

    def token_text(self, token: int) -> str:
        """A token as the vocabulary spells it. Raises ``InvalidRequest`` for an id outside it."""
        if not 0 <= token < self.vocab_size:
            raise self._outside(token)
        return self._parts.tokens[token]

    def token_id(self, text: str) -> int | None:
        """The id of the token that the vocabulary spells so."""
        token: int | None = self._encoder.token_to_id(text)
        return token

    @property
    def has_template(self) -> bool:
        """Whether the model came with a chat template."""
        return bool(self._parts.templates)

    @cached_property
    def template(self) -> ChatTemplate:
        """The model's chat template. Raises ``InvalidRequest`` where it has none."""
        if not self.has_template:
            raise InvalidRequest("this model has no chat template; use generate, or pass template=")
        return self.make_template(self._parts.templates)

    @cached_property
    def format(self) -> Format:
        """How the model marks reasoning and calls of tools, as its chat template shows it."""
        return Format.of(self._parts.templates or "")

    @cached_property
    def markers(self) -> frozenset[int]:
        """Control tokens that are such marks, which a ``Router`` must see."""
        return self.markers_of(self.format)

    def markers_of(self, form: Format) -> frozenset[int]:
        """Control tokens that are marks of ``form``."""
        ids = {self.token_id(mark) for mark in form.markers}
        return frozenset(i for i in ids if i is not None) & self.special_ids

    def make_template(self, sources: str | Mapping[str, str]) -> ChatTemplate:
        """A chat template of your own, which knows this vocabulary's ``bos_token`` and so on."""
        tokens = {
            f"{role}_token": self.token_text(self._parts.ids[role])
            for role in _ROLES
            if role in self._parts.ids
        }
        return ChatTemplate(sources, tokens)

    @cached_property
    def fingerprint(self) -> str:
        """A digest of what every id stands for: equal where two models share a vocabulary.

        Rows that only pad the vocabulary do not count.
        """
        digest = hashlib.sha256()
        types = self._parts.types
        for token in range(self.vocab_size):
            if types[token] not in (TokenType.UNUSED, TokenType.UNDEFINED):
                piece = self.token_bytes(token)
                digest.update(b"%d %d " % (token, len(piece)) + piece)
        return digest.hexdigest()

    @cached_property
    def _plain_encoder(self) -> tokenizers.Tokenizer:
        """The encoder that is blind to control tokens; made when it is first wanted."""
        return self._parts.plain()

    def _outside(self, token: int) -> InvalidRequest:
        return InvalidRequest(f"token id {token} is outside the vocabulary of {self.vocab_size}")
