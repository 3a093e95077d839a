"""The vocabulary of a GGUF file: its ``tokenizer.*`` metadata, read and checked, nothing decided.

Keys and their meaning: ``docs/gguf.md`` of ggml and ``llama_vocab`` of llama.cpp.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

import numpy as np
import numpy.typing as npt

from rl_mlx.convert.gguf.reader import GGUFFile
from rl_mlx.errors import FormatError

_KEY = "tokenizer.ggml."
_TEMPLATE = "tokenizer.chat_template"
_NAMED_IDS = {
    "bos": "bos_token_id",
    "eos": "eos_token_id",
    "eot": "eot_token_id",
    "eom": "eom_token_id",
    "unk": "unknown_token_id",
    "sep": "seperator_token_id",  # spelled so in the format
    "pad": "padding_token_id",
    "mask": "mask_token_id",
    "fim_pad": "fim_pad_token_id",
    "fim_rep": "fim_rep_token_id",
    "fim_sep": "fim_sep_token_id",
}
# What files that leave the ids out mean by it, by the kind of tokenizer.
_DEFAULT_IDS: dict[str, dict[str, int]] = {
    "llama": {"bos": 1, "eos": 2, "unk": 0},
    "bert": {"bos": 101, "unk": 100, "sep": 102, "pad": 0, "mask": 103},
    "t5": {"eos": 1, "unk": 2, "pad": 0},
}


class TokenType(IntEnum):
    """What a token is for (``llama_token_type``)."""

    UNDEFINED = 0
    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True, kw_only=True)
class Vocab:
    """A vocabulary as the file has it; None where the file is silent.

    ``model`` is the kind: ``llama`` (SentencePiece BPE), ``gpt2`` (byte-level BPE), ``t5``
    (unigram), ``bert`` (WordPiece), ``gemma4`` and rarer ones; ``pre`` names the pre-tokenizer of a
    ``gpt2`` one. ``types`` [n] are ``TokenType``s, ``scores`` [n] float32. ``merges`` are pairs
    joined by a space, best first. ``ids`` has the special tokens that are in range, by role
    (``bos eos eot eom unk sep pad mask fim_pad fim_rep fim_sep``). ``templates`` has the chat
    templates, the main one as ``default``.
    """

    model: str
    pre: str | None
    tokens: Sequence[str]
    types: npt.NDArray[np.int32]
    scores: npt.NDArray[np.float32] | None
    merges: Sequence[str]
    ids: Mapping[str, int]
    add_bos: bool | None
    add_eos: bool | None
    add_space_prefix: bool | None
    remove_extra_whitespaces: bool | None
    lowercase: bool | None
    charsmap: bytes
    templates: Mapping[str, str] = field(default_factory=dict)
    model_name: str = ""


def read_vocab(file: GGUFFile) -> Vocab:
    """The vocabulary of ``file``.

    Raises ``FormatError`` where there is none, where arrays disagree in length, or a key has the
    wrong type.
    """
    model = file.str(_KEY + "model", "")
    if not model or _KEY + "tokens" not in file.metadata:
        raise FormatError(
            f"{file.paths[0]}: it has no vocabulary (tokenizer.ggml.tokens); "
            "use a file that was converted with its tokenizer"
        )
    tokens = list(file.strings(_KEY + "tokens"))
    return Vocab(
        model=model,
        pre=_optional(file, "pre", str),
        tokens=tokens,
        types=_types(file, len(tokens)),
        scores=_scores(file, len(tokens)),
        merges=file.strings(_KEY + "merges") if _KEY + "merges" in file.metadata else (),
        ids=_ids(file, model, len(tokens)),
        add_bos=_optional(file, "add_bos_token", bool),
        add_eos=_optional(file, "add_eos_token", bool),
        add_space_prefix=_optional(file, "add_space_prefix", bool),
        remove_extra_whitespaces=_optional(file, "remove_extra_whitespaces", bool),
        lowercase=_optional(file, "normalizer.lowercase", bool),
        charsmap=_charsmap(file),
        templates=_templates(file),
        model_name=file.str("general.name", ""),
    )


def _optional(file: GGUFFile, name: str, kind: type[Any]) -> Any:
    key = _KEY + name
    if key not in file.metadata:
        return None
    return file.str(key) if kind is str else file.bool(key)


def _numbers(file: GGUFFile, name: str, count: int, kind: str) -> npt.NDArray[Any] | None:
    """The array of one number a token, of NumPy kinds ``kind``; longer ones are cut."""
    key = _KEY + name
    if key not in file.metadata:
        return None
    values = file.array(key)
    if values.dtype.kind not in kind or len(values) < count:
        raise FormatError(
            f"{file.paths[0]}: {key} has {len(values)} values of {values.dtype} "
            f"for {count} tokens; use another version of the model"
        )
    return values[:count]


def _types(file: GGUFFile, count: int) -> npt.NDArray[np.int32]:
    values = _numbers(file, "token_type", count, "iu")
    if values is None:
        return np.full(count, TokenType.NORMAL, np.int32)
    known = (values >= 0) & (values <= max(TokenType))
    return np.where(known, values, TokenType.UNDEFINED).astype(np.int32)


def _scores(file: GGUFFile, count: int) -> npt.NDArray[np.float32] | None:
    values = _numbers(file, "scores", count, "fiu")
    return None if values is None else values.astype(np.float32)


def _ids(file: GGUFFile, model: str, count: int) -> dict[str, int]:
    ids = dict(_DEFAULT_IDS.get(model, {}))
    for role, name in _NAMED_IDS.items():
        if _KEY + name in file.metadata:
            ids[role] = file.int(_KEY + name)
    # Files say "none" by -1 or 2^32 - 1.
    return {role: token for role, token in ids.items() if 0 <= token < count}


def _charsmap(file: GGUFFile) -> bytes:
    key = _KEY + "precompiled_charsmap"
    if key not in file.metadata:
        return b""
    values = file.array(key)
    if values.dtype.itemsize != 1:
        raise FormatError(f"{file.paths[0]}: {key} must be bytes, not {values.dtype}")
    return values.tobytes()


def _templates(file: GGUFFile) -> dict[str, str]:
    """``tokenizer.chat_template`` as ``default``, ``tokenizer.chat_template.NAME`` as ``NAME``."""
    templates: dict[str, str] = {}
    for key in file.metadata:
        if key == _TEMPLATE:
            templates["default"] = file.str(key)
        elif key.startswith(_TEMPLATE + "."):
            templates[key[len(_TEMPLATE) + 1 :]] = file.str(key)
    return templates
