"""Repacking GGML blocks for MLX against gguf-py's decoding: interleaved, medians of wall time.

    python benchmarks/repack.py [--types Q4_K Q6_K ...] [--mib 32] [--runs 5] [--json]

Speeds are of source bytes, by wall time; a core second is what other programs change less.
``decode`` is our own decoding to float32. The blocks are random.
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


def seconds(arm: Callable[[], object]) -> tuple[float, float]:
    """Wall time of one call, and that of all cores."""
    start, cores = time.perf_counter(), time.process_time()
    arm()
    return time.perf_counter() - start, time.process_time() - cores


def measure(ggml_type: GGMLType, size: int, runs: int) -> dict[str, float]:
    """GB/s of each arm, from median seconds over ``runs`` rounds."""
    raw = rows(ggml_type, size)
    peer_type = gguf.GGMLQuantizationType(int(ggml_type))
    arms: dict[str, Callable[[], object]] = {
        "repack": lambda: repack(raw, ggml_type),
        "decode": lambda: block(ggml_type).decode(raw),
        "gguf-py": lambda: gguf.dequantize(raw, peer_type),
    }
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in arms}
    repack(raw[:1], ggml_type)
    for _ in range(runs):
        for name, arm in arms.items():
            times[name].append(seconds(arm))
    size = raw.nbytes / 1e9
    speeds = {name: size / statistics.median(wall for wall, _ in ts) for name, ts in times.items()}
    pairs = list(zip(times["repack"], times["gguf-py"], strict=True))
    return speeds | {
        "times gguf-py": statistics.median(peer[0] / own[0] for own, peer in pairs),
        "by core seconds": statistics.median(peer[1] / own[1] for own, peer in pairs),
        "GB a core second": size / statistics.median(core for _, core in times["repack"]),
    }


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
    print(f"{'GB/s':10}" + "".join(f"{column:>18}" for column in columns))
    for name, speeds in results.items():
        print(f"{name:10}" + "".join(f"{speeds[column]:18.3f}" for column in columns))


if __name__ == "__main__":
    main()
