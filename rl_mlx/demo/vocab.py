"""The tokenizer of the demo and its draft: a small byte-level BPE, and the ChatML template."""

from __future__ import annotations

import json
from collections.abc import Iterable

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from rl_mlx.demo.corpus import Conversation

SIZE = 2048
PAD, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SPECIAL = (PAD, START, END)

# The pre-tokenizer that GGUF files call "qwen2" (each digit alone), by its regular expression.
PRE = "qwen2"
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)

CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)

Segment = tuple[str, bool]


def train(texts: Iterable[str]) -> Tokenizer:
    """A BPE of ``SIZE`` tokens: the special tokens, the 256 bytes, then the merges in order."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=SIZE,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def tokens_and_merges(tokenizer: Tokenizer) -> tuple[list[str], list[str]]:
    """The tokens by id, and the merges as ``"left right"`` by rank."""
    model = json.loads(tokenizer.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].__getitem__)
    return tokens, [" ".join(pair) for pair in model["merges"]]


def segments(conversation: Conversation) -> list[Segment]:
    """What the chat template makes, in pieces; true for those that the model learns to write."""
    if conversation.text is not None:
        return [(conversation.text + END, True)]
    pieces: list[Segment] = []
    if conversation.system is not None:
        pieces.append((f"{START}system\n{conversation.system}{END}\n", False))
    for question, answer in conversation.turns:
        pieces.append((f"{START}user\n{question}{END}\n{START}assistant\n", False))
        pieces += [(answer + END, True), ("\n", False)]
    return pieces
