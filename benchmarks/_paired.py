"""What the benchmarks share: pairs in turns, the machine's name, mlx-lm's loading, the output."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")


def machine() -> dict[str, Any]:
    """The machine as a user would name it, and the versions that matter."""
    from rl_mlx.backends.machine import cpu_name

    return {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "mlx": version("mlx"),
        "mlx-lm": version("mlx-lm"),
    }


def in_turns(sides: Mapping[str, Callable[[int], T]], pairs: int) -> dict[str, list[T]]:
    """``side(pair)`` of every side for every pair, who goes first changing from pair to pair.

    Pair -1 is a warm-up and is not kept.
    """
    found: dict[str, list[T]] = {name: [] for name in sides}
    for pair in range(-1, pairs):
        for name in list(sides) if pair % 2 else list(sides)[::-1]:
            got = sides[name](pair)
            if pair >= 0:
                found[name].append(got)
    return found


def median(values: Sequence[float], digits: int = 3) -> float:
    """Rounded, for tables."""
    return round(statistics.median(values), digits)


def ratios(a: Sequence[float], b: Sequence[float]) -> dict[str, Any]:
    """The median of ``a / b`` pair by pair, and all of them."""
    each = [x / y for x, y in zip(a, b, strict=True)]
    return {"median": median(each), "all": [round(r, 3) for r in each]}


def load_mlx_lm(folder: str) -> tuple[Any, Any]:
    """mlx-lm's model, in float32, and its tokenizer, which knows no end of sequence."""
    import mlx.core as mx
    from mlx_lm import load

    # mlx-lm 0.32 reads no rope_parameters, as transformers 5 writes them: it gets its own words.
    rope = json.loads((Path(folder) / "config.json").read_text()).get("rope_parameters", {})
    words = {key: rope[key] for key in ("rope_theta",) if key in rope}
    model, tokenizer = load(folder, model_config=words)
    model.set_dtype(mx.float32)
    tokenizer._eos_token_ids = set()
    return model, tokenizer


def parser(doc: str) -> argparse.ArgumentParser:
    """With the options that all benchmarks have."""
    made = argparse.ArgumentParser(description=doc.splitlines()[0])
    made.add_argument("--pairs", type=int, default=7)
    made.add_argument("--only", nargs="*", default=None, metavar="PART", help="only these parts")
    made.add_argument("--json", action="store_true", help="print JSON instead of a table")
    return made


def run_parts(
    parts: Mapping[str, Callable[[], dict[str, Any]]], options: argparse.Namespace
) -> None:
    """Measure the parts that are wanted and print them."""
    wanted = options.only or list(parts)
    report: dict[str, Any] = {"machine": machine(), "pairs": options.pairs}
    for name in wanted:
        report[name] = parts[name]()
        if not options.json:
            print(f"{name}")
            for key, value in report[name].items():
                print(f"  {key:36} {value}", flush=True)
    if options.json:
        print(json.dumps(report, indent=2))
