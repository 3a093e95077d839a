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
# The first tokens of an answer, and those after "=", decide whether it is the right one; the rest
# follows almost by itself.
FIRST_TOKENS, DECISIVE_WEIGHT = 4, 4.0
EQUALS = "\u0120="  # " =" as a byte-level BPE writes it

# Of a single question mostly the beginning of the answer is learned: that is what tells questions
# apart, and it costs a third of the whole.
SHORT_ANSWER, SHORT_SHARE = 12, 0.6

Batch = tuple[mx.array, mx.array]
Row = tuple[list[int], list[float]]


def batches(tokenizer: Tokenizer, seed: int, tokens: int) -> Iterator[Batch]:
    """Endless batches of at least ``tokens`` tokens, in the same order for the same seed.

    Each is the ids ``[B, L]`` and the loss weights of the next ids ``[B, L - 1]``. Conversations
    of like length go together; those longer than the longest batch are left out.
    """
    stream, dice = Corpus().conversations(seed), Random(f"{seed}/short")
    for pool in itertools.count():
        groups: dict[int, list[Row]] = {}
        made: list[Batch] = []
        for conversation in itertools.islice(stream, POOL):
            alone = len(conversation.turns) == 1 and conversation.system is None
            row = _row(tokenizer, conversation, cut=alone and dice.random() < SHORT_SHARE)
            length = next((n for n in LENGTHS if n >= len(row[0])), None)
            if length is None:
                continue
            group = groups.setdefault(length, [])
            group.append(row)
            if len(group) * length >= tokens:
                made.append(_padded(groups.pop(length), length))
        Random(f"{seed}/{pool}").shuffle(made)
        yield from made


def _row(tokenizer: Tokenizer, conversation: Conversation, *, cut: bool) -> Row:
    ids: list[int] = []
    weights: list[float] = []
    equals = tokenizer.token_to_id(EQUALS)
    for text, learned in segments(conversation):
        piece = tokenizer.encode(text).ids
        if cut and ids:
            piece = piece[:SHORT_ANSWER] if learned else []
        decided = piece.index(equals) if equals in piece else len(piece)
        ids += piece
        weights += [
            QUESTION_WEIGHT
            if not learned
            else DECISIVE_WEIGHT
            if i < FIRST_TOKENS or i > decided
            else 1.0
            for i in range(len(piece))
        ]
    return ids, weights


def _padded(rows: list[Row], length: int) -> Batch:
    ids = np.zeros((len(rows), length), np.int32)
    weights = np.zeros((len(rows), length), np.float32)
    for i, (row, row_weights) in enumerate(rows):
        ids[i, : len(row)] = row
        weights[i, : len(row)] = row_weights
    return mx.array(ids), mx.array(weights[:, 1:])
