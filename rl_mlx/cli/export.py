"""``rl-mlx export``: an MLX or Hugging Face folder to one GGUF file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rl_mlx.cli.convert import print_report, progress_bar
from rl_mlx.cli.options import Json, Model
from rl_mlx.cli.terminal import print_json

NAME = "export"


def command(
    model: Model,
    destination: Annotated[Path, typer.Argument(metavar="FILE", help="The GGUF file to write.")],
    quant: Annotated[
        str | None,
        typer.Option(help="Quantize as llama.cpp does: Q4_K_M, Q8_0, IQ4_XS...", metavar="NAME"),
    ] = None,
    imatrix: Annotated[
        Path | None,
        typer.Option(help="An importance matrix for --quant, GGUF or .dat.", metavar="FILE"),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing file.")] = False,
    json: Json = False,
) -> None:
    """Export a model folder to a GGUF file, and show what each tensor became."""
    from rl_mlx.convert import export
    from rl_mlx.store import resolve

    files = resolve(model)
    with progress_bar(files.name) as progress:
        report = export(
            files.path, destination, quant=quant, imatrix=imatrix, force=force, progress=progress
        )
    if json:
        print_json(report.as_dict())
    else:
        print_report(report)
