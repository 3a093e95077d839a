"""The llama.cpp backend against xllamacpp's own server class, same model and parameters, paired in
one run.

    python benchmarks/fallback.py model.gguf --tokens 200 --rounds 7

Rounds alternate between the two sides, both loaded; figures are medians. A third part measures what
text costs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from rl_mlx.backends.base import Backend
from rl_mlx.backends.llamacpp import LlamaCppBackend
from rl_mlx.backends.llamacpp.library import LogCallback, open_library
from rl_mlx.settings import ModelSettings
from rl_mlx.store import ModelFiles
from rl_mlx.text.answer import Answer
from rl_mlx.text.detokenizer import Detokenizer
from rl_mlx.text.tokenizer import Tokenizer
from rl_mlx.types import Event, Failed, Finished, Request, SamplingParams, Token

Prompt = list[int]


@dataclass(frozen=True)
class Timed:
    """One answer: seconds to its first token, seconds in all, tokens."""

    first: float
    total: float
    tokens: int


class Ours:
    """The backend, called as ``LLM`` calls it."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._count = 0

    def run(self, prompts: list[Prompt], tokens: int) -> list[Timed]:
        """Answers of prompts that are sent together."""
        done = threading.Semaphore(0)
        begun = time.perf_counter()
        stamps: list[list[float]] = [[] for _ in prompts]
        for prompt, mine in zip(prompts, stamps, strict=True):
            self._count += 1
            params = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True)
            request = Request(id=f"r{self._count}", prompt=tuple(prompt), params=params)

            def emit(event: Event, mine: list[float] = mine) -> None:
                if isinstance(event, Token):
                    mine.append(time.perf_counter() - begun)
                elif isinstance(event, Failed):
                    raise event.error
                elif isinstance(event, Finished):
                    done.release()

            self._backend.submit(request, emit)
        for _ in prompts:
            done.acquire()
        return [Timed(mine[0], mine[-1], len(mine)) for mine in stamps]


class Theirs:
    """xllamacpp's server class, streaming to a callback, one thread a request."""

    def __init__(self, path: Path, threads: int, context: int, parallel: int, batch: int) -> None:
        import xllamacpp

        params = xllamacpp.CommonParams()
        params.model.path = str(path)
        params.n_ctx = context * parallel
        params.n_parallel = parallel
        params.n_batch = params.n_ubatch = batch
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
        params.verbosity = 0
        self._server = xllamacpp.Server(params)
        self._pool = ThreadPoolExecutor(parallel)

    def run(self, prompts: list[Prompt], tokens: int) -> list[Timed]:
        """Answers of prompts that are sent together."""
        begun = time.perf_counter()
        return list(self._pool.map(lambda p: self._one(p, tokens, begun), prompts))

    def _one(self, prompt: Prompt, tokens: int, begun: float) -> Timed:
        stamps: list[float] = []
        made = 0

        def callback(chunk: dict[str, Any]) -> None:
            nonlocal made
            if "error" in chunk:
                raise RuntimeError(chunk["error"])
            if chunk["choices"][0]["logprobs"]:
                stamps.append(time.perf_counter() - begun)
            if "usage" in chunk:
                made = chunk["usage"]["completion_tokens"]

        request = {
            "prompt": prompt, "max_tokens": tokens, "stream": True, "temperature": 0,
            "ignore_eos": True, "n_probs": 1, "samplers": ["top_k"], "top_k": 1,
            "post_sampling_probs": True,
        }  # fmt: skip
        self._server.handle_completions(request, callback)
        return Timed(stamps[0], stamps[-1], made)


def speeds(sides: dict[str, Callable[[], list[Timed]]], rounds: int) -> dict[str, dict[str, float]]:
    """Median tokens per second in all and median milliseconds to the first token, by side."""
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    for turn in range(rounds + 1):
        order = list(sides.items())
        for name, run in order if turn % 2 else reversed(order):
            answers = run()
            rate = sum(a.tokens for a in answers) / max(a.total for a in answers)
            first = statistics.median(a.first for a in answers)
            if turn:  # the first round warms up
                found[name].append((rate, first * 1000))
    pairs = list(zip(*found.values(), strict=True))
    table = {
        name: {
            "tokens/s": statistics.median(r for r, _ in runs),
            "first ms": statistics.median(f for _, f in runs),
        }
        for name, runs in found.items()
    }
    table["ratio"] = {
        "tokens/s": statistics.median(a[0] / b[0] for a, b in pairs),
        "first ms": statistics.median(a[1] - b[1] for a, b in pairs),
    }
    return table


def text_share(tokenizer: Tokenizer, ids: list[int], seconds_per_token: float) -> float:
    """Detokenizing and matching stops, as a share of the time a token takes."""
    best = float("inf")
    for _ in range(5):
        answer = Answer(Detokenizer(tokenizer), ("\n\nUser:",), 1)
        begun = time.perf_counter()
        for token in ids:
            answer.feed(Token(token))
        best = min(best, (time.perf_counter() - begun) / len(ids))
    return best / seconds_per_token


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    args = parser.parse_args()
    options = {"threads": args.threads, "unified": False}
    settings = ModelSettings(context=args.context, backend_options=options)
    backend = LlamaCppBackend.open(ModelFiles(args.model.stem, args.model), settings)
    ours = Ours(backend)
    theirs = Theirs(args.model, args.threads, args.context, parallel=8, batch=512)
    vocab = backend.info.vocab
    random = Random(0)

    def prompts(count: int) -> list[Prompt]:
        # Never the same twice, or one side's prefix cache would answer for it.
        return [[1, *random.choices(range(290, vocab), k=64)] for _ in range(count)]

    results: dict[str, Any] = {}
    for count in (1, 8):
        results[f"{count} streams" if count > 1 else "1 stream"] = speeds(
            {
                "rl-mlx": lambda n=count: ours.run(prompts(n), args.tokens),  # type: ignore[misc]
                "xllamacpp": lambda n=count: theirs.run(prompts(n), args.tokens),  # type: ignore[misc]
            },
            args.rounds,
        )
    per_token = 1 / results["1 stream"]["rl-mlx"]["tokens/s"]
    share = text_share(
        Tokenizer.from_gguf(args.model), [290 + i % 200 for i in range(500)], per_token
    )
    results["text share of a token"] = share
    backend.close()
    # The server's destructor holds the GIL while its threads log: a Python callback would hang
    # them.
    open_library().api.llama_log_set(LogCallback(), None)
    if args.json:
        print(json.dumps(results, indent=2))
        return
    for name, table in results.items():
        if isinstance(table, float):
            print(f"{name}: {table:.2%}")
            continue
        for side, row in table.items():
            first = f"{row['first ms']:+8.2f}" if side == "ratio" else f"{row['first ms']:8.2f}"
            print(f"{name:10} {side:10} {row['tokens/s']:10.3f} tokens/s  {first} ms to the first")


if __name__ == "__main__":
    main()
