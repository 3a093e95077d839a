"""Conversations as padded batches of token ids and of loss weights."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from random import Random

import mlx.core as mx
import numpy as np
from tokenizers import Tokenizer

from rl_mlx.demo.corpus import Conversation, Corpus
from rl_mlx.demo.vocab import segments

# Lengths that batches are padded to; few of them, for each is compiled anew.
LENGTHS = (32, 48, 64, 80, 96, 128, 192, 256, 384, 512, 1024)
POOL = 2048

QUESTION_WEIGHT = 0.1
# The first tokens of an answer decide which answer it is; the rest follows almost by itself.
FIRST_TOKENS, FIRST_WEIGHT = 4, 4.0

# Of a single question mostly the beginning of the answer is learned: that is what tells them apart,
# and it costs a third of the whole.
SHORT_ANSWER, SHORT_SHARE = 8, 0.7

Batch = tuple[mx.array, mx.array]
Row = tuple[list[int], list[float]]


def batches(
    tokenizer: Tokenizer, seed: int, tokens: int, *, single: bool = False
) -> Iterator[Batch]:
    """Endless batches of at least ``tokens`` tokens, in the same order for the same seed.

    With ``single`` of single questions, most of their answers cut short.

    Each is the ids ``[B, L]`` and the loss weights of the next ids ``[B, L - 1]``. Conversations
    of like length go together; those longer than the longest batch are left out.
    """
    corpus = Corpus()
    stream = corpus.questions_alone(seed) if single else corpus.conversations(seed)
    dice = Random(f"{seed}/short")
    for pool in itertools.count():
        groups: dict[int, list[Row]] = {}
        made: list[Batch] = []
        for conversation in itertools.islice(stream, POOL):
            row = _row(tokenizer, conversation, cut=single and dice.random() < SHORT_SHARE)
            length = next((n for n in LENGTHS if n >= len(row[0])), None)
            if length is None:
                continue
            group = groups.setdefault(length, [])
            group.append(row)
            if len(group) * length >= tokens:
                made.append(_padded(groups.pop(length), length))
        Random(f"{seed}/{pool}").shuffle(made)
        yield from made


def _row(tokenizer: Tokenizer, conversation: Conversation, *, cut: bool = False) -> Row:
    ids: list[int] = []
    weights: list[float] = []
    for text, learned in segments(conversation):
        piece = tokenizer.encode(text).ids
        if cut and ids:
            piece = piece[:SHORT_ANSWER] if learned else []
        first = min(FIRST_TOKENS, len(piece)) if learned else 0
        rest = 1.0 if learned else QUESTION_WEIGHT
        ids += piece
        weights += [FIRST_WEIGHT] * first + [rest] * (len(piece) - first)
    return ids, weights


def _padded(rows: list[Row], length: int) -> Batch:
    ids = np.zeros((len(rows), length), np.int32)
    weights = np.zeros((len(rows), length), np.float32)
    for i, (row, row_weights) in enumerate(rows):
        ids[i, : len(row)] = row
        weights[i, : len(row)] = row_weights
    return mx.array(ids), mx.array(weights[:, 1:])
