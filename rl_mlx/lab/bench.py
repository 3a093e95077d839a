"""How fast a model reads prompts and writes answers, in llama-bench's terms.

``pp512`` reads a prompt of 512 tokens, ``tg128`` generates 128; ``@ d4096`` after as many tokens
that the cache holds already; ``x 8`` does so for eight streams at once, whose tokens are summed.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from random import Random
from typing import TYPE_CHECKING, Literal

from rl_mlx.backends import machine
from rl_mlx.errors import EngineError, InvalidRequest
from rl_mlx.lab.energy import Meter
from rl_mlx.lab.measurement import Measurement, Record
from rl_mlx.lab.plots import COLOURS, axes
from rl_mlx.llm import LLM
from rl_mlx.types import Result

if TYPE_CHECKING:
    from matplotlib.axes import Axes


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
    """Tokens a second of all streams together, in each repeat.

    ``first_token`` are the seconds until every stream had its first token, for a case that reads
    prompts. ``joules`` is the energy of all repeats, None where the machine does not tell it.
    """

    case: Case
    rates: tuple[float, ...]
    first_tokens: tuple[float, ...] = ()
    joules: float | None = None

    @property
    def mean(self) -> float:
        """Over the repeats."""
        return statistics.mean(self.rates)

    @property
    def deviation(self) -> float:
        """The sample's standard deviation; 0 of a single one."""
        return statistics.stdev(self.rates) if len(self.rates) > 1 else 0.0

    @property
    def first_token(self) -> float | None:
        """Mean seconds to the first token, None for a case that only generates."""
        return statistics.mean(self.first_tokens) if self.first_tokens else None

    @property
    def joules_per_token(self) -> float | None:
        """Of the tokens that count in the case; what was before them (depth) is included."""
        if self.joules is None:
            return None
        return self.joules / (len(self.rates) * self.case.tokens * self.case.streams)

    def ratio(self, to: Speed) -> float:
        """The median of this speed over that of ``to``, pair by pair."""
        return statistics.median(a / b for a, b in zip(self.rates, to.rates, strict=True))


@dataclass(frozen=True)
class Row:
    """One case of one side. ``ratio`` is to side 0, None for that one itself."""

    side: int
    model: str
    backend: str
    device: str
    bytes: int
    parameters: int
    test: str
    kind: str
    tokens: int
    depth: int
    streams: int
    tokens_per_second: float
    deviation: float
    first_token: float | None
    joules_per_token: float | None
    ratio: float | None
    repeats: tuple[float, ...]


@dataclass(frozen=True)
class Benchmark(Measurement):
    """All cases of all sides, on one machine."""

    cpu: str
    cores: int
    gpus: tuple[str, ...]
    memory: int
    rows: tuple[Row, ...]

    def records(self) -> list[Record]:
        """A row each, without the single repeats."""
        return [{k: v for k, v in asdict(r).items() if k != "repeats"} for r in self.rows]

    def plot(self, ax: Axes | None = None) -> Axes:
        """Bars of every case, side by side, with the deviation over the repeats."""
        tests = list(dict.fromkeys(r.test for r in self.rows))
        sides = {r.side: f"{r.model} on {r.backend}" for r in self.rows}
        ratios = [r.ratio for r in self.rows if r.ratio is not None]
        title = sides[0]
        if ratios:
            title = f"{sides[1]} has {min(ratios):.2f} to {max(ratios):.2f} times the speed"
        ax = axes(ax, title, "", "tokens a second", (2 + 1.4 * len(tests), 4))
        width = 0.8 / len(sides)
        for side, name in sides.items():
            rows = [r for r in self.rows if r.side == side]
            ax.bar(
                [tests.index(r.test) + (side - (len(sides) - 1) / 2) * width for r in rows],
                [r.tokens_per_second for r in rows], width, yerr=[r.deviation for r in rows],
                label=name, color=COLOURS[6 if side == 0 else 1], capsize=3,
            )  # fmt: skip
        ax.set_xticks(range(len(tests)), tests)
        ax.grid(visible=False, axis="x")
        ax.legend(frameon=False)
        return ax


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
    return measure_in_turns([llm], case, repeats)[0]


def measure_in_turns(sides: Sequence[LLM], case: Case, repeats: int = 5) -> list[Speed]:
    """As ``measure``, of several models that take turns; who is first changes from turn to turn.

    What else the machine does then falls on all of them alike, and ``Speed.ratio`` is of pairs.
    """
    if repeats < 1:
        raise InvalidRequest("repeats must be at least 1")
    for llm in sides:
        _check(llm, case)
    runs: list[list[_Run]] = [[] for _ in sides]
    random = Random(0)
    for turn in range(-1, repeats):
        order = list(range(len(sides)))
        for i in order if turn % 2 else order[::-1]:
            run = _run(sides[i], case, random)
            if turn >= 0:  # the first was to warm up
                runs[i].append(run)
    return [_speed(case, found) for found in runs]


def rows(sides: Sequence[LLM], speeds: Sequence[Speed]) -> list[Row]:
    """The rows of one case."""
    found = []
    for i, (llm, speed) in enumerate(zip(sides, speeds, strict=True)):
        info, case = llm.info, speed.case
        found.append(
            Row(
                i, info.name, info.backend, info.device, info.weight_bytes, info.parameters,
                case.name, case.kind, case.tokens, case.depth, case.streams,
                speed.mean, speed.deviation, speed.first_token, speed.joules_per_token,
                speed.ratio(speeds[0]) if i else None, speed.rates,
            )
        )  # fmt: skip
    return found


def benchmark(found: Iterable[Row]) -> Benchmark:
    """Rows, and the machine they are of."""
    return Benchmark(
        machine.cpu_name(), machine.physical_cores(), tuple(g.name for g in machine.gpus()),
        machine.memory_total(), tuple(found),
    )  # fmt: skip


@dataclass(frozen=True)
class _Run:
    rate: float
    first_token: float | None
    joules: float | None


def _check(llm: LLM, case: Case) -> None:
    needed = case.depth + case.tokens + (2 if case.kind == "tg" else 1)
    if needed > llm.info.context:
        raise InvalidRequest(
            f"{case.name} needs a context of {needed} tokens and {llm.info.name} has "
            f"{llm.info.context}; set a longer --context, or shorter lengths"
        )


def _speed(case: Case, runs: Sequence[_Run]) -> Speed:
    joules = [r.joules for r in runs if r.joules is not None]
    return Speed(
        case,
        tuple(r.rate for r in runs),
        tuple(r.first_token for r in runs if r.first_token is not None),
        sum(joules) if len(joules) == len(runs) else None,
    )


def _run(llm: LLM, case: Case, random: Random) -> _Run:
    vocab = range(llm.info.vocab)
    meter = Meter()
    # Fresh tokens every time, or a prefix in the cache would answer for the prompt.
    deep = [random.choices(vocab, k=case.depth) for _ in range(case.streams)]
    if case.depth:
        _generate(llm, deep, 1)
    if case.kind == "tg":
        starts = deep if case.depth else [[token] for token in random.choices(vocab, k=len(deep))]
        return _Run(_generation_rate(_generate(llm, starts, case.tokens + 1)), None, meter.joules())
    prompts = [[*d, *random.choices(vocab, k=case.tokens)] for d in deep]
    results = _generate(llm, prompts, 1)
    first = max(r.timings.first_token for r in results)
    return _Run(_prompt_rate(results), first, meter.joules())


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
