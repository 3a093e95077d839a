"""Models side by side: size, perplexity, divergence from the first of them, speed."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rl_mlx.errors import InvalidRequest
from rl_mlx.lab.bench import Case, measure
from rl_mlx.lab.divergence import divergence
from rl_mlx.lab.measurement import Measurement, Record
from rl_mlx.lab.perplexity import perplexity
from rl_mlx.lab.plots import COLOURS, axes
from rl_mlx.lab.text import Text
from rl_mlx.llm import LLM

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Open = Callable[[str, str], LLM]


@dataclass(frozen=True)
class Candidate:
    """One model on one backend. ``bytes`` and ``bits_per_weight`` are of the weights in memory.

    ``kl`` is the mean divergence from the reference in nats a token, ``kl_error`` its standard
    error; ``tokens_per_second`` is None where it was not measured.
    """

    model: str
    backend: str
    bytes: int
    bits_per_weight: float
    perplexity: float
    kl: float
    kl_error: float
    top1: float
    top5: float
    tokens_per_second: float | None


@dataclass(frozen=True)
class Comparison(Measurement):
    """All candidates in order; the first is the reference."""

    text: str
    text_sha256: str
    tokens: int
    candidates: tuple[Candidate, ...]

    def records(self) -> list[Record]:
        """A row each."""
        return [asdict(c) for c in self.candidates]

    @property
    def frontier(self) -> tuple[Candidate, ...]:
        """Those that no other beats in both size and divergence, the smallest first.

        The reference, whose divergence is 0 by definition, is none of them.
        """
        found: list[Candidate] = []
        for c in sorted(self.candidates[1:], key=lambda c: (c.bytes, c.kl)):
            if not found or c.kl < found[-1].kl:
                found.append(c)
        return tuple(found)

    def plot(self, ax: Axes | None = None) -> Axes:
        """Divergence against bits a weight, with the frontier as a line."""
        rest, best = self.candidates[1:], self.frontier
        title = f"{len(best)} of {len(rest)} are the best of their size"
        ax = axes(ax, title, "bits a weight in memory", "mean KL divergence, nats a token")
        for c in rest:
            marker = "o" if c in best else "x"
            ax.plot(c.bits_per_weight, c.kl, marker, color=COLOURS[1 if c in best else 2])
            ax.annotate(
                _label(c, self.candidates), (c.bits_per_weight, c.kl), xytext=(6, 4),
                textcoords="offset points", fontsize=8,
            )  # fmt: skip
        line = [(c.bits_per_weight, c.kl) for c in best]
        ax.plot([x for x, _ in line], [y for _, y in line], "-", color=COLOURS[1], linewidth=1)
        if rest and all(c.kl > 0 for c in rest):
            ax.set_yscale("log")
        ax.margins(x=0.12, y=0.12)
        return ax


def _label(candidate: Candidate, among: Sequence[Candidate]) -> str:
    several = len({c.backend for c in among}) > 1
    return f"{candidate.model} ({candidate.backend})" if several else candidate.model


def compare(
    models: Sequence[str | Path],
    text: Text | str | None = None,
    *,
    backends: Sequence[str] = ("auto",),
    window: int | None = None,
    stride: int | None = None,
    tokens: int | None = None,
    speed: bool = False,
    open_model: Open | None = None,
) -> Comparison:
    """Every model on every backend against the first model on the first backend.

    One model is in memory at a time; the reference's predictions wait in a temporary file.
    ``speed`` generates 64 tokens, three times. ``open_model(reference, backend)`` opens them, by
    default ``LLM``. Other arguments are those of ``perplexity``.

    Raises ``InvalidRequest`` for fewer than two to compare, and what ``divergence`` raises.
    """
    pairs = [(str(model), backend) for model in models for backend in backends]
    if len(pairs) < 2:
        raise InvalidRequest("a comparison needs two models, or two backends")
    opened = open_model or (lambda reference, backend: LLM(reference, backend=backend))
    found: list[Candidate] = []
    with tempfile.TemporaryDirectory(prefix="rl-mlx-") as folder:
        kept = Path(folder) / "reference"
        for model, backend in pairs:
            with opened(model, backend) as llm:
                if not found:
                    first = perplexity(
                        llm, text, window=window, stride=stride, tokens=tokens, save_logits=kept
                    )
                    scores = (first.value, 0.0, 0.0, 1.0, 1.0)
                else:
                    d = divergence(llm, kept)
                    scores = (d.perplexity, d.mean, d.error, d.top1, d.top5)
                found.append(_candidate(llm, scores, speed=speed))
    return Comparison(first.text, first.text_sha256, first.tokens, tuple(found))


def _candidate(
    llm: LLM, scores: tuple[float, float, float, float, float], *, speed: bool
) -> Candidate:
    info = llm.info
    rate = measure(llm, Case("tg", 64), 3).mean if speed else None
    return Candidate(
        info.name, info.backend, info.weight_bytes, info.bits_per_weight, *scores, rate
    )
