"""Perplexity: how well a model predicts a text, a token and a byte at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from rl_mlx.errors import EngineError
from rl_mlx.lab.measurement import Measurement, Record
from rl_mlx.lab.plots import axes, style
from rl_mlx.lab.reference import write_reference
from rl_mlx.lab.text import PIECE, Passage, Text, log_probs, passage
from rl_mlx.llm import LLM

if TYPE_CHECKING:
    from matplotlib.axes import Axes

OnProgress = Callable[[int, int], None]


@dataclass(frozen=True)
class Perplexity(Measurement):
    """``exp`` of the mean negative log-likelihood of a text's tokens (Jelinek et al. 1977).

    ``value`` is per token, ``error`` its standard error; ``byte_value`` per byte of the text, which
    compares models of different vocabularies, as ``bits_per_byte`` does. ``losses`` are the means
    of each window in nats a token, and ``scored`` the tokens that count in it.
    """

    model: str
    backend: str
    text: str
    text_sha256: str
    tokens: int
    bytes: int
    window: int
    stride: int
    value: float
    error: float
    byte_value: float
    bits_per_byte: float
    losses: tuple[float, ...] = field(repr=False)
    scored: tuple[int, ...] = field(repr=False)

    def records(self) -> list[Record]:
        """One row."""
        hidden = {"losses", "scored", "text_sha256"}
        return [{k: v for k, v in self.__dict__.items() if k not in hidden}]

    def plot(self, ax: Axes | None = None) -> Axes:
        """The perplexity of each window, along the text."""
        title = f"{self.model} predicts {self.text} with perplexity {self.value:.4g}"
        ax = axes(ax, title, "tokens of the text before", "perplexity of the window")
        starts = np.cumsum([0, *self.scored[:-1]])
        ax.plot(starts, np.exp(self.losses), **{**style(1), "drawstyle": "steps-post"})
        ax.axhline(self.value, color="0.5", linestyle=":", label="all of it")
        ax.legend(frameon=False)
        return ax


def perplexity(
    llm: LLM,
    text: Text | str | None = None,
    *,
    window: int | None = None,
    stride: int | None = None,
    tokens: int | None = None,
    save_logits: str | Path | None = None,
    force: bool = False,
    progress: OnProgress | None = None,
) -> Perplexity:
    """Measure ``llm`` on ``text``, by windows that slide over it (see ``lab.text.Passage``).

    ``save_logits`` keeps the log-probabilities of every token in a file for ``divergence``; an
    existing one is replaced with ``force`` alone. ``progress(done, total)`` counts tokens.

    Raises ``InvalidRequest`` for a text shorter than the window, ``DestinationExists``, and what
    ``LLM.logits`` raises.
    """
    cut = passage(llm, text, window=window, stride=stride, tokens=tokens)
    losses = []
    writing = (
        nullcontext()
        if save_logits is None
        else write_reference(save_logits, llm, cut, force=force)
    )
    with writing as write:
        for targets, probs in scored(llm, cut, progress):
            if write is not None:
                write(probs)
            losses.append(-probs[np.arange(len(targets)), targets])
    return _perplexity(llm, cut, np.concatenate(losses))


def scored(
    llm: LLM, cut: Passage, progress: OnProgress | None = None
) -> Iterator[tuple[npt.NDArray[np.int32], npt.NDArray[np.float64]]]:
    """Token ids and the log-probabilities ``[len(ids), vocab]`` they were chosen from, in pieces.

    Raises ``EngineError`` for logits that are no numbers.
    """
    done = 0
    for part in cut.windows():
        stop = part.first + len(part.targets)
        logits = llm.logits(part.inputs[:stop].tolist())[part.first :]
        for i in range(0, len(logits), PIECE):
            probs = log_probs(logits[i : i + PIECE])
            if not np.isfinite(probs).all():
                raise EngineError(
                    f"{llm.info.name} gives logits that are not finite on {llm.info.backend}; try "
                    "another dtype"
                )
            yield part.targets[i : i + PIECE], probs
        done += len(part.targets)
        if progress:
            progress(done, cut.count)


def _perplexity(llm: LLM, cut: Passage, losses: npt.NDArray[np.float64]) -> Perplexity:
    total, value = float(losses.sum()), math.exp(losses.mean())
    sizes = [len(part.targets) for part in cut.windows()]
    return Perplexity(
        model=llm.info.name,
        backend=llm.info.backend,
        text=cut.name,
        text_sha256=cut.sha256,
        tokens=len(losses),
        bytes=cut.bytes,
        window=cut.window,
        stride=cut.stride,
        value=value,
        error=value * standard_error(losses),
        byte_value=math.exp(total / cut.bytes),
        bits_per_byte=total / cut.bytes / math.log(2),
        losses=tuple(float(p.mean()) for p in np.split(losses, np.cumsum(sizes)[:-1])),
        scored=tuple(sizes),
    )


def standard_error(values: npt.NDArray[np.float64]) -> float:
    """Of the mean of ``values``; 0 of a single one."""
    return float(values.std(ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else 0.0
