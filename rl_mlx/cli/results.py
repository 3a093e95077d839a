"""What becomes of a result of the lab: lines for people, JSON, a file, a picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rl_mlx.cli.options import Json
from rl_mlx.cli.terminal import plain, print_json
from rl_mlx.errors import InvalidRequest

if TYPE_CHECKING:
    from rl_mlx.lab import Measurement


@dataclass(frozen=True)
class ResultFlags:
    """Where the result goes besides the terminal."""

    json: Json = False
    save: Annotated[
        Path | None, typer.Option(help="Write it: FILE.json or FILE.parquet.", metavar="FILE")
    ] = None
    plot: Annotated[
        Path | None, typer.Option(help="Draw it: FILE.png, .svg or .pdf.", metavar="FILE")
    ] = None

    def show(self, result: Measurement, lines: Sequence[str]) -> None:
        """Do all that was asked for; ``lines`` are for people."""
        if self.save is not None:
            result.save(self.save)
        if self.plot is not None:
            save_plot(result, self.plot)
        if self.json:
            print_json(result.as_dict())
        else:
            for line in lines:
                print(plain(line))


def save_plot(result: Measurement, path: Path) -> None:
    """Draw into a file; raises ``InvalidRequest`` for a suffix that matplotlib does not know."""
    from rl_mlx.lab.measurement import optional

    optional("matplotlib").use("agg")
    figure: Any = result.plot().figure
    known = figure.canvas.get_supported_filetypes()
    if path.suffix.removeprefix(".") not in known:
        raise InvalidRequest(f"{path} cannot be drawn; end its name in .png, .svg or .pdf")
    figure.savefig(path)
