"""``tokenizer.model``: a SentencePiece model, read without its library.

The file is one protocol buffer, ``ModelProto`` of ``sentencepiece_model.proto``. Of the wire format
(protobuf.dev, "Encoding") only what the file uses is read: varints, 32 and 64-bit numbers, bytes.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from rl_mlx.convert.gguf.vocab import TokenType, Vocab
from rl_mlx.errors import FormatError, UnsupportedModel

_KINDS = {1: "t5", 2: "llama"}  # TrainerSpec.ModelType: UNIGRAM, BPE


def read_sentencepiece(path: Path, added: Mapping[int, tuple[str, bool]]) -> Vocab:
    """The vocabulary of a ``tokenizer.model``, with ``added`` tokens: id -> (text, is control).

    Raises ``FormatError`` where the file is damaged and ``UnsupportedModel`` for a model of words
    or characters.
    """
    try:
        pieces, trainer, normalizer = _parse(path.read_bytes())
        texts = [piece[1].decode("utf-8") for piece in pieces]
        scores = [struct.unpack("<f", piece.get(2, b"\0\0\0\0"))[0] for piece in pieces]
        types = [piece.get(3, int(TokenType.NORMAL)) for piece in pieces]
    except (IndexError, KeyError, ValueError, TypeError, AttributeError, struct.error):
        raise FormatError(
            f"{path}: this is no SentencePiece model, or a damaged one; download it again"
        ) from None
    kind = _KINDS.get(trainer.get(3, 1))
    if kind is None:
        raise UnsupportedModel(f"{path}: SentencePiece models of words or characters are not read")
    for token, (text, control) in sorted(added.items()):
        while token >= len(texts):
            texts.append(f"[PAD{len(texts)}]")
            scores.append(-1000.0)
            types.append(TokenType.UNUSED)
        texts[token] = text
        types[token] = TokenType.CONTROL if control else TokenType.USER_DEFINED
    return Vocab(
        model=kind,
        pre=None,
        tokens=texts,
        types=np.array(types, np.int32),
        scores=np.array(scores, np.float32),
        merges=(),
        ids=_ids(trainer, len(texts)),
        add_bos=None,
        add_eos=None,
        add_space_prefix=bool(normalizer.get(3, 1)),
        remove_extra_whitespaces=bool(normalizer.get(4, 1)),
        lowercase=None,
        charsmap=normalizer.get(2, b""),
    )


def _ids(trainer: Mapping[int, Any], count: int) -> dict[str, int]:
    """Special tokens: fields 40 to 43 and their defaults; a negative number says there is none."""
    ids = {}
    for field, (role, default) in enumerate(
        [("unk", 0), ("bos", 1), ("eos", 2), ("pad", -1)], start=40
    ):
        token = trainer.get(field, default)
        if 0 <= token < count:
            ids[role] = token
    return ids


def _parse(data: bytes) -> tuple[list[dict[int, Any]], dict[int, Any], dict[int, Any]]:
    """Fields of every piece, of the trainer's and of the normalizer's settings, by number."""
    pieces: list[dict[int, Any]] = []
    settings: dict[int, dict[int, Any]] = {2: {}, 3: {}}
    for number, value in _fields(data):
        if number == 1:
            pieces.append(dict(_fields(value)))
        elif number in settings:
            settings[number] = dict(_fields(value))
    if not pieces:
        raise ValueError("no pieces")
    return pieces, settings[2], settings[3]


def _fields(data: Any) -> Iterator[tuple[int, Any]]:
    """(number, value) of each field; numbers of fixed size come as their bytes."""
    position = 0
    while position < len(data):
        tag, position = _varint(data, position)
        wire = tag & 7
        if wire == 0:
            value, position = _varint(data, position)
            yield tag >> 3, value
            continue
        size = {1: 8, 5: 4}.get(wire)
        if wire == 2:
            size, position = _varint(data, position)
        if size is None or position + size > len(data):
            raise ValueError("a field of unknown kind, or past the end")
        yield tag >> 3, data[position : position + size]
        position += size


def _varint(data: bytes, position: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):  # ten bytes at most
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
    raise ValueError("a number that does not end")
