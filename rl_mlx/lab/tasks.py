"""Tasks of EleutherAI's lm-evaluation-harness, where that is installed, on a model of ours.

The harness brings the tasks, downloads their data and counts the score; a model answers three kinds
of question, which ``Bridge`` does.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rl_mlx.errors import InvalidRequest
from rl_mlx.lab.measurement import Measurement, Record, optional
from rl_mlx.lab.perplexity import scored
from rl_mlx.lab.plots import COLOURS, axes
from rl_mlx.lab.text import Passage, log_probs
from rl_mlx.llm import LLM

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_BATCH = 32
_MAX_TOKENS = 256  # of an answer, where a task says nothing; the harness's own default


@dataclass(frozen=True)
class Score:
    """One figure of one task; ``error`` is its standard error, None where there is none."""

    task: str
    metric: str
    value: float
    error: float | None
    samples: int


@dataclass(frozen=True)
class TaskScores(Measurement):
    """All figures of all tasks."""

    model: str
    backend: str
    harness: str
    scores: tuple[Score, ...]

    def records(self) -> list[Record]:
        """A row for each figure."""
        return [asdict(score) for score in self.scores]

    def plot(self, ax: Axes | None = None) -> Axes:
        """Bars with standard errors."""
        ax = axes(ax, f"Tasks of {self.model}", "score", "")
        names = [f"{s.task}, {s.metric}" for s in self.scores]
        errors = [s.error or 0.0 for s in self.scores]
        ax.barh(names, [s.value for s in self.scores], xerr=errors, color=COLOURS[6])
        ax.invert_yaxis()
        return ax


def tasks(
    llm: LLM,
    names: Sequence[str],
    *,
    limit: int | None = None,
    shots: int | None = None,
    include: str | Path | None = None,
) -> TaskScores:
    """Run tasks by their names in the harness; ``include`` is a folder with more of them in YAML.

    ``limit`` takes the first examples of each alone, ``shots`` sets how many solved ones go before.
    Raises ``MissingPackage`` without the harness, ``InvalidRequest`` for an unknown task.
    """
    harness = optional("lm_eval", install="lm-eval")
    manager = optional("lm_eval.tasks").TaskManager(
        include_path=None if include is None else str(include)
    )
    for name in names:
        if name not in manager.all_tasks:
            raise InvalidRequest(f"the harness has no task {name!r}; lm_eval ls tasks names them")
    base = optional("lm_eval.api.model").LM
    bridge = type("RlMlxModel", (Bridge, base), {"__init__": Bridge.__init__})(llm)
    results = harness.simple_evaluate(
        bridge, tasks=list(names), limit=limit, num_fewshot=shots, task_manager=manager,
        log_samples=False, bootstrap_iters=0,
    )  # fmt: skip
    return TaskScores(llm.info.name, llm.info.backend, harness.__version__, _scores(results))


def _scores(results: dict[str, Any]) -> tuple[Score, ...]:
    found = []
    for task, figures in results["results"].items():
        samples = results.get("n-samples", {}).get(task, {}).get("effective", 0)
        for key, value in figures.items():
            metric, _, kept = key.partition(",")
            if not kept or metric.endswith("_stderr") or not isinstance(value, (int, float)):
                continue
            error = figures.get(f"{metric}_stderr,{kept}")
            error = float(error) if isinstance(error, (int, float)) else None
            found.append(Score(task, metric, float(value), error, samples))
    return tuple(found)


class Bridge:
    """What the harness asks of a model, answered by ``llm``; each request has its ``args``."""

    def __init__(self, llm: LLM) -> None:
        super().__init__()
        self._llm = llm

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Of ``(context, continuation)``: the continuation's log-likelihood, and whether it is what
        greedy decoding would have given.
        """
        return [self._continued(*request.args) for request in requests]

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        """Log-likelihoods of whole texts."""
        return [self._whole(request.args[0]) for request in requests]

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Answers to ``(context, settings)``; those of the same settings are batched."""
        answers: dict[int, str] = {}
        by_settings = sorted(range(len(requests)), key=lambda i: repr(requests[i].args[1]))
        for _, group in itertools.groupby(by_settings, lambda i: repr(requests[i].args[1])):
            for batch in _batches(list(group)):
                sampling = _sampling(requests[batch[0]].args[1])
                prompts = [self._llm.tokenize(requests[i].args[0]) for i in batch]
                room = self._llm.info.context - sampling["max_tokens"]
                found = self._llm.generate([p[-max(room, 1) :] for p in prompts], **sampling)
                answers.update(zip(batch, (r.text for r in found)))
        return [answers[i] for i in range(len(requests))]

    def _continued(self, context: str, continuation: str) -> tuple[float, bool]:
        # A space at the end belongs to the word that follows, as vocabularies have it.
        spaces = len(context) - len(context.rstrip())
        if spaces:
            context, continuation = context[:-spaces], context[-spaces:] + continuation
        llm = self._llm
        before = llm.tokenize(context) or [self._start]
        whole = llm.tokenize(context + continuation)
        after = whole[len(before) :] if whole[: len(before)] == before else []
        after = after or llm.tokenize(continuation, add_special=False)
        ids = [*before, *after][-(llm.info.context + 1) :]
        rows = llm.logits(ids[:-1])[-len(after) :]
        targets = np.array(ids[-len(after) :])
        probs = log_probs(rows)[np.arange(len(rows)), targets[-len(rows) :]]
        return float(probs.sum()), bool((rows.argmax(axis=1) == targets[-len(rows) :]).all())

    def _whole(self, text: str) -> float:
        ids = self._llm.tokenize(text, add_special=False)
        window = max(2, min(self._llm.info.context, len(ids)))
        cut = Passage(
            name="", sha256="", vocabulary="", ids=np.array(ids, np.int32), bytes=len(text),
            bos=self._start, window=window, stride=window,
        )  # fmt: skip
        return sum(
            float(probs[np.arange(len(ids)), ids].sum()) for ids, probs in scored(self._llm, cut)
        )

    @property
    def _start(self) -> int:
        """What goes before a text that has nothing before it."""
        tokenizer = self._llm.tokenizer
        if tokenizer.bos_id is not None:
            return tokenizer.bos_id
        return min(tokenizer.eos_ids, default=0)


def _batches(found: list[int]) -> Iterable[list[int]]:
    return (found[i : i + _BATCH] for i in range(0, len(found), _BATCH))


def _sampling(settings: dict[str, Any]) -> dict[str, Any]:
    """The harness's words in ours: greedy unless ``do_sample``."""
    until = settings.get("until") or []
    stops = (until,) if isinstance(until, str) else tuple(until)
    most = settings.get("max_gen_toks") or settings.get("max_tokens") or _MAX_TOKENS
    temperature = settings.get("temperature", 1.0) if settings.get("do_sample") else 0.0
    return {"stop": stops, "max_tokens": int(most), "temperature": float(temperature)}
