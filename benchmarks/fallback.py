"""The llama.cpp backend against xllamacpp's own server class, and, where llama-cpp-python is
installed, over that library too, against its low-level calls. Same model, same parameters.

    python benchmarks/fallback.py --type F16 --threads 1
    python benchmarks/fallback.py --model model.gguf --only "1 stream" --pairs 5

Each side is a process of its own, so that neither's idle threads slow the other down; they take
turns. Without ``--model`` it is a random Llama of 58M parameters with 32,000 tokens.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import multiprocessing
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from _paired import in_turns, median, parser, ratios, run_parts

from rl_mlx.backends.base import Backend
from rl_mlx.backends.llamacpp import LlamaCppBackend
from rl_mlx.settings import ModelSettings
from rl_mlx.store import ModelFiles
from rl_mlx.text.answer import Answer
from rl_mlx.text.detokenizer import Detokenizer
from rl_mlx.text.router import Format, Router
from rl_mlx.text.tokenizer import Tokenizer
from rl_mlx.types import Event, Failed, Finished, Request, SamplingParams, Token

Prompt = list[int]
PARALLEL = 8
BATCH = 512
# What is compared with what, and which of the two is ours.
PAIRS = (("rl-mlx", "xllamacpp"), ("native", "rl-mlx"), ("native", "llama-cpp-python"))


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


class Server:
    """xllamacpp's server class, streaming to a callback, one thread a request."""

    def __init__(self, path: Path, threads: int, context: int) -> None:
        import xllamacpp

        params = xllamacpp.CommonParams()
        params.model.path = str(path)
        params.n_ctx = context * PARALLEL
        params.n_parallel = PARALLEL
        params.n_batch = params.n_ubatch = BATCH
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
        params.verbosity = 0
        self._server = xllamacpp.Server(params)
        self._pool = ThreadPoolExecutor(PARALLEL)

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
        stamps = stamps or [time.perf_counter() - begun]  # it streams no part of a character
        return Timed(stamps[0], stamps[-1], made)


class LowLevel:
    """llama-cpp-python's C calls in the plainest loop: the prompts, then a token of each a step."""

    def __init__(self, path: Path, threads: int, context: int) -> None:
        import llama_cpp as api

        self._api = api
        self._quiet = api.llama_log_callback(lambda *_: None)
        api.llama_log_set(self._quiet, None)
        model = api.llama_model_load_from_file(str(path).encode(), api.llama_model_default_params())
        params = api.llama_context_default_params()
        params.n_ctx, params.n_seq_max = context * PARALLEL, PARALLEL
        params.n_batch = params.n_ubatch = BATCH
        params.n_threads = params.n_threads_batch = threads
        self._context = api.llama_init_from_model(model, params)
        self._vocab = api.llama_vocab_n_tokens(api.llama_model_get_vocab(model))
        self._batch = api.llama_batch_init(BATCH, 0, 1)

    def run(self, prompts: list[Prompt], tokens: int) -> list[Timed]:
        """Answers of prompts that are sent together."""
        begun = time.perf_counter()
        data_too = True
        self._api.llama_memory_clear(self._api.llama_get_memory(self._context), data_too)
        parts = [(n, prompt, 0) for n, prompt in enumerate(prompts)]
        last: list[int] = []
        stamps: list[float] = []
        for step in range(tokens):
            last = self._step(parts)
            stamps.append(time.perf_counter() - begun)
            parts = [(n, [token], len(prompts[n]) + step) for n, token in enumerate(last)]
        return [Timed(stamps[0], stamps[-1], tokens) for _ in prompts]

    def _step(self, parts: list[tuple[int, Prompt, int]]) -> list[int]:
        api, batch, best = self._api, self._batch, []
        ends: list[int] = []
        count = 0
        for number, (sequence, ids, start) in enumerate(parts):
            for place, token in enumerate(ids):
                batch.token[count], batch.pos[count] = token, start + place
                batch.n_seq_id[count], batch.seq_id[count][0] = 1, sequence
                batch.logits[count] = place == len(ids) - 1
                count += 1
            ends.append(count - 1)
            is_last = number == len(parts) - 1
            if is_last or count + len(parts[number + 1][1]) > BATCH:
                batch.n_tokens = count
                if api.llama_decode(self._context, batch) != 0:
                    raise RuntimeError("llama_decode failed")
                for end in ends:
                    row = api.llama_get_logits_ith(self._context, end)
                    best.append(int(np.ctypeslib.as_array(row, (self._vocab,)).argmax()))
                count, ends = 0, []
        return best


