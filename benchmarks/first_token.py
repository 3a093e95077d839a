"""What a user waits for at the prompt: whole processes, from their start to their first output.

python benchmarks/first_token.py --pairs 7
"""

from __future__ import annotations

import functools
import subprocess
import sys
import time
from typing import Any

from _paired import in_turns, median, parser, ratios, run_parts

PROGRAM = [sys.executable, "-m", "rl_mlx.cli.main"]


def until_output(command: list[str], _: int) -> float:
    """Seconds until the first byte on stdout."""
    began = time.perf_counter()
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, bufsize=0
    ) as process:
        assert process.stdout is not None
        first = process.stdout.read(1)
        took = time.perf_counter() - began
        process.stdout.read()
    if process.returncode or not first:
        raise SystemExit(f"it failed: {' '.join(command)}")
    return took


def until_end(command: list[str], _: int) -> float:
    """Seconds until the process has ended."""
    began = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


def generate(pairs: int) -> dict[str, Any]:
    """``rl-mlx generate demo`` to its first token, on each backend."""
    sides = {
        backend: functools.partial(
            until_output,
            [*PROGRAM, "generate", "demo", "-p", "Once upon", "-n", "4", "--backend", backend],
        )
        for backend in ("auto", "mlx")
    }
    found = in_turns(sides, pairs)
    return {
        f"seconds, backend {name}": {"median": median(each), "best": round(min(each), 3)}
        for name, each in found.items()
    }


def help_(pairs: int) -> dict[str, Any]:
    """``rl-mlx --help`` against an interpreter that imports typer."""
    sides = {
        "rl-mlx --help": functools.partial(until_end, [*PROGRAM, "--help"]),
        "import typer": functools.partial(until_end, [sys.executable, "-c", "import typer"]),
    }
    found = in_turns(sides, pairs)
    return {
        "seconds": {name: median(each) for name, each in found.items()},
        "ratio": ratios(*found.values()),
    }


def main() -> None:
    """Measure and print."""
    args = parser(__doc__).parse_args()
    run_parts({"generate": lambda: generate(args.pairs), "help": lambda: help_(args.pairs)}, args)


if __name__ == "__main__":
    main()
