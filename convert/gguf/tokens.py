"""The tokenizer of a Hugging Face folder as a GGUF vocabulary: byte-level BPE, or BPE with byte
fallback.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

NORMAL, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 3, 4, 5, 6
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
# A piece of the regular expression that splits words, and what llama.cpp calls the whole.
_PRE: Mapping[str, str] = MappingProxyType(
    {
        r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?": "llama-bpe",
        r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?": "qwen2",
    }
)


@dataclass(frozen=True)
class Vocabulary:
    """``model`` is ``gpt2``, ``llama`` or ``no_vocab``; the last has no tokens and runs on ids
    alone.
    """

    model: str
    pre: str = ""
    tokens: tuple[str, ...] = ()
    types: tuple[int, ...] = ()
    scores: tuple[float, ...] = ()
    merges: tuple[str, ...] = ()
    special: Mapping[str, int] = field(default_factory=dict)
    template: str = ""


def read_vocabulary(folder: Path, size: int) -> Vocabulary:
    """The vocabulary of ``folder``, filled up to ``size`` tokens; ``no_vocab`` where it is of
    another kind.
    """
    data = _json(folder / "tokenizer.json")
    model = data.get("model", {})
    if model.get("type") != "BPE":
        return Vocabulary("no_vocab")
    tokens: list[str | None] = [None] * size
    types = [NORMAL] * size
    for text, i in model["vocab"].items():
        if i < size:
            tokens[i], types[i] = text, BYTE if _BYTE.fullmatch(text) else NORMAL
    for added in data.get("added_tokens", []):
        if added["id"] < size:
            tokens[added["id"]] = added["content"]
            types[added["id"]] = CONTROL if added["special"] else USER_DEFINED
    types = [UNUSED if t is None else kind for t, kind in zip(tokens, types, strict=True)]
    named = tuple(f"[PAD{i}]" if t is None else t for i, t in enumerate(tokens))
    merges = tuple(m if isinstance(m, str) else " ".join(m) for m in model["merges"])
    is_fallback = bool(model.get("byte_fallback"))
    return Vocabulary(
        model="llama" if is_fallback else "gpt2",
        pre="default" if is_fallback else _pre(data.get("pre_tokenizer")),
        tokens=named,
        types=tuple(types),
        scores=_scores(named, merges) if is_fallback else (),
        merges=() if is_fallback else merges,
        special=_special(folder, {t: i for i, t in enumerate(named)}),
        template=_template(folder),
    )


def _scores(tokens: tuple[str, ...], merges: tuple[str, ...]) -> tuple[float, ...]:
    """SentencePiece merges the pair of the best score first; the rank of a merge, negated, says the
    same.
    """
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(merges):
        ranks.setdefault(merge.replace(" ", ""), rank)
    return tuple(-float(ranks.get(token, len(ranks))) for token in tokens)


def _pre(pre_tokenizer: Any) -> str:
    text = json.dumps(pre_tokenizer).replace("\\\\", "\\")
    return next((name for piece, name in _PRE.items() if piece in text), "gpt-2")


def _special(folder: Path, ids: Mapping[str, int]) -> dict[str, int]:
    """Special tokens by GGUF's names."""
    config = _json(folder / "tokenizer_config.json")
    found = {}
    for name, key in (("bos", "bos"), ("eos", "eos"), ("padding", "pad"), ("unknown", "unk")):
        token = config.get(f"{key}_token")
        text = token.get("content") if isinstance(token, dict) else token
        if isinstance(text, str) and text in ids:
            found[name] = ids[text]
    return found


def _template(folder: Path) -> str:
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text("utf-8")
    template = _json(folder / "tokenizer_config.json").get("chat_template")
    return template if isinstance(template, str) else ""


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    data = json.loads(path.read_text("utf-8"))
    return data if isinstance(data, dict) else {}
