"""How long it takes to open a GGUF file, against gguf-py: interleaved, medians of wall time.

    python benchmarks/open_gguf.py model.gguf [more.gguf ...] [--runs 3] [--json]

``open`` is the header alone; ``tokens`` also decodes the vocabulary's strings.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

from gguf import GGUFReader

from rl_mlx.convert.gguf.reader import GGUFFile

TOKENS = "tokenizer.ggml.tokens"


def open_ours(path: Path) -> None:
    """Parse the header."""
    GGUFFile.open(path).close()


def tokens_ours(path: Path) -> None:
    """Parse the header and decode the tokens."""
    with GGUFFile.open(path) as file:
        list(file.get(TOKENS, ()))


def open_peer(path: Path) -> None:
    """Parse the header with gguf-py."""
    GGUFReader(path)


def tokens_peer(path: Path) -> None:
    """Parse the header and decode the tokens with gguf-py."""
    field = GGUFReader(path).get_field(TOKENS)
    if field is not None:
        field.contents()


ARMS: dict[str, Callable[[Path], None]] = {
    "open": open_ours,
    "tokens": tokens_ours,
    "gguf-py open": open_peer,
    "gguf-py tokens": tokens_peer,
}


def seconds(arm: Callable[[Path], None], path: Path) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    arm(path)
    return time.perf_counter() - start


def measure(path: Path, runs: int) -> dict[str, float]:
    """Median seconds of each arm over ``runs`` rounds, after one warm-up of ours."""
    open_ours(path)
    times: dict[str, list[float]] = {name: [] for name in ARMS}
    for _ in range(runs):
        for name, arm in ARMS.items():
            times[name].append(seconds(arm, path))
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    """Measure each file and print a table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    results = {str(path): measure(path, options.runs) for path in options.files}
    if options.json:
        json.dump(results, sys.stdout, indent=2)
        print()
        return
    print(f"{'ms':>40}" + "".join(f"{name:>16}" for name in ARMS))
    for name, medians in results.items():
        row = "".join(f"{medians[arm] * 1000:16.1f}" for arm in ARMS)
        print(f"{Path(name).name:>40}{row}")


if __name__ == "__main__":
    main()
