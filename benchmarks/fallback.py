"""The llama.cpp backend against xllamacpp's own server class, same model and parameters, paired in
one run.

    python benchmarks/fallback.py model.gguf --tokens 200 --rounds 7

Rounds alternate between the two sides, both loaded; figures are medians. A third part measures what
text costs.
"""

from __future__ import annotations

import argparse
import functools
import json
import multiprocessing
import statistics
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from random import Random
from typing import Any

from rl_mlx.backends.base import Backend
from rl_mlx.backends.llamacpp import LlamaCppBackend
from rl_mlx.settings import ModelSettings
from rl_mlx.store import ModelFiles
from rl_mlx.text.answer import Answer
from rl_mlx.text.detokenizer import Detokenizer
from rl_mlx.text.tokenizer import Tokenizer
from rl_mlx.types import Event, Failed, Finished, Request, SamplingParams, Token

Prompt = list[int]
PARALLEL = 8
BATCH = 512


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


class Side:
    """One side in a process of its own, so that neither's idle threads slow the other down."""

    def __init__(self, kind: str, path: Path, threads: int, context: int) -> None:
        context_of_processes = multiprocessing.get_context("spawn")
        self._pipe, theirs = context_of_processes.Pipe()
        arguments = (kind, path, threads, context, theirs)
        self._process = context_of_processes.Process(target=_serve, args=arguments, daemon=True)
        self._process.start()
        self._pipe.recv()  # it is loaded

    def run(self, prompts: list[Prompt], tokens: int) -> tuple[list[Timed], float]:
        """Answers of prompts that are sent together, and the seconds of CPU they took."""
        self._pipe.send((prompts, tokens))
        answers: tuple[list[Timed], float] = self._pipe.recv()
        return answers

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.join()


def _serve(kind: str, path: Path, threads: int, context: int, pipe: Connection) -> None:
    settings = ModelSettings(
        context=context, backend_options={"threads": threads, "unified": False, "batch": BATCH}
    )
    runner: Ours | Theirs
    if kind == "rl-mlx":
        runner = Ours(LlamaCppBackend.open(ModelFiles(path.stem, path), settings))
    else:
        runner = Theirs(path, threads, context, PARALLEL, BATCH)
    pipe.send(0)
    while True:
        work = pipe.recv()
        begun = time.process_time()
        answers = runner.run(*work)
        pipe.send((answers, time.process_time() - begun))


def speeds(
    sides: dict[str, Side], prompts: Callable[[], list[Prompt]], tokens: int, rounds: int
) -> dict[str, dict[str, float]]:
    """Medians by side; ``ratio`` holds the medians of each round's ratios (difference, for times).

    CPU time a token says most where other programs take part of the machine.
    """
    found: dict[str, list[tuple[float, float, float]]] = {name: [] for name in sides}
    for turn in range(rounds + 1):
        order = list(sides.items())
        same = prompts()
        for name, side in order if turn % 2 else reversed(order):
            answers, cpu = side.run(same, tokens)
            made = sum(a.tokens for a in answers)
            first = statistics.median(a.first for a in answers)
            if turn:  # the first round warms up
                rate = made / max(a.total for a in answers)
                found[name].append((rate, first * 1e3, cpu / made * 1e6))
    columns = ("tokens/s", "first ms", "cpu us/token")
    table = {
        name: dict(zip(columns, map(statistics.median, zip(*runs, strict=True)), strict=True))
        for name, runs in found.items()
    }
    pairs = list(zip(*found.values(), strict=True))
    table["ratio"] = {
        "tokens/s": statistics.median(a[0] / b[0] for a, b in pairs),
        "first ms": statistics.median(a[1] - b[1] for a, b in pairs),
        "cpu us/token": statistics.median(a[2] / b[2] for a, b in pairs),
    }
    return table


def text_share(tokenizer: Tokenizer, ids: list[int], seconds_per_token: float) -> float:
    """Detokenizing and matching stops, as a share of the time a token takes."""
    best = float("inf")
    for _ in range(5):
        answer = Answer(Detokenizer(tokenizer), ("\n\nUser:",), 1)
        begun = time.perf_counter()
        for token in ids:
            answer.feed([Token(token)])
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
    tokenizer = Tokenizer.from_gguf(args.model)
    sides = {
        kind: Side(kind, args.model, args.threads, args.context) for kind in ("rl-mlx", "xllamacpp")
    }
    random = Random(0)

    def prompts(count: int) -> list[Prompt]:
        # Never the same twice, or a prefix cache would answer for it.
        ids = range(290, tokenizer.vocab_size)
        return [[1, *random.choices(ids, k=64)] for _ in range(count)]

    results: dict[str, Any] = {}
    for count in (1, PARALLEL):
        name = f"{count} streams" if count > 1 else "1 stream"
        results[name] = speeds(sides, functools.partial(prompts, count), args.tokens, args.rounds)
    per_token = 1 / results["1 stream"]["rl-mlx"]["tokens/s"]
    ids = [290 + i % 200 for i in range(500)]
    results["text share of a token"] = text_share(tokenizer, ids, per_token)
    for side in sides.values():
        side.close()
    if args.json:
        print(json.dumps(results, indent=2))
        return
    for name, table in results.items():
        if isinstance(table, float):
            print(f"{name}: {table:.2%}")
            continue
        for side, row in table.items():
            values = [f"{value:10.3f} {column}" for column, value in row.items()]
            print(f"{name:10} {side:10} {'  '.join(values)}")


if __name__ == "__main__":
    main()
