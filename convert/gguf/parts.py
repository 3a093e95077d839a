"""What a tokenizer is made of, whatever file it came from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import tokenizers

from rl_mlx.convert.gguf.vocab import TokenType

Spelling = Literal["bytes", "spaces", "wordpiece"]
HIDDEN = (TokenType.CONTROL, TokenType.UNKNOWN)
ADDED = (*HIDDEN, TokenType.USER_DEFINED)
"""Types that are found in a text before anything else is done to it."""

# Tokens that end a turn, by name (llama_vocab of llama.cpp, "EOG tokens").
_ENDS = """
    <|eot_id|> <|im_end|> <|end|> <|return|> <|call|> <|calls|> <|flush|> <end_of_turn> <turn|>
    <|endoftext|> <|end_of_text|> <|eom_id|> <end_of_utterance> <|tool_response> [e~[
    <\uff5cend\u2581of\u2581sentence\uff5c> <|fim_pad|> <fim-pad> <fim_pad>
    <|fim_repo|> <|repo_name|> <fim-repo> <REPO> <reponame> <|file_sep|>
""".split()  # noqa: SIM905
# These too, but only as control tokens: in some vocabularies they are plain HTML.
_ENDS_IF_CONTROL = ("</s>", "<eos>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]")
_END_ROLES = ("eos", "eot", "eom", "fim_pad", "fim_rep", "fim_sep")


@dataclass(frozen=True, kw_only=True)
class Parts:
    """The parts.

    ``encoder`` finds the names of control tokens in a text; ``plain`` makes one that does not.
    ``tokens`` and ``types`` [n] are texts and ``TokenType``s by id. ``spelling`` says how the text
    of a NORMAL token stands for bytes: ``bytes`` in the alphabet of GPT-2, ``spaces`` with U+2581
    for a space, ``wordpiece`` with ``##`` for no space. ``strips_space``: a decoded text loses one
    space in front. ``prefix`` and ``suffix`` go around a text with ``add_special``. ``ids`` are the
    special tokens by role, ``ends`` those that end an answer, ``templates`` the chat templates.
    """

    encoder: tokenizers.Tokenizer
    plain: Callable[[], tokenizers.Tokenizer]
    tokens: Sequence[str]
    types: Sequence[int]
    spelling: Spelling
    strips_space: bool = False
    prefix: tuple[int, ...] = ()
    suffix: tuple[int, ...] = ()
    ids: Mapping[str, int] = field(default_factory=dict)
    ends: frozenset[int] = frozenset()
    templates: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def end_ids(
    find: Callable[[str], int | None], types: list[int], ids: Mapping[str, int]
) -> frozenset[int]:
    """The tokens after which an answer is complete; marks them in ``types`` as control tokens.

    ``find`` gives the id of a token's text. Named roles count, and well-known names, for files
    often name one end token where the model uses several.
    """
    named = {name: token for name in _ENDS if (token := find(name)) is not None}
    for name in _ENDS_IF_CONTROL:
        token = find(name)
        if token is not None and types[token] == TokenType.CONTROL:
            named[name] = token
    ends = set(named.values()) | {ids[role] for role in _END_ROLES if role in ids}
    if {"<|return|>", "<|call|>"} <= named.keys() or {"<|calls|>", "<|flush|>"} <= named.keys():
        ends.discard(
            named.get("<|end|>", -1)
        )  # gpt-oss and Solar: closes a message, not the answer
    if "<|tool_response>" in named:  # Gemma 4, where </s> is HTML
        ends.discard(named.get("</s>", -1))
    for token in ends | ({ids["bos"]} if "bos" in ids else set()):
        types[token] = TokenType.CONTROL
    return frozenset(ends)


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable characters for the 256 bytes (``bytes_to_unicode`` of its encoder)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {
        chr(256 + i): byte for i, byte in enumerate(others)
    }


_BYTE_OF = _byte_alphabet()


def piece_bytes(text: str, kind: int, spelling: Spelling) -> bytes:
    """The bytes that a token of type ``kind`` stands for; none for UNUSED ones."""
    if kind == TokenType.BYTE:
        return bytes([int(text[3:5], 16)])
    if kind in (TokenType.UNUSED, TokenType.UNDEFINED):
        return b""
    if kind == TokenType.NORMAL and spelling == "bytes" and all(char in _BYTE_OF for char in text):
        return bytes([_BYTE_OF[char] for char in text])
    if kind in (TokenType.NORMAL, TokenType.USER_DEFINED) and spelling == "spaces":
        text = text.replace("\u2581", " ")
    if kind == TokenType.NORMAL and spelling == "wordpiece":
        text = text[2:] if text.startswith("##") else " " + text
    return text.encode("utf-8", "surrogateescape")
