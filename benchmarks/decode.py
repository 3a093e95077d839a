"""One stream: tokens per second of rl-mlx against mlx-lm, on the same weights, type and device.

Runs are interleaved in one process and compared pair by pair; the median ratio is what counts. Both
sides decode greedily and ignore the end of sequence. mlx-lm's own loop (``stream_generate``)
detokenizes, and so does ours.

    python benchmarks/decode.py path/to/folder --tokens 256 --pairs 7
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from _paired import in_turns, load_mlx_lm, median, parser, ratios, run_parts

Run = Callable[[list[int], int], tuple[float, list[int]]]
PROMPT = list(range(5, 21))


def theirs(path: str) -> Run:
    """A function that gives mlx-lm's seconds for the tokens after the first, and its token ids."""
    from mlx_lm import stream_generate
    from mlx_lm.sample_utils import make_sampler

    model, tokenizer = load_mlx_lm(path)
    sampler = make_sampler(0.0)

    def run(prompt: list[int], tokens: int) -> tuple[float, list[int]]:
        ids, first = [], 0.0
        for answer in stream_generate(model, tokenizer, prompt, max_tokens=tokens, sampler=sampler):
            first = first or time.perf_counter()
            ids.append(answer.token)
        return time.perf_counter() - first, ids

    return run


def ours(path: str) -> Run:
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


def one_stream(path: str, tokens: int, pairs: int) -> dict[str, Any]:
    """Both sides in turns."""
    runs = {"rl-mlx": ours(path), "mlx-lm": theirs(path)}
    sides = {name: lambda _, run=run: run(PROMPT, tokens) for name, run in runs.items()}
    found = in_turns(sides, pairs)
    rates = {name: [(tokens - 1) / s for s, _ in each] for name, each in found.items()}
    return {
        "tokens": tokens,
        "same tokens": found["rl-mlx"][-1][1] == found["mlx-lm"][-1][1],
        "tokens per second": {name: median(each, 1) for name, each in rates.items()},
        "ratio": ratios(rates["rl-mlx"], rates["mlx-lm"]),
    }


def main() -> None:
    """Measure and print."""
    options = parser(__doc__)
    options.add_argument("folder", help="a safetensors folder that both can load")
    options.add_argument("--tokens", type=int, default=256)
    args = options.parse_args()
    run_parts({"one stream": lambda: one_stream(args.folder, args.tokens, args.pairs)}, args)


if __name__ == "__main__":
    main()
