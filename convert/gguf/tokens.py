"""The tokenizer of a Hugging Face folder as GGUF metadata (``tokenizer.*``).

Byte-level BPE becomes ``gpt2``, BPE that falls back to bytes ``llama`` (SentencePiece), unigram
``t5``. Source of the keys: ``docs/gguf.md`` of ggml and ``llama-vocab.cpp`` of llama.cpp.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import normalizers, pre_tokenizers

from rl_mlx.convert.files import read_json
from rl_mlx.convert.gguf.pretokenize import PRE_TOKENIZERS, PreTokenizer
from rl_mlx.convert.gguf.vocab import TokenType
from rl_mlx.convert.gguf.writer import Fields
from rl_mlx.errors import FormatError

_KEY = "tokenizer.ggml."
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_SPACE = "\u2581"
_ROLES = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding", "sep": "seperator"}
_ROLES |= {"mask": "mask"}
# What tells the pre-tokenizers apart: cases, digits, marks, scripts, spaces, lines.
_PROBE = (
    "Hello world's HELLO'S we'LL I'm don't  two   three    \n\n \n\t\ttab \r\nend\n"
    " 1 12 123 1234 12345 1234567 3.14 a1b22 x=1; y+=2//3 /path/to\n// (a) [b] {c} <d> --- ...\n/ "
    "camelCaseWord XMLHttp snake_case don\u2019t caf\u00e9 cafe\u0301 na\u00efve \u0301 "
    "\u4f60\u597d\uff0c\u4e16\u754c \u3053\u3093\u306b\u3061\u306f \u30ab\u30bf \uc548\ub155 "
    "\u0645\u0631\u062d\u0628\u0627 \u0928\u092e\u0938\u094d\u0924\u0947 \u0e2a\u0e27\u0e31 "
    "\u041f\u0440\u0438\u0432\u0435\u0442 \U0001f680\U0001f468\u200d\U0001f469 $5 \u20ac7 #tag "
    "@me it'sfoo 'reALLY x   123  45\n\n  6 `code` a&b|c ~~ ^^ "
    " \u0661\u0662\u0663 !!! ?! \u2026 IMGIMGABCZ <sentinel:1>   "
)


def describe(folder: Path, size: int) -> tuple[Fields, tuple[str, ...]]:
    """Metadata of the tokenizer in ``folder``, for a model of ``size`` token ids, and notes on it.

    A folder with no tokenizer, or one of another kind, gives a ``no_vocab`` model, which llama.cpp
    runs on token ids alone. Raises ``FormatError`` where tokenizer.json is damaged.
    """
    path = folder / "tokenizer.json"
    data = read_json(path)
    model = data.get("model") or {}
    if not data or not (kind := _kind(model)):
        what = "is of a kind that GGUF does not have" if data else "is not there"
        note = f"the tokenizer (tokenizer.json) {what}: the file runs on token ids alone"
        return {_KEY + "model": "no_vocab"}, (note,)
    try:
        found, notes = _KINDS[kind](model, data, size)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise FormatError(f"{path}: it is damaged: {error!r}; download it again") from error
    tokens = found[_KEY + "tokens"]
    assert isinstance(tokens, list)
    special = _special(folder, data, {text: i for i, text in enumerate(tokens)})
    return {_KEY + "model": kind, **found, **special, **_templates(folder)}, notes


def _kind(model: Mapping[str, Any]) -> str | None:
    if model.get("type") == "Unigram":
        return "t5"
    if model.get("type") != "BPE":
        return None
    return "llama" if model.get("byte_fallback") else "gpt2"


def _tokens(vocab: Mapping[str, int], data: Mapping[str, Any], size: int) -> tuple[Fields, Any]:
    """Texts and types by id, of all ids that the model has."""
    texts: list[str | None] = [None] * size
    types = np.full(size, TokenType.NORMAL, np.int32)
    for text, i in vocab.items():
        if i < size:
            texts[i] = text
            if _BYTE.fullmatch(text):
                types[i] = TokenType.BYTE
    for added in data.get("added_tokens", []):
        if added["id"] < size:
            texts[added["id"]] = added["content"]
            kind = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
            types[added["id"]] = kind
    types[[text is None for text in texts]] = TokenType.UNUSED
    named = [f"[PAD{i}]" if text is None else text for i, text in enumerate(texts)]
    return {_KEY + "tokens": named, _KEY + "token_type": types}, named


def _byte_level(
    model: Mapping[str, Any], data: Mapping[str, Any], size: int
) -> tuple[Fields, tuple[str, ...]]:
    found, _ = _tokens(model["vocab"], data, size)
    pre, note = _pre(data, whole_words=bool(model.get("ignore_merges")))
    return {_KEY + "pre": pre, **found, _KEY + "merges": _merges(model)}, note


def _merges(model: Mapping[str, Any]) -> list[str]:
    return [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]


def _sentencepiece(
    model: Mapping[str, Any], data: Mapping[str, Any], size: int
) -> tuple[Fields, tuple[str, ...]]:
    """SentencePiece merges the pair of the best score first: the rank, negated, says the same."""
    found, tokens = _tokens(model["vocab"], data, size)
    if model.get("unk_token") in tokens:
        types = found[_KEY + "token_type"]
        assert isinstance(types, np.ndarray)
        types[tokens.index(model["unk_token"])] = TokenType.UNKNOWN
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(_merges(model)):
        ranks.setdefault(merge.replace(" ", ""), rank)
    scores = np.array([-float(ranks.get(token, len(ranks))) for token in tokens], np.float32)
    prefix = {_KEY + "add_space_prefix": _has_prefix(data)}
    return {_KEY + "pre": "default", **found, _KEY + "scores": scores, **prefix}, ()


def _unigram(
    model: Mapping[str, Any], data: Mapping[str, Any], size: int
) -> tuple[Fields, tuple[str, ...]]:
    pairs = model["vocab"]
    found, _ = _tokens({text: i for i, (text, _) in enumerate(pairs)}, data, size)
    scores = np.zeros(size, np.float32)
    scores[: len(pairs)] = [score for _, score in pairs[:size]]
    steps = list(_steps(data.get("normalizer")))
    found |= {
        _KEY + "scores": scores,
        _KEY + "add_space_prefix": _has_prefix(data),
        _KEY + "remove_extra_whitespaces": any(s.get("type") == "Strip" for s in steps),
    }
    charsmap = next((s["precompiled_charsmap"] for s in steps if s["type"] == "Precompiled"), "")
    if charsmap:
        octets = np.frombuffer(base64.b64decode(charsmap), np.uint8)
        found[_KEY + "precompiled_charsmap"] = octets
    return {_KEY + "pre": "default", **found}, ()


_KINDS = {"gpt2": _byte_level, "llama": _sentencepiece, "t5": _unigram}


def _steps(component: Any) -> Iterator[Mapping[str, Any]]:
    """The steps of a normalizer or pre-tokenizer, sequences taken apart."""
    if not isinstance(component, Mapping):
        return
    if component.get("type") == "Sequence":
        for step in component.get("normalizers") or component.get("pretokenizers") or ():
            yield from _steps(step)
    else:
        yield component


def _has_prefix(data: Mapping[str, Any]) -> bool:
    """Whether a text gets a space in front."""
    for step in (*_steps(data.get("normalizer")), *_steps(data.get("pre_tokenizer"))):
        if step["type"] == "Prepend" and step.get("prepend") == _SPACE:
            return True
        if step["type"] == "Metaspace":
            never = step.get("prepend_scheme") == "never" or step.get("add_prefix_space") is False
            return not never
    return False


def _pre(data: Mapping[str, Any], *, whole_words: bool) -> tuple[str, tuple[str, ...]]:
    """The name of a pre-tokenizer: the one among llama.cpp's that cuts a text in the same words."""
    encoder = tokenizers.Tokenizer.from_str(json.dumps({**data, "model": _EMPTY}))
    wanted = _cut(encoder.normalizer, encoder.pre_tokenizer)
    same: dict[str, PreTokenizer] = {}
    cuts: dict[PreTokenizer, list[str]] = {}
    for name, pre in PRE_TOKENIZERS.items():
        if pre.spaces or name == "default":
            continue
        if pre not in cuts:
            cuts[pre] = _cut(pre.normalizer(), pre.splitter())
        if cuts[pre] == wanted:
            same[name] = pre
    fitting = [name for name, pre in same.items() if pre.whole_words == whole_words]
    names = fitting or list(same)
    if "llama-bpe" in names:  # of many names for one thing, the one that files have
        return "llama-bpe", ()
    if names:
        return names[0], ()
    return "default", (
        "llama.cpp knows no pre-tokenizer that cuts words as this model's does: "
        "the file is to be run with token ids, or its text is cut a little otherwise",
    )


