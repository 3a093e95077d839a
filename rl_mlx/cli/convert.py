"""``rl-mlx convert``: a GGUF file or a folder to an MLX folder."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rl_mlx.cli.options import Json, Model, takes_flags
from rl_mlx.cli.terminal import console, is_terminal, note, plain, print_json, size
from rl_mlx.errors import InvalidRequest

if TYPE_CHECKING:
    from rl_mlx.convert import ExportReport, Recipe, Report

NAME = "convert"


@dataclass(frozen=True)
class QuantFlags:
    """What is quantized, and how: the fields of ``Recipe``."""

    quant: Annotated[
        str | None,
        typer.Option(help="Quantize: q2 q3 q4 q5 q6 q8 mxfp4 mxfp8 nvfp4.", metavar="NAME"),
    ] = None
    group_size: Annotated[
        int | None, typer.Option(help="Weights under one scale: 32, 64 or 128. [64]", metavar="N")
    ] = None
    mixed: Annotated[
        bool | None,
        typer.Option("--mixed", help="Wider where errors hurt most: v, o, down, embed, head."),
    ] = None
    role: Annotated[
        list[str] | None,
        typer.Option(
            help="ROLE=QUANT for v, o, down, embed, head or router; may be repeated.",
            metavar="R=Q",
        ),
    ] = None
    tensor: Annotated[
        list[str] | None,
        typer.Option(
            help="PATTERN=QUANT (or =keep) for tensors by name; may be repeated.", metavar="P=Q"
        ),
    ] = None

    def recipe(self) -> Recipe | None:
        """The recipe; None where nothing is to be quantized. Raises ``InvalidRequest``."""
        from rl_mlx.convert import Recipe

        if self.quant is None:
            if any((self.group_size, self.mixed, self.role, self.tensor)):
                raise InvalidRequest("--group-size, --mixed, --role and --tensor go with --quant")
            return None
        return Recipe(
            quant=self.quant,
            group_size=self.group_size,
            mixed=bool(self.mixed),
            roles=_pairs("--role", self.role or []),
            tensors=_pairs("--tensor", self.tensor or []),
        )


@takes_flags
def command(
    model: Model,
    destination: Annotated[Path, typer.Argument(metavar="FOLDER", help="Where to write it.")],
    quants: QuantFlags,
    fidelity: Annotated[
        str, typer.Option(help="How GGUF blocks are moved: exact, faithful or compact.")
    ] = "faithful",
    scales: Annotated[
        str, typer.Option(help="Type of the scales: float16, bfloat16 or float32.")
    ] = "float16",
    dtype: Annotated[
        str | None, typer.Option(help="Round plain floats to this type.", metavar="NAME")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a model folder.")] = False,
    json: Json = False,
) -> None:
    """Convert a model to an MLX folder, and show what each tensor lost."""
    from rl_mlx.convert import convert
    from rl_mlx.store import resolve

    recipe = quants.recipe()
    files = resolve(model)
    with progress_bar(files.name) as progress:
        report = convert(
            files.path,
            destination,
            quant=recipe,
            fidelity=fidelity,  # type: ignore[arg-type]  # checked there
            scales=scales,  # type: ignore[arg-type]
            dtype=dtype,  # type: ignore[arg-type]
            force=force,
            progress=progress,
        )
    if json:
        print_json(report.as_dict())
    else:
        print_report(report)


def _pairs(option: str, given: list[str]) -> dict[str, str]:
    pairs = {}
    for text in given:
        name, equals, value = text.rpartition("=")
        if not equals or not name:
            raise InvalidRequest(f"{option} {text!r} must be written NAME=QUANT")
        pairs[name] = value
    return pairs


@contextmanager
def progress_bar(name: str) -> Iterator[Callable[[int, int], None] | None]:
    """A bar with bytes a second on stderr, where that is a terminal."""
    if not is_terminal(sys.stderr):
        yield None
        return
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns: list[Any] = [
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    ]
    with Progress(*columns, console=console(stderr=True), transient=True) as bar:
        task = bar.add_task(plain(name), total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def print_report(report: Report | ExportReport) -> None:
    """The table, and a line on what it all comes to."""
    head, *lines, last = report.rows()
    widths = [max(map(len, column)) for column in zip(*(head, *lines, last), strict=True)]
    for row in (head, *lines, last):
        cells = [
            cell.ljust(width) if i < 3 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        print(plain("  ".join(cells)).rstrip())
    speed = report.source_bytes / max(report.seconds, 1e-9)
    print(
        f"{plain(report.destination)}: {size(report.bytes)}, {report.bits_after:.2f} bits a weight"
        f", in {report.seconds:.1f} s ({size(speed)}/s)"
    )
    for line in report.notes:
        note(line)
