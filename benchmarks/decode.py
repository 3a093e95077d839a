"""One stream: tokens per second of rl-mlx against mlx-lm, on the same weights, type and device.

Runs are interleaved in one process and compared pair by pair; the median ratio is what counts. Both
sides decode greedily and ignore the end of sequence. mlx-lm's own loop (``stream_generate``)
detokenizes, and so does ours.

    python benchmarks/decode.py path/to/folder --tokens 256 --pairs 7
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from pathlib import Path
from typing import Any


def theirs(path: str) -> Any:
    """A function that gives mlx-lm's seconds for the tokens after the first, and its token ids."""
    import mlx.core as mx
    from mlx_lm import load, stream_generate
    from mlx_lm.sample_utils import make_sampler

    # mlx-lm 0.32 reads no rope_parameters, as transformers 5 writes them: it gets its own words.
    rope = json.loads((Path(path) / "config.json").read_text()).get("rope_parameters", {})
    model, tokenizer = load(path, model_config={k: rope[k] for k in ("rope_theta",) if k in rope})
    model.set_dtype(mx.float32)
    tokenizer._eos_token_ids = set()
    sampler = make_sampler(0.0)

    def run(prompt: list[int], tokens: int) -> tuple[float, list[int]]:
        ids, first = [], 0.0
        for answer in stream_generate(model, tokenizer, prompt, max_tokens=tokens, sampler=sampler):
            first = first or time.perf_counter()
            ids.append(answer.token)
        return time.perf_counter() - first, ids

    return run


def ours(path: str) -> Any:
    """The same of rl-mlx."""
    from rl_mlx import LLM

    llm = LLM(path, backend="mlx", dtype="float32")

    def run(prompt: list[int], tokens: int) -> tuple[float, list[int]]:
        ids, first = [], 0.0
        chunks = llm.generate(
            prompt, stream=True, temperature=0, max_tokens=tokens, ignore_eos=True
        )
        for chunk in chunks:
            if chunk.token_ids:
                first = first or time.perf_counter()
                ids.extend(chunk.token_ids)
        return time.perf_counter() - first, ids

    return run


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", help="a safetensors folder that both can load")
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    runs = {"rl-mlx": ours(options.folder), "mlx-lm": theirs(options.folder)}
    prompt = list(range(5, 21))
    ids = {name: run(prompt, 16)[1] for name, run in runs.items()}  # a warm-up
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for pair in range(options.pairs):
        for name in list(runs) if pair % 2 else list(runs)[::-1]:
            took, ids[name] = runs[name](prompt, options.tokens)
            seconds[name].append(took)
    rates = {n: [(options.tokens - 1) / s for s in values] for n, values in seconds.items()}
    ratios = [a / b for a, b in zip(rates["rl-mlx"], rates["mlx-lm"])]
    report = {
        "machine": f"{platform.machine()} {platform.system()}",
        "tokens": options.tokens,
        "same_tokens": ids["rl-mlx"] == ids["mlx-lm"],
        "tokens_per_second": {n: round(statistics.median(r), 1) for n, r in rates.items()},
        "ratio": {
            "median": round(statistics.median(ratios), 3),
            "all": [round(r, 3) for r in ratios],
        },
    }
    if options.json:
        print(json.dumps(report, indent=2))
        return
    for name, rate in report["tokens_per_second"].items():
        print(f"{name:8} {rate:8.1f} tokens/s")
    print(f"ratio    {report['ratio']['median']:8.3f} (median of {options.pairs} pairs)")
    print(f"same tokens: {report['same_tokens']}")


if __name__ == "__main__":
    main()
