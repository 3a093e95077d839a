"""How fast a model reads prompts and writes answers, in llama-bench's terms.

``pp512`` reads a prompt of 512 tokens, ``tg128`` generates 128; ``@ d4096`` after as many tokens
that the cache holds already; ``x 8`` does so for eight streams at once, whose tokens are summed.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Literal

from rl_mlx.errors import EngineError, InvalidRequest
from rl_mlx.llm import LLM
from rl_mlx.types import Result


@dataclass(frozen=True)
class Case:
    """One thing to measure; its streams share nothing. Raises ``InvalidRequest``."""

    kind: Literal["pp", "tg"]
    tokens: int
    depth: int = 0
    streams: int = 1

    def __post_init__(self) -> None:
        if self.tokens < 1 or self.depth < 0 or self.streams < 1:
            raise InvalidRequest("a benchmark needs at least one token and one stream, and depth 0")

    @property
    def name(self) -> str:
        """As llama-bench calls it."""
        depth = f" @ d{self.depth}" if self.depth else ""
        streams = f" x {self.streams}" if self.streams > 1 else ""
        return f"{self.kind}{self.tokens}{depth}{streams}"


@dataclass(frozen=True)
class Speed:
    """Tokens a second of all streams together, in each repeat."""

    case: Case
    rates: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Over the repeats."""
        return statistics.mean(self.rates)

    @property
    def deviation(self) -> float:
        """The sample's standard deviation; 0 of a single one."""
        return statistics.stdev(self.rates) if len(self.rates) > 1 else 0.0


def cases(
    prompts: Iterable[int], answers: Iterable[int], depths: Iterable[int], streams: Iterable[int]
) -> list[Case]:
    """All combinations; a length of 0 leaves its kind out."""
    lengths = [*(("pp", n) for n in prompts if n), *(("tg", n) for n in answers if n)]
    return [
        Case("pp" if kind == "pp" else "tg", n, depth, many)
        for many, depth, (kind, n) in itertools.product(streams, depths, lengths)
    ]


def measure(llm: LLM, case: Case, repeats: int = 5) -> Speed:
    """Runs the case once to warm up and then ``repeats`` times, on random tokens.

    Times are those of the engine, so the host's work on texts is left out. Raises
    ``InvalidRequest`` where the case is longer than the context.
    """
    if repeats < 1:
        raise InvalidRequest("repeats must be at least 1")
    needed = case.depth + case.tokens + (2 if case.kind == "tg" else 1)
    if needed > llm.info.context:
        raise InvalidRequest(
            f"{case.name} needs a context of {needed} tokens and {llm.info.name} has "
            f"{llm.info.context}; set a longer --context, or shorter lengths"
        )
    random = Random(0)
    rates = [_run(llm, case, random) for _ in range(repeats + 1)]
    return Speed(case, tuple(rates[1:]))


def _run(llm: LLM, case: Case, random: Random) -> float:
    vocab = range(llm.info.vocab)
    # Fresh tokens every time, or a prefix in the cache would answer for the prompt.
    deep = [random.choices(vocab, k=case.depth) for _ in range(case.streams)]
    if case.depth:
        _generate(llm, deep, 1)
    if case.kind == "tg":
        starts = deep if case.depth else [[token] for token in random.choices(vocab, k=len(deep))]
        return _generation_rate(_generate(llm, starts, case.tokens + 1))
    prompts = [[*d, *random.choices(vocab, k=case.tokens)] for d in deep]
    return _prompt_rate(_generate(llm, prompts, 1))


def _generate(llm: LLM, prompts: Sequence[Sequence[int]], tokens: int) -> list[Result]:
    results = llm.generate(prompts, max_tokens=tokens, temperature=0, ignore_eos=True)
    if any(len(r.token_ids) < tokens for r in results):
        raise EngineError(f"the model was to generate {tokens} tokens and ended before")
    return results


def _prompt_rate(results: Sequence[Result]) -> float:
    """Tokens that were computed, over the time until all streams have their first token."""
    computed = sum(r.timings.prompt_tokens - r.timings.reused for r in results)
    return computed / max(r.timings.first_token for r in results)


def _generation_rate(results: Sequence[Result]) -> float:
    """Tokens after the very first one, over the time from it to the last one."""
    first = min(r.timings.first_token for r in results)
    last = max(r.timings.first_token + r.timings.decode for r in results)
    return (sum(r.timings.generated for r in results) - 1) / (last - first)