class Side:
    """One side in a process of its own."""

    def __init__(self, kind: str, path: Path, threads: int, context: int) -> None:
        of_processes = multiprocessing.get_context("spawn")
        self._pipe, theirs = of_processes.Pipe()
        arguments = (kind, path, threads, context, theirs)
        self._process = of_processes.Process(target=_serve, args=arguments, daemon=True)
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
    runner: Ours | Server | LowLevel
    if kind == "xllamacpp":
        runner = Server(path, threads, context)
    elif kind == "llama-cpp-python":
        runner = LowLevel(path, threads, context)
    else:
        if kind == "rl-mlx":
            sys.modules["llama_cpp"] = None  # type: ignore[assignment]  # the wheel's library
        runner = Ours(LlamaCppBackend.open(ModelFiles(path.stem, path), settings))
    pipe.send(0)
    while True:
        work = pipe.recv()
        begun = time.process_time()
        answers = runner.run(*work)
        pipe.send((answers, time.process_time() - begun))


def compare(
    sides: dict[str, Side], prompts: Callable[[], list[Prompt]], tokens: int, pairs: int
) -> dict[str, Any]:
    """Medians of each side, and of the ratios (difference, for the first token) turn by turn.

    CPU time a token says most where other programs take part of the machine.
    """
    rounds = [prompts() for _ in range(pairs + 1)]  # the last is that of the warm-up

    def measure(side: Side, turn: int) -> tuple[float, float, float]:
        answers, cpu = side.run(rounds[turn], tokens)
        made = sum(a.tokens for a in answers)
        first = statistics.median(a.first for a in answers)
        return made / max(a.total for a in answers), first * 1e3, cpu / made * 1e6

    found = in_turns(
        {name: functools.partial(measure, side) for name, side in sides.items()}, pairs
    )
    report: dict[str, Any] = {}
    columns = ("tokens/s", "first ms", "cpu us/token")
    for name, runs in found.items():
        values = map(median, zip(*runs, strict=True))
        report[name] = dict(zip(columns, values, strict=True))
    for ours, theirs in PAIRS:
        if ours in found and theirs in found:
            mine, other = zip(*found[ours], strict=True), zip(*found[theirs], strict=True)
            (speed, first, cpu), (speed2, first2, cpu2) = mine, other
            report[f"{ours} / {theirs}"] = {
                "tokens/s": ratios(speed, speed2),
                "first ms later": median([a - b for a, b in zip(first, first2, strict=True)]),
                "cpu us/token": ratios(cpu, cpu2)["median"],
            }
    return report


def text_share(tokenizer: Tokenizer, seconds_per_token: float) -> dict[str, Any]:
    """Detokenizing, matching stops and routing, as shares of the time a token takes."""
    ids = [290 + i % 200 for i in range(500)]
    text = best = float("inf")
    for _ in range(5):
        answer = Answer(Detokenizer(tokenizer), ("\n\nUser:",), 1)
        router = Router(Format.of("<tool_call>"), tools=[{"function": {"name": "f"}}])
        begun = time.perf_counter()
        chunks = [answer.feed([Token(token)]) for token in ids]
        middle = time.perf_counter()
        for chunk in chunks:
            router.feed(chunk.text if chunk else "")
        best = min(best, (time.perf_counter() - middle) / len(ids))
        text = min(text, (middle - begun) / len(ids))
    return {"detokenizing": f"{text / seconds_per_token:.3%}",
            "routing": f"{best / seconds_per_token:.3%}"}  # fmt: skip


