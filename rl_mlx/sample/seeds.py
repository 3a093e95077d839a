"""The random numbers of sampling: the same on every backend. Pure Python."""

from __future__ import annotations

import os

_MASK = (1 << 64) - 1


DRAW, XTC, ACCEPT, PROPOSE = range(4)
"""What a position's numbers are for: its token, XTC's coin, a draft's test, a draft's token."""


def uniform(seed: int, position: int, purpose: int = DRAW) -> float:
    """A number in [0, 1) that depends on these alone, by SplitMix64 (Steele et al. 2014).

    A sequence that is preempted, batched otherwise or run again therefore draws the same numbers.
    """
    count = 4 * position + purpose
    z = (seed * 0x9E3779B97F4A7C15 + (count + 1) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return float((z ^ (z >> 31)) >> 40) / (1 << 24)  # 24 bits: exact in float32, never 1


def fresh_seed() -> int:
    """A seed for a request that gave none."""
    return int.from_bytes(os.urandom(8), "little")