_EMPTY = {"type": "BPE", "vocab": {}, "merges": []}


def _cut(
    normalizer: normalizers.Normalizer | None, splitter: pre_tokenizers.PreTokenizer | None
) -> list[str]:
    text = normalizer.normalize_str(_PROBE) if normalizer else _PROBE
    return [piece for piece, _ in splitter.pre_tokenize_str(text)] if splitter else [text]


def _special(folder: Path, data: Mapping[str, Any], ids: Mapping[str, int]) -> Fields:
    """Special tokens by GGUF's names, and whether a text begins and ends with one."""
    config = read_json(folder / "tokenizer_config.json")
    named = {
        **read_json(folder / "special_tokens_map.json"),
        **{k: v for k, v in config.items() if v},
    }
    found: dict[str, int] = {}
    for role in _ROLES:
        token = named.get(f"{role}_token")
        text = token.get("content") if isinstance(token, dict) else token
        if isinstance(text, str) and text in ids:
            found[role] = ids[text]
    keys: Fields = {f"{_KEY}{_ROLES[role]}_token_id": token for role, token in found.items()}
    ends = read_json(folder / "generation_config.json").get("eos_token_id")
    others = [i for i in ends if i != found.get("eos")] if isinstance(ends, list) else []
    if len(others) == 1 and others[0] in ids.values():  # of several llama.cpp knows the names
        keys[_KEY + "eot_token_id"] = others[0]
    for role, at in (("bos", 0), ("eos", -1)):
        flag = config.get(f"add_{role}_token")
        if not isinstance(flag, bool):
            flag = role in found and _framed(data.get("post_processor"), at) == found[role]
        keys[f"{_KEY}add_{role}_token"] = flag
    return keys


def _framed(processor: Any, at: int) -> int | None:
    """The id that a post-processor puts first (0) or last (-1)."""
    for step in processor.get("processors", [processor]) if isinstance(processor, dict) else ():
        if step.get("type") == "TemplateProcessing" and step.get("single"):
            special = step["single"][at].get("SpecialToken")
            if special:
                found: int = step["special_tokens"][special["id"]]["ids"][0]
                return found
    return None


def _templates(folder: Path) -> Fields:
    """The chat template as ``tokenizer.chat_template``, others by their names after it."""
    key = "tokenizer.chat_template"
    found: Fields = {}
    given = read_json(folder / "tokenizer_config.json").get("chat_template")
    if isinstance(given, str):
        found[key] = given
    for entry in given if isinstance(given, list) else []:
        name = entry["name"]
        found[key if name == "default" else f"{key}.{name}"] = entry["template"]
    for path in sorted((folder / "additional_chat_templates").glob("*.jinja")):
        found[f"{key}.{path.stem}"] = path.read_text("utf-8")
    if (folder / "chat_template.jinja").is_file():
        found[key] = (folder / "chat_template.jinja").read_text("utf-8")
    return found