def random_llama(path: Path, kind: str) -> None:
    """Hidden 512, 8 layers, 8 heads, 32,000 tokens; every matrix is of ``kind``."""
    import gguf
    from gguf import GGMLQuantizationType

    rng = np.random.default_rng(0)
    hidden, inner, layers, vocab = 512, 1376 if kind == "F16" else 1536, 8, 32000
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(4096)
    writer.add_embedding_length(hidden)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(8)
    writer.add_head_count_kv(8)
    writer.add_rope_dimension_count(64)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("llama")
    special = ["<unk>", "<s>", "</s>"] + [f"<0x{b:02X}>" for b in range(256)]
    tokens = special + [f"\u2581w{n}" for n in range(vocab - len(special))]
    writer.add_token_list(tokens)
    writer.add_token_scores([-float(n) for n in range(vocab)])
    writer.add_token_types([2, 3, 3] + [6] * 256 + [1] * (vocab - len(special)))
    shapes = {"token_embd.weight": (vocab, hidden), "output.weight": (vocab, hidden)}
    for i in range(layers):
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            shapes[f"blk.{i}.{name}.weight"] = (hidden, hidden)
        shapes[f"blk.{i}.ffn_gate.weight"] = shapes[f"blk.{i}.ffn_up.weight"] = (inner, hidden)
        shapes[f"blk.{i}.ffn_down.weight"] = (hidden, inner)
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{i}.{name}.weight", np.ones(hidden, np.float32))
    writer.add_tensor("output_norm.weight", np.ones(hidden, np.float32))
    qtype = GGMLQuantizationType[kind]
    for name, shape in shapes.items():
        weight = rng.normal(0, 0.05, shape).astype(np.float32)
        writer.add_tensor(name, gguf.quants.quantize(weight, qtype), raw_dtype=qtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def measure(path: Path, options: argparse.Namespace) -> None:
    """Load all sides and measure the parts."""
    tokenizer = Tokenizer.from_gguf(path)
    kinds = ["rl-mlx", "xllamacpp"]
    if importlib.util.find_spec("llama_cpp") is not None:
        kinds += ["native", "llama-cpp-python"]
    sides = {kind: Side(kind, path, options.threads, options.context) for kind in kinds}
    random = Random(0)

    def prompts(count: int, length: int) -> list[Prompt]:
        # Never the same twice, or a prefix cache would answer for it.
        ids = range(290, tokenizer.vocab_size)
        return [[1, *random.choices(ids, k=length - 1)] for _ in range(count)]

    def part(count: int, length: int, tokens: int) -> Callable[[], dict[str, Any]]:
        asked = functools.partial(prompts, count, length)
        return lambda: compare(sides, asked, tokens, options.pairs)

    def text() -> dict[str, Any]:
        (answer,), _ = sides["rl-mlx"].run(prompts(1, 64), options.tokens)
        return text_share(tokenizer, (answer.total - answer.first) / (answer.tokens - 1))

    run_parts(
        {
            "1 stream": part(1, 64, options.tokens),
            "8 streams": part(PARALLEL, 64, options.tokens),
            "a prompt of 448 tokens": part(1, 448, 1),
            "text, share of a token": text,
        },
        options,
    )
    for side in sides.values():
        side.close()


def main() -> None:
    """Measure and print."""
    made = parser(__doc__)
    made.add_argument("--model", type=Path)
    made.add_argument("--type", default="F16", help="of the random model: F16, Q8_0, Q4_0...")
    made.add_argument("--tokens", type=int, default=64)
    made.add_argument("--threads", type=int, default=1)
    made.add_argument("--context", type=int, default=512)
    options = made.parse_args()
    if options.model is not None:
        measure(options.model, options)
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"random-{options.type}.gguf"
        random_llama(path, options.type)
        measure(path, options)


if __name__ == "__main__":
    main()
