"""``rl-mlx bench``: how fast a model is on this machine."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rl_mlx import __version__
from rl_mlx.cli.load import open_llm
from rl_mlx.cli.options import Json, Model, ModelFlags, takes_flags
from rl_mlx.cli.terminal import print_json, size
from rl_mlx.errors import InvalidRequest

if TYPE_CHECKING:
    from rl_mlx.lab.bench import Speed
    from rl_mlx.types import ModelInfo

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
    json: Json = False,
) -> None:
    """Measure how fast prompts are read and answers are written, as a Markdown table."""
    from rl_mlx.lab.bench import cases, measure

    wanted = cases(
        _numbers("--prompt", prompt, 0),
        _numbers("--generate", generate, 0),
        _numbers("--depth", depth, 0),
        _numbers("--concurrency", concurrency, 1),
    )
    if not wanted:
        raise InvalidRequest("nothing is to be measured: --prompt and --generate are both 0")
    with open_llm(model, loading) as llm:
        if json:
            speeds = [measure(llm, case, repeats) for case in wanted]
            print_json(_document(llm.info, speeds))
            return
        _print_head(llm.info)
        for case in wanted:
            _print_row(llm.info, measure(llm, case, repeats))


def _numbers(option: str, text: str, least: int) -> list[int]:
    """``"512,1024"`` as numbers, each once."""
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() and int(word) >= least for word in words):
        raise InvalidRequest(
            f"{option} takes whole numbers from {least} on, with commas between them, not {text!r}"
        )
    return list(dict.fromkeys(map(int, words)))


def _machine() -> dict[str, Any]:
    from rl_mlx.backends import machine

    return {
        "cpu": machine.cpu_name(),
        "cores": machine.physical_cores(),
        "gpus": [gpu.name for gpu in machine.gpus()],
        "memory": machine.memory_total(),
    }


def _document(info: ModelInfo, speeds: list[Speed]) -> dict[str, Any]:
    return {
        "rl_mlx": __version__,
        "machine": _machine(),
        "model": {
            name: getattr(info, name)
            for name in (
                "name", "architecture", "parameters", "weight_bytes", "bits_per_weight",
                "backend", "device", "dtype",
            )
        },
        "results": [
            {
                "test": speed.case.name,
                **asdict(speed.case),
                "tokens_per_second": speed.mean,
                "deviation": speed.deviation,
                "repeats": list(speed.rates),
            }
            for speed in speeds
        ],
    }  # fmt: skip


_WIDTHS = (20, 10, 10, 10, 20, 20)


def _print_head(info: ModelInfo) -> None:
    found = _machine()
    cores = f"{found['cores']} core" + ("s" if found["cores"] != 1 else "")
    parts = [found["cpu"], cores, *found["gpus"], f"{size(found['memory'])} of memory"]
    print(f"{', '.join(parts)}; rl-mlx {__version__}, {info.backend} on {info.device}\n")
    _print_cells("model", "size", "params", "backend", "test", "tokens/s")
    left, right = [f":{'-' * (w - 1)}" for w in _WIDTHS], [f"{'-' * (w - 1)}:" for w in _WIDTHS]
    _print_cells(left[0], right[1], right[2], *left[3:5], right[5])


def _print_row(info: ModelInfo, speed: Speed) -> None:
    from rl_mlx.cli.show import count

    _print_cells(
        info.name,
        size(info.weight_bytes),
        count(info.parameters),
        info.backend,
        speed.case.name,
        f"{speed.mean:.2f} ± {speed.deviation:.2f}",
    )


def _print_cells(*cells: str) -> None:
    right = (1, 2, 5)
    padded = [
        text.rjust(width) if i in right else text.ljust(width)
        for i, (text, width) in enumerate(zip(cells, _WIDTHS))
    ]
    print(f"| {' | '.join(padded)} |", flush=True)
