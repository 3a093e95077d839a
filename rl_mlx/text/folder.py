"""A tokenizer out of a Hugging Face folder: ``tokenizer.json`` and the configuration beside it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import tokenizers

from rl_mlx.convert.gguf.parts import Parts, Spelling, end_ids
from rl_mlx.convert.gguf.tokenizer import build
from rl_mlx.convert.gguf.vocab import TokenType
from rl_mlx.errors import FormatError, ModelNotFound, UnsupportedModel
from rl_mlx.text.sentencepiece import read_sentencepiece

_ROLES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
MAX_TOKENS = 2**24
"""No model has more; ids above it are damage."""
_BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")


def read_folder(folder: Path) -> Parts:
    """The parts of the tokenizer in ``folder``.

    Raises ``ModelNotFound`` where there is no folder, ``FormatError`` where a file is damaged, and
    ``UnsupportedModel`` where the tokenizer is of a form we do not read.
    """
    if not folder.is_dir():
        raise ModelNotFound(f"{folder}: there is no such folder; check the path")
    config = _json(folder / "tokenizer_config.json")
    if (folder / "tokenizer.json").exists():
        return _from_json(folder, config)
    if (folder / "tokenizer.model").exists():
        vocab = read_sentencepiece(folder / "tokenizer.model", _added_tokens(folder, config))
        vocab = replace(
            vocab,
            add_bos=config.get("add_bos_token", vocab.add_bos),
            add_eos=config.get("add_eos_token", vocab.add_eos),
            templates=_templates(folder, config),
        )
        parts = build(vocab)
        return replace(parts, ends=parts.ends | _configured_ends(folder, len(parts.tokens)))
    raise UnsupportedModel(
        f"{folder}: it has neither tokenizer.json nor tokenizer.model; "
        "make one with transformers: AutoTokenizer.from_pretrained(folder).save_pretrained(folder)"
    )


def _from_json(folder: Path, config: Mapping[str, Any]) -> Parts:
    path = folder / "tokenizer.json"
    try:
        encoder = tokenizers.Tokenizer.from_str(path.read_text("utf-8"))
    except Exception as error:  # noqa: BLE001 - the Rust library raises nothing narrower
        raise FormatError(f"{path}: it cannot be read: {error}; download it again") from None
    encoder.no_truncation()
    encoder.no_padding()
    tokens = _tokens(path, encoder)
    types = _types(encoder, tokens)
    ids = _roles(folder, config, encoder)
    ends = end_ids(encoder.token_to_id, types, ids) | _configured_ends(folder, len(tokens))
    spelling, strips_space = _spelling(path, encoder)
    prefix, suffix = _around(encoder, config, ids)
    return Parts(
        encoder=encoder,
        plain=lambda: _blind(encoder),
        tokens=tokens,
        types=types,
        spelling=spelling,
        strips_space=strips_space,
        prefix=prefix,
        suffix=suffix,
        ids=ids,
        ends=ends,
        templates=_templates(folder, config),
    )


def _blind(encoder: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """A copy that takes control tokens for text: the switch is not for many threads."""
    copy = tokenizers.Tokenizer.from_str(encoder.to_str())
    copy.encode_special_tokens = True
    return copy


def _tokens(path: Path, encoder: tokenizers.Tokenizer) -> list[str]:
    """Texts by id; an id that nothing has is an empty text."""
    index: dict[str, int] = encoder.get_vocab(with_added_tokens=True)
    last = max(index.values(), default=-1)
    if last >= MAX_TOKENS:
        raise FormatError(f"{path}: it has a token of id {last}; download it again")
    tokens = [""] * (last + 1)
    for text, token in index.items():
        tokens[token] = text
    return tokens


def _types(encoder: tokenizers.Tokenizer, tokens: list[str]) -> list[int]:
    types: list[int] = [TokenType.NORMAL if text else TokenType.UNUSED for text in tokens]
    if getattr(encoder.model, "byte_fallback", False):
        for token, text in enumerate(tokens):
            if _BYTE_TOKEN.fullmatch(text):
                types[token] = TokenType.BYTE
    for token, added in encoder.get_added_tokens_decoder().items():
        types[token] = TokenType.CONTROL if added.special else TokenType.USER_DEFINED
    return types


def _spelling(path: Path, encoder: tokenizers.Tokenizer) -> tuple[Spelling, bool]:
    """How tokens spell bytes, and whether a decoded text loses a space in front: by the decoder."""
    steps = {step["type"]: step for step in _flat(_state(encoder.decoder))}
    if "ByteLevel" in steps:
        return "bytes", False
    if "WordPiece" in steps:
        return "wordpiece", True
    if "Metaspace" in steps:
        return "spaces", steps["Metaspace"].get("prepend_scheme") != "never"
    if "Replace" in steps and steps["Replace"].get("content") == " ":
        return "spaces", "Strip" in steps
    raise UnsupportedModel(
        f"{path}: decoders of kind {', '.join(steps) or 'none'} are not supported"
    )


def _state(component: Any) -> dict[str, Any]:
    state: dict[str, Any] = json.loads(component.__getstate__()) if component is not None else {}
    return state


def _flat(state: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The steps of a ``Sequence``, or the one step."""
    if state.get("type") == "Sequence":
        for step in state["decoders"]:
            yield from _flat(step)
    elif state:
        yield state


