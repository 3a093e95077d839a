"""Token ids to text, one at a time, in pieces that are whole UTF-8."""

from __future__ import annotations

import codecs

from rl_mlx.text.tokenizer import Tokenizer

_utf8 = codecs.getincrementaldecoder("utf-8")


class Detokenizer:
    """Streams the text of token ids: the pieces joined are ``tokenizer.decode`` of all the ids.

    ``skip_special`` hides control tokens. ``continues`` says that the ids go on from text before
    them, so that a first space is text; otherwise the one that SentencePiece puts in front of every
    text is left out. ``shown`` control tokens are text all the same: marks that a router reads.
    Bytes that are not UTF-8 become U+FFFD. Constant time a token.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        skip_special: bool = True,
        continues: bool = False,
        shown: frozenset[int] = frozenset(),
    ) -> None:
        self._bytes = tokenizer.token_bytes
        hidden = tokenizer.special_ids - shown if skip_special else frozenset()
        self._hidden: frozenset[int] = hidden
        self._decode = _utf8("replace").decode
        self._strip = tokenizer.strips_space and not continues

    def add(self, token: int) -> str:
        """The text that is certain now; bytes of an unfinished character wait for the next token.

        Raises ``InvalidRequest`` for an id outside the vocabulary.
        """
        if token in self._hidden:
            return ""
        piece = self._bytes(token)
        if self._strip and piece:
            self._strip = False
            piece = piece.removeprefix(b" ")
        return self._decode(piece)

    def flush(self) -> str:
        """What is left at the end: U+FFFD for an unfinished character, else nothing."""
        return self._decode(b"", final=True)
