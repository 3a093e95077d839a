"""``rl-mlx eval``: what a model's predictions are worth, and what a quantization cost them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rl_mlx.cli.load import open_llm
from rl_mlx.cli.options import Model, ModelFlags, takes_flags
from rl_mlx.cli.results import ResultFlags
from rl_mlx.cli.terminal import console, is_terminal

if TYPE_CHECKING:
    from rl_mlx.lab import Text
    from rl_mlx.llm import LLM

NAME = "eval"
app = typer.Typer(
    name=NAME,
    help="Measure perplexity, KL divergence and tasks.",
    rich_markup_mode=None,
)


@dataclass(frozen=True)
class TextFlags:
    """What is predicted, and how it is cut."""

    text: Annotated[
        Path | None, typer.Option(help="A UTF-8 file; without it a small text of our own.")
    ] = None
    tokens: Annotated[
        int | None, typer.Option(help="The first N tokens of the text alone.", metavar="N")
    ] = None
    window: Annotated[int | None, typer.Option(help="Tokens of a window. [512]", metavar="N")] = (
        None
    )
    stride: Annotated[
        int | None, typer.Option(help="Tokens between windows. [half a window]", metavar="N")
    ] = None

    def read(self) -> Text | None:
        """The file that was named."""
        from rl_mlx.lab import read_text

        return None if self.text is None else read_text(self.text)

    def cut(self) -> dict[str, int | None]:
        """The keyword arguments of ``perplexity``."""
        return {"window": self.window, "stride": self.stride, "tokens": self.tokens}


@app.command("perplexity")
@takes_flags
def perplexity_command(
    model: Model,
    loading: ModelFlags,
    text: TextFlags,
    result: ResultFlags,
    save_logits: Annotated[
        Path | None, typer.Option(help="Keep all predictions, for eval kl.", metavar="FILE")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace that file.")] = False,
) -> None:
    """How well a model predicts a text."""
    from rl_mlx.lab import perplexity

    read = text.read()
    with open_llm(model, loading) as llm, _progress("predicting") as progress:
        p = perplexity(
            llm, read, **text.cut(), save_logits=save_logits, force=force, progress=progress
        )
    result.show(
        p,
        [
            f"perplexity      {p.value:.4f} ± {p.error:.4f}",
            f"bits per byte   {p.bits_per_byte:.4f}",
            f"text            {p.text}, {p.tokens} tokens, {p.bytes} bytes",
            f"windows         {p.window} tokens, every {p.stride}",
            f"model           {p.model} on {p.backend}",
        ],
    )


@app.command("kl")
@takes_flags
def kl_command(
    model: Model,
    reference: Annotated[
        str, typer.Argument(metavar="REFERENCE", help="A file of --save-logits, or a model.")
    ],
    loading: ModelFlags,
    text: TextFlags,
    result: ResultFlags,
) -> None:
    """How far a model's predictions are from a reference's."""
    from rl_mlx.lab import divergence
    from rl_mlx.lab.reference import Reference, is_reference

    read = text.read()
    with open_llm(model, loading) as llm, _progress("comparing") as progress:
        if is_reference(reference):
            d = divergence(llm, Reference.open(reference), read, **text.cut(), progress=progress)
        else:
            with open_llm(reference, replace(loading, draft=None)) as base:
                d = divergence(llm, base, read, **text.cut(), progress=progress)
    result.show(
        d,
        [
            f"KL divergence   {d.mean:.6f} ± {d.error:.6f} nats a token",
            f"  median        {d.median:.6f}",
            f"  99%           {d.p99:.6f}",
            f"  maximum       {d.maximum:.6f}",
            f"same best       {100 * d.top1:.2f}%",
            f"same five best  {100 * d.top5:.2f}%",
            f"probability     {100 * d.probability_rms:.3f}% RMS change of the right token's",
            f"perplexity      {d.perplexity:.4f}, the reference's {d.reference_perplexity:.4f}",
            f"text            {d.text}, {d.tokens} tokens",
            f"model           {d.model} on {d.backend}",
            f"reference       {d.reference} on {d.reference_backend}",
        ],
    )


@app.command("compare")
@takes_flags
def compare_command(
    models: Annotated[
        list[str], typer.Argument(metavar="MODEL...", help="The first is the reference.")
    ],
    loading: ModelFlags,
    text: TextFlags,
    result: ResultFlags,
    backends: Annotated[
        str | None, typer.Option(help="Each model on each of these.", metavar="NAME,...")
    ] = None,
    speed: Annotated[bool, typer.Option("--speed", help="Measure tokens a second too.")] = False,
) -> None:
    """Models side by side: size, perplexity, divergence from the first."""
    from rl_mlx.lab import compare

    def opened(reference: str, backend: str) -> LLM:
        return open_llm(reference, replace(loading, backend=backend))

    names = [name.strip() for name in (backends or loading.backend or "auto").split(",")]
    c = compare(models, text.read(), **text.cut(), backends=names, speed=speed, open_model=opened)
    head = ("model", "backend", "bits", "perplexity", "KL divergence", "same best", "tokens/s")
    rows = [
        (
            one.model, one.backend, f"{one.bits_per_weight:.2f}", f"{one.perplexity:.4f}",
            f"{one.kl:.6f} ± {one.kl_error:.6f}", f"{100 * one.top1:.2f}%",
            "" if one.tokens_per_second is None else f"{one.tokens_per_second:.1f}",
        )
        for one in c.candidates
    ]  # fmt: skip
    result.show(c, [*table([head, *rows]), f"{c.text}, {c.tokens} tokens"])


@app.command("tasks")
@takes_flags
def tasks_command(
    model: Model,
    names: Annotated[list[str], typer.Argument(metavar="TASK...", help="As the harness names it.")],
    loading: ModelFlags,
    result: ResultFlags,
    limit: Annotated[
        int | None, typer.Option(help="Only the first N examples of each.", metavar="N", min=1)
    ] = None,
    shots: Annotated[
        int | None, typer.Option(help="Solved examples before each.", metavar="N", min=0)
    ] = None,
    include: Annotated[
        Path | None, typer.Option(help="A folder with more tasks in YAML.", metavar="FOLDER")
    ] = None,
) -> None:
    """Run tasks of lm-evaluation-harness, which downloads their data."""
    from rl_mlx.lab import tasks

    with open_llm(model, loading) as llm:
        found = tasks(llm, names, limit=limit, shots=shots, include=include)
    rows = [
        (s.task, s.metric, f"{s.value:.4f}", "" if s.error is None else f"± {s.error:.4f}")
        for s in found.scores
    ]
    result.show(found, table([("task", "metric", "value", ""), *rows]))


def table(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Lines of a table: the first two columns to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if i < 2 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths))
        ).rstrip()
        for row in rows
    ]


@contextmanager
def _progress(doing: str) -> Iterator[Callable[[int, int], None] | None]:
    """A bar of tokens on stderr, where that is a terminal."""
    if not is_terminal(sys.stderr):
        yield None
        return
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    columns: list[Any] = [
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    ]  # fmt: skip
    with Progress(*columns, console=console(stderr=True), transient=True) as bar:
        task = bar.add_task(doing, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