def _around(
    encoder: tokenizers.Tokenizer, config: Mapping[str, Any], ids: Mapping[str, int]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """What the post-processor puts around a text; the flags of the configuration overrule it."""
    framed = encoder.encode("a")
    mask = [*framed.special_tokens_mask, 0]
    before = mask.index(0)
    after = len(framed.ids) - mask[:-1][::-1].index(0) if 0 in mask[:-1] else len(framed.ids)
    prefix, suffix = tuple(framed.ids[:before]), tuple(framed.ids[after:])
    bos, eos = ids.get("bos"), ids.get("eos")
    if bos is not None and isinstance(add := config.get("add_bos_token"), bool):
        prefix = (bos,) if add else tuple(token for token in prefix if token != bos)
    if eos is not None and isinstance(add := config.get("add_eos_token"), bool):
        suffix = (eos,) if add else tuple(token for token in suffix if token != eos)
    return prefix, suffix


def _roles(
    folder: Path, config: Mapping[str, Any], encoder: tokenizers.Tokenizer
) -> dict[str, int]:
    """The special tokens by role, of whichever file names them."""
    named = {**_json(folder / "special_tokens_map.json"), **{k: v for k, v in config.items() if v}}
    ids = {}
    for role in _ROLES:
        text = _content(named.get(f"{role}_token"))
        token = encoder.token_to_id(text) if text else None
        if token is not None:
            ids[role] = token
    return ids


def _configured_ends(folder: Path, count: int) -> frozenset[int]:
    """``eos_token_id`` of generation_config.json, else of config.json: a number or a list."""
    for name in ("generation_config.json", "config.json"):
        ends = _json(folder / name).get("eos_token_id")
        if ends is not None:
            ends = ends if isinstance(ends, list) else [ends]
            return frozenset(
                token for token in ends if isinstance(token, int) and 0 <= token < count
            )
    return frozenset()


def _added_tokens(folder: Path, config: Mapping[str, Any]) -> dict[int, tuple[str, bool]]:
    """Tokens beyond the model's own: id -> (text, whether it is a control token)."""
    added = {
        token: (text, True)
        for text, token in _json(folder / "added_tokens.json").items()
        if isinstance(token, int)
    }
    for token, entry in _object(config.get("added_tokens_decoder")).items():
        if token.isdecimal():
            added[int(token)] = (_content(entry) or "", bool(_object(entry).get("special")))
    if max(added, default=0) >= MAX_TOKENS:
        raise FormatError(f"{folder}: it has an added token of id {max(added)}; download it again")
    return added


def _templates(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Chat templates by name. The file ``chat_template.jinja`` goes before the configuration's."""
    found = _json(folder / "chat_template.json").get("chat_template", config.get("chat_template"))
    if isinstance(found, list):
        found = {_object(entry).get("name"): _object(entry).get("template") for entry in found}
    elif isinstance(found, str):
        found = {"default": found}
    texts = _object(found).items()
    templates = {name: text for name, text in texts if name and isinstance(text, str)}
    for path in sorted((folder / "additional_chat_templates").glob("*.jinja")):
        templates[path.stem] = path.read_text("utf-8", "replace")
    if (path := folder / "chat_template.jinja").exists():
        templates["default"] = path.read_text("utf-8", "replace")
    return templates


def _object(value: Any) -> Mapping[Any, Any]:
    """The value, where it is an object."""
    return value if isinstance(value, Mapping) else {}


def _content(token: Any) -> str | None:
    """The text of a token that is written as a text or as an object."""
    text = token.get("content") if isinstance(token, Mapping) else token
    return text if isinstance(text, str) else None


def _json(path: Path) -> dict[str, Any]:
    """The object in a file; empty where there is no file."""
    try:
        value = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise FormatError(f"{path}: it is not JSON: {error}; download it again") from None
    if not isinstance(value, dict):
        raise FormatError(f"{path}: it must be a JSON object; download it again")
    return value
