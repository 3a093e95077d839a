"""The tokenizer files of an MLX folder, made from the vocabulary of a GGUF file."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

import tokenizers
from tokenizers import decoders, processors

from rl_mlx.convert.gguf.parts import Parts
from rl_mlx.convert.gguf.reader import GGUFFile
from rl_mlx.convert.gguf.tokenizer import build
from rl_mlx.convert.gguf.vocab import read_vocab

_ROLES = ("bos", "eos", "unk", "sep", "pad", "mask")
_NO_NAME = re.compile(r"[^\w-]")
_SPACE = "\u2581"


def tokenizer_files(file: GGUFFile, context: int | None) -> dict[str, str]:
    """Names and texts of the files that ``transformers`` makes the tokenizer of ``file`` from.

    They are ``tokenizer.json``, ``tokenizer_config.json``, ``generation_config.json`` and the chat
    templates; none where the file has no vocabulary. Raises what ``build`` raises.
    """
    if file.get("tokenizer.ggml.model", "no_vocab") in ("no_vocab", "none"):
        return {}
    vocab = read_vocab(file)
    parts = build(vocab)
    encoder = tokenizers.Tokenizer.from_str(parts.encoder.to_str())
    encoder.decoder = _decoder(parts, vocab.model)
    if around := _template(parts):
        encoder.post_processor = around
    files = {
        "tokenizer.json": encoder.to_str(pretty=True),
        "tokenizer_config.json": _json(_config(parts, context)),
        "generation_config.json": _json(_generation(parts)),
    }
    for name, template in parts.templates.items():
        path = f"additional_chat_templates/{re.sub(_NO_NAME, '_', name)}.jinja"
        files["chat_template.jinja" if name == "default" else path] = template
    return files


def _decoder(parts: Parts, model: str) -> decoders.Decoder:
    if parts.spelling == "bytes":
        return decoders.ByteLevel()
    if model == "bert":
        return decoders.WordPiece()
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if parts.strips_space:
        steps.append(decoders.Strip(" ", 1, 0))
    return decoders.Sequence(steps)


def _template(parts: Parts) -> processors.TemplateProcessing | None:
    """What puts the first and last tokens around a text."""
    prefix = [(parts.tokens[token], token) for token in parts.prefix]
    suffix = [(parts.tokens[token], token) for token in parts.suffix]
    if not prefix and not suffix:
        return None
    return processors.TemplateProcessing(
        single=[*(f"{t}:0" for t, _ in prefix), "$A:0", *(f"{t}:0" for t, _ in suffix)],
        pair="$A:0 $B:1",
        special_tokens=[*prefix, *suffix],
    )


def _config(parts: Parts, context: int | None) -> dict[str, Any]:
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "add_bos_token": bool(parts.prefix),
        "add_eos_token": bool(parts.suffix),
    }
    if context is not None:
        config["model_max_length"] = context
    for role in _ROLES:
        if role in parts.ids:
            config[f"{role}_token"] = parts.tokens[parts.ids[role]]
    return config


def _generation(parts: Parts) -> dict[str, Any]:
    """Where answers begin and end, by token ids."""
    config: dict[str, Any] = {"eos_token_id": sorted(parts.ends)}
    for role in ("bos", "pad"):
        if role in parts.ids:
            config[f"{role}_token_id"] = parts.ids[role]
    return config


def _json(value: Mapping[str, Any]) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"
