"""``rl-mlx bench``: how fast a model is on this machine."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import ExitStack
from csv import DictWriter
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer

from rl_mlx import __version__
from rl_mlx.cli.load import open_llm
from rl_mlx.cli.options import Model, ModelFlags, takes_flags
from rl_mlx.cli.results import ResultFlags
from rl_mlx.cli.terminal import size
from rl_mlx.errors import InvalidRequest

if TYPE_CHECKING:
    from rl_mlx.lab.bench import Benchmark, Row
    from rl_mlx.llm import LLM

NAME = "bench"


@takes_flags
def command(
    model: Model,
    *,
    loading: ModelFlags,
    prompt: Annotated[
        str, typer.Option("--prompt", "-p", help="Prompt lengths; 0: none.", metavar="N,...")
    ] = "512",
    generate: Annotated[
        str, typer.Option("--generate", "-n", help="Answer lengths; 0: none.", metavar="N,...")
    ] = "128",
    depth: Annotated[
        str, typer.Option("--depth", "-d", help="Tokens in the cache before.", metavar="N,...")
    ] = "0",
    concurrency: Annotated[
        str, typer.Option("--concurrency", "-c", help="Streams at once.", metavar="N,...")
    ] = "1",
    repeats: Annotated[
        int, typer.Option("--repeats", "-r", help="Runs that are averaged.", min=1, metavar="N")
    ] = 5,
    vs: Annotated[
        str | None,
        typer.Option("--vs", help="A backend or a model to take turns with.", metavar="OTHER"),
    ] = None,
    csv: Annotated[bool, typer.Option("--csv", help="Print CSV.")] = False,
    result: ResultFlags,
) -> None:
    """Measure how fast prompts are read and answers are written, as a Markdown table."""
    from rl_mlx.lab.bench import benchmark, cases, measure_in_turns, rows

    if csv and result.json:
        raise InvalidRequest("--csv and --json exclude each other")
    wanted = cases(
        _numbers("--prompt", prompt, 0),
        _numbers("--generate", generate, 0),
        _numbers("--depth", depth, 0),
        _numbers("--concurrency", concurrency, 1),
    )
    if not wanted:
        raise InvalidRequest("nothing is to be measured: --prompt and --generate are both 0")
    live = not csv and not result.json
    with ExitStack() as opened:
        sides = [opened.enter_context(open_llm(model, loading))]
        if vs is not None:
            sides.append(opened.enter_context(_open_other(vs, model, loading)))
        table = _Table(with_ratio=vs is not None)
        if live:
            table.head(sides)
        found: list[Row] = []
        for case in wanted:
            found += rows(sides, measure_in_turns(sides, case, repeats))
            if live:
                table.rows(found[-len(sides) :])
    report = benchmark(found)
    if csv:
        _print_csv(report)
    result.show(report, [])


def _open_other(vs: str, model: str, loading: ModelFlags) -> LLM:
    """The other side: the same model on the backend ``vs``, else the model ``vs``."""
    from rl_mlx.backends.choice import NAMES, is_url

    if vs in NAMES or is_url(vs):
        return open_llm(model, replace(loading, backend=vs))
    return open_llm(vs, loading)


def _print_csv(report: Benchmark) -> None:
    records = report.records()
    writer = DictWriter(sys.stdout, list(records[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)


def _numbers(option: str, text: str, least: int) -> list[int]:
    """``"512,1024"`` as numbers, each once."""
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() and int(word) >= least for word in words):
        raise InvalidRequest(
            f"{option} takes whole numbers from {least} on, with commas between them, not {text!r}"
        )
    return list(dict.fromkeys(map(int, words)))


_COLUMNS = (
    ("model", 20), ("size", 10), ("params", 10), ("backend", 10), ("test", 20), ("tokens/s", 20),
    ("ratio", 8),
)  # fmt: skip
_RIGHT = {"size", "params", "tokens/s", "ratio"}


class _Table:
    """Markdown that grows a row at a time; the ratio's column only where there is one."""

    def __init__(self, *, with_ratio: bool) -> None:
        self._columns = _COLUMNS if with_ratio else _COLUMNS[:-1]

    def head(self, sides: Sequence[LLM]) -> None:
        from rl_mlx.backends import machine
        from rl_mlx.lab.energy import Meter

        cores = machine.physical_cores()
        parts = [machine.cpu_name(), f"{cores} core" + ("s" if cores != 1 else "")]
        parts += [gpu.name for gpu in machine.gpus()]
        parts += [f"{size(machine.memory_total())} of memory"]
        where = " and ".join(f"{llm.info.backend} on {llm.info.device}" for llm in sides)
        energy = "" if Meter().packages else "; no energy, which this machine does not tell"
        print(f"{', '.join(parts)}; rl-mlx {__version__}, {where}{energy}\n")
        self._line([name for name, _ in self._columns])
        self._line(
            [
                f"{'-' * (w - 1)}:" if name in _RIGHT else f":{'-' * (w - 1)}"
                for name, w in self._columns
            ]
        )

    def rows(self, found: Sequence[Row]) -> None:
        from rl_mlx.cli.show import count

        for row in found:
            speed = f"{row.tokens_per_second:.2f} ± {row.deviation:.2f}"
            ratio = "" if row.ratio is None else f"{row.ratio:.3f}"
            cells = [row.model, size(row.bytes), count(row.parameters), row.backend, row.test]
            self._line([*cells, speed, ratio][: len(self._columns)])

    def _line(self, cells: Sequence[str]) -> None:
        padded = [
            text.rjust(width) if name in _RIGHT else text.ljust(width)
            for text, (name, width) in zip(cells, self._columns, strict=True)
        ]
        print(f"| {' | '.join(padded)} |", flush=True)
