"""How far a model's predictions are from a reference's: KL divergence and agreement."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from rl_mlx.errors import InvalidRequest
from rl_mlx.lab.measurement import Measurement, Record
from rl_mlx.lab.perplexity import OnProgress, scored, standard_error
from rl_mlx.lab.plots import COLOURS, axes
from rl_mlx.lab.reference import Reference
from rl_mlx.lab.text import Passage, Text, passage
from rl_mlx.llm import LLM

if TYPE_CHECKING:
    from matplotlib.axes import Axes

F64 = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Divergence(Measurement):
    """``sum(p * log(p / q))`` in nats (Kullback and Leibler 1951) for each token of a text.

    ``p`` is the reference's distribution, ``q`` the model's. ``mean`` has the standard error
    ``error``. ``top1`` is the share of tokens whose likeliest candidate is the same, ``top5`` the
    share of the model's five likeliest that are five likeliest of the reference.
    ``probability_rms`` is the root mean square change of the right token's probability;
    ``quantiles`` are those of the divergence at 0, 1, ... 100%.
    """

    model: str
    backend: str
    reference: str
    reference_backend: str
    text: str
    text_sha256: str
    tokens: int
    mean: float
    error: float
    median: float
    p99: float
    maximum: float
    top1: float
    top5: float
    probability_rms: float
    perplexity: float
    reference_perplexity: float
    quantiles: tuple[float, ...] = field(repr=False)

    def records(self) -> list[Record]:
        """One row."""
        hidden = {"quantiles", "text_sha256"}
        return [{k: v for k, v in self.__dict__.items() if k not in hidden}]

    def plot(self, ax: Axes | None = None) -> Axes:
        """The share of tokens that diverge by more than so much."""
        title = f"{self.model} against {self.reference}: {self.mean:.3g} nats a token in the mean"
        ax = axes(ax, title, "KL divergence of a token, nats", "share of tokens above it, %")
        ax.plot(self.quantiles, np.arange(100, -1, -1), color=COLOURS[1])
        ax.axvline(self.mean, color="0.5", linestyle=":", label="mean")
        if self.maximum > 0:
            ax.set_xscale("log")
        ax.legend(frameon=False)
        return ax


def divergence(
    llm: LLM,
    reference: Reference | LLM | str | Path,
    text: Text | str | None = None,
    *,
    window: int | None = None,
    stride: int | None = None,
    tokens: int | None = None,
    progress: OnProgress | None = None,
) -> Divergence:
    """Compare ``llm`` with a file that ``perplexity(save_logits=)`` wrote, or with another model.

    A file says what text it is of and how that was cut; with ``text`` it must be of that one. For
    another model the arguments are those of ``perplexity``.

    Raises ``InvalidRequest`` where the vocabularies or the texts differ, and what ``perplexity``
    raises.
    """
    if isinstance(reference, (str, Path)):
        reference = Reference.open(reference)
    if isinstance(reference, Reference):
        cut, name, backend = reference.passage, reference.model, reference.backend
        _check_file(reference, text, given=(window, stride, tokens))
        vocab = reference.vocab
    else:
        cut = passage(reference, text, window=window, stride=stride, tokens=tokens)
        name, backend, vocab = reference.info.name, reference.info.backend, reference.info.vocab
    _check_vocabulary(llm, cut, name, vocab)
    sums = _Sums()
    for (targets, q), p in zip(scored(llm, cut, progress), _reference_rows(reference, cut)):
        sums.add(targets, p, q)
    return sums.divergence(llm, cut, name, backend)


def _check_file(
    reference: Reference, text: Text | str | None, given: tuple[int | None, ...]
) -> None:
    if any(value is not None for value in given):
        raise InvalidRequest(
            f"{reference.path} says how its text was cut; leave window, stride and tokens out"
        )
    wanted = Text("text", text) if isinstance(text, str) else text
    if wanted is not None and wanted.sha256 != reference.passage.sha256:
        raise InvalidRequest(
            f"{reference.path} is of another text, {reference.passage.name}; make it again with "
            f"{wanted.name}, or leave the text out"
        )


def _check_vocabulary(llm: LLM, cut: Passage, name: str, vocab: int) -> None:
    if llm.tokenizer.fingerprint != cut.vocabulary or llm.info.vocab != vocab:
        raise InvalidRequest(
            f"{llm.info.name} and {name} have different vocabularies, of {llm.info.vocab} and "
            f"{vocab} tokens; only models of one vocabulary can be compared so"
        )
    if cut.window > llm.info.context:
        raise InvalidRequest(
            f"the reference has windows of {cut.window} tokens and {llm.info.name} a context of "
            f"{llm.info.context}; make the reference with a smaller window"
        )


def _reference_rows(reference: Reference | LLM, cut: Passage) -> Iterator[F64]:
    """The reference's log-probabilities in the pieces that ``scored`` gives."""
    if isinstance(reference, LLM):
        yield from (probs for _, probs in scored(reference, cut))
        return
    start = 0
    for size in cut.pieces():
        yield reference.rows(start, start + size)
        start += size


class _Sums:
    """What is known of every token so far."""

    def __init__(self) -> None:
        self._kl: list[F64] = []
        self._losses: list[tuple[F64, F64]] = []
        self._top1 = self._top5 = 0.0

    def add(self, targets: npt.NDArray[np.int32], p: F64, q: F64) -> None:
        """More tokens, with their log-probabilities ``[n, vocab]`` by reference and model."""
        rows, best = np.arange(len(targets)), min(5, p.shape[1])
        # Not below 0 but for the rounding of the sum.
        self._kl.append(np.maximum((np.exp(p) * (p - q)).sum(axis=1), 0))
        self._losses.append((-p[rows, targets], -q[rows, targets]))
        # Equally likely ones are as good as each other, which rounding in a file may make them.
        self._top1 += float((p[rows, q.argmax(axis=1)] >= p.max(axis=1)).sum())
        likeliest = np.argpartition(q, -best, axis=1)[:, -best:]
        least = np.partition(p, -best, axis=1)[:, -best]
        self._top5 += float((p[rows[:, None], likeliest] >= least[:, None]).mean(axis=1).sum())

    def divergence(self, llm: LLM, cut: Passage, name: str, backend: str) -> Divergence:
        """All of it together."""
        kl = np.concatenate(self._kl)
        before, after = (np.concatenate(part) for part in zip(*self._losses))
        quantiles = np.quantile(kl, np.linspace(0, 1, 101))
        change = np.exp(-after) - np.exp(-before)
        return Divergence(
            model=llm.info.name,
            backend=llm.info.backend,
            reference=name,
            reference_backend=backend,
            text=cut.name,
            text_sha256=cut.sha256,
            tokens=len(kl),
            mean=float(kl.mean()),
            error=standard_error(kl),
            median=float(quantiles[50]),
            p99=float(quantiles[99]),
            maximum=float(kl.max()),
            top1=self._top1 / len(kl),
            top5=self._top5 / len(kl),
            probability_rms=float(np.sqrt(np.square(change).mean())),
            perplexity=math.exp(after.mean()),
            reference_perplexity=math.exp(before.mean()),
            quantiles=tuple(map(float, quantiles)),
        )
