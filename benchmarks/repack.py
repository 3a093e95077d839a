"""Repacking GGML blocks for MLX against gguf-py's decoding: interleaved, medians of wall time.

    python benchmarks/repack.py [--types Q4_K Q6_K ...] [--mib 32] [--runs 5] [--json]

Speeds are of source bytes. ``decode`` is our own decoding to float32. The blocks are random.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import gguf
import numpy as np
import numpy.typing as npt

from rl_mlx.convert.gguf.blocks import block
from rl_mlx.convert.gguf.repack import repack
from rl_mlx.convert.gguf.types import GGMLType

COLUMNS = 4096


def rows(ggml_type: GGMLType, size: int) -> npt.NDArray[np.uint8]:
    """About ``size`` bytes of blocks in rows of COLUMNS weights; small bytes make finite scales."""
    row_bytes = COLUMNS // ggml_type.block_size * ggml_type.block_bytes
    rng = np.random.default_rng(0)
    return rng.integers(0, 60, (max(1, size // row_bytes), row_bytes), np.uint8)


def seconds(arm: Callable[[], object]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    arm()
    return time.perf_counter() - start


def measure(ggml_type: GGMLType, size: int, runs: int) -> dict[str, float]:
    """GB/s of each arm, from median seconds over ``runs`` rounds."""
    raw = rows(ggml_type, size)
    peer_type = gguf.GGMLQuantizationType(int(ggml_type))
    arms: dict[str, Callable[[], object]] = {
        "repack": lambda: repack(raw, ggml_type),
        "decode": lambda: block(ggml_type).decode(raw),
        "gguf-py": lambda: gguf.dequantize(raw, peer_type),
    }
    times: dict[str, list[float]] = {name: [] for name in arms}
    repack(raw[:1], ggml_type)
    for _ in range(runs):
        for name, arm in arms.items():
            times[name].append(seconds(arm))
    speeds = {name: raw.nbytes / 1e9 / statistics.median(ts) for name, ts in times.items()}
    return speeds | {"times gguf-py": speeds["repack"] / speeds["gguf-py"]}


def main() -> None:
    """Measure each type and print a table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--types", nargs="+", default=["Q4_0", "Q8_0", "Q4_K", "Q5_K", "Q6_K"])
    parser.add_argument("--mib", type=int, default=32)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    results = {
        name: measure(GGMLType[name], options.mib << 20, options.runs) for name in options.types
    }
    if options.json:
        print(json.dumps(results))
        return
    columns = list(next(iter(results.values())))
    print(f"{'GB/s':10}" + "".join(f"{column:>15}" for column in columns))
    for name, speeds in results.items():
        print(f"{name:10}" + "".join(f"{speeds[column]:15.3f}" for column in columns))


if __name__ == "__main__":
    main()
