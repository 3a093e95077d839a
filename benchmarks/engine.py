"""The engine against mlx-lm on the same weights, and against arithmetic where that is the measure.

    python benchmarks/engine.py path/to/folder --pairs 5 --only ragged shared

Both sides take token ids and give token ids, in float32, greedily, with the end of sequence
ignored; they take turns in one process. Every round has prompts of its own, so that no prefix of an
earlier round helps.
"""

from __future__ import annotations

import functools
import itertools
import json
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any
from unittest import mock

import mlx.core as mx
from _paired import in_turns, load_mlx_lm, median, parser, ratios, run_parts
from decode import one_stream

from rl_mlx.backends.mlx import MLXBackend
from rl_mlx.cache.arena import GROWTH
from rl_mlx.engine import loop
from rl_mlx.settings import ModelSettings
from rl_mlx.store import ModelFiles
from rl_mlx.types import Event, Failed, Finished, Request, SamplingParams, Timings, Token

Job = tuple[list[int], int]  # a prompt, and how many tokens to make


@dataclass
class Round:
    """What came of a round of jobs, in their order. Times are seconds since it began."""

    seconds: float = 0.0
    ids: list[list[int]] = field(default_factory=list)
    stamps: list[list[float]] = field(default_factory=list)
    timings: list[Timings] = field(default_factory=list)

    @property
    def rate(self) -> float:
        """Tokens made a second, all streams together, prompts included in the time."""
        return sum(map(len, self.ids)) / self.seconds

    @property
    def first(self) -> float:
        """Median time to the first token."""
        return median([stamps[0] for stamps in self.stamps], 6)


class Ours:
    """The MLX backend."""

    def __init__(self, folder: str, **settings: Any) -> None:
        settings = {"backend": "mlx", "dtype": "float32", **settings}
        path = Path(folder)
        self.backend = MLXBackend.open(ModelFiles(path.name, path), ModelSettings(**settings))
        self._count = itertools.count()

    def run(self, jobs: list[Job], streams: int = 1 << 30) -> Round:
        """At most ``streams`` at once; when one ends the next begins."""
        found = Round(ids=[[] for _ in jobs], stamps=[[] for _ in jobs])
        done: dict[int, Timings] = {}
        waiting, ended = iter(enumerate(jobs)), threading.Event()
        began = time.perf_counter()

        def start() -> None:
            for index, (prompt, tokens) in itertools.islice(waiting, 1):
                params = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True)
                request = Request(id=f"r{next(self._count)}", prompt=tuple(prompt), params=params)
                self.backend.submit(request, functools.partial(emit, index))

        def emit(index: int, event: Event) -> None:
            if isinstance(event, Token):
                found.ids[index].append(event.id)
                found.stamps[index].append(time.perf_counter() - began)
            elif isinstance(event, Finished):
                done[index] = event.timings
                start()
                if len(done) == len(jobs):
                    ended.set()
            elif isinstance(event, Failed):
                ended.set()

        for _ in range(min(streams, len(jobs))):
            start()
        ended.wait()
        found.seconds = time.perf_counter() - began
        found.timings = [done[i] for i in range(len(jobs))]
        return found


class Theirs:
    """mlx-lm's ``BatchGenerator``."""

    def __init__(self, folder: str) -> None:
        self._model, _ = load_mlx_lm(folder)

    def run(self, jobs: list[Job], streams: int = 1 << 30) -> Round:
        """As ``Ours.run``."""
        from mlx_lm.generate import BatchGenerator

        found = Round(ids=[[] for _ in jobs], stamps=[[] for _ in jobs])
        generator = BatchGenerator(self._model, completion_batch_size=min(32, streams))
        waiting, left, index = iter(enumerate(jobs)), len(jobs), {}

        def start(count: int) -> None:
            for i, (prompt, tokens) in itertools.islice(waiting, count):
                (uid,) = generator.insert([prompt], [tokens])
                index[uid] = i

        began = time.perf_counter()
        start(min(streams, len(jobs)))
        while left:
            for answer in generator.next_generated():
                place = index[answer.uid]
                found.ids[place].append(answer.token)
                found.stamps[place].append(time.perf_counter() - began)
                if answer.finish_reason is not None:
                    left -= 1
                    start(1)
        found.seconds = time.perf_counter() - began
        generator.close()
        return found


class Bench:
    """The two sides, loaded once, and fresh token ids."""

    def __init__(self, folder: str, pairs: int) -> None:
        self.folder, self.pairs = folder, pairs
        self.config = json.loads((Path(folder) / "config.json").read_text())
        self._random = Random(0)
        self._starts = itertools.cycle(range(5, self.config["vocab_size"]))

    @functools.cached_property
    def ours(self) -> Ours:
        """Loaded when first needed."""
        return Ours(self.folder)

    @functools.cached_property
    def theirs(self) -> Theirs:
        """Loaded when first needed."""
        return Theirs(self.folder)

    def ids(self, count: int) -> list[int]:
        """Random tokens, the first of which few others begin with."""
        rest = self._random.choices(range(5, self.config["vocab_size"]), k=count - 1)
        return [next(self._starts), *rest]

    def compare(self, jobs: Callable[[], list[Job]], streams: int = 1 << 30) -> dict[str, Any]:
        """Rounds of the same jobs on both sides."""
        rounds: dict[int, list[Job]] = {}

        def side(run: Callable[..., Round], pair: int) -> Round:
            return run(rounds.setdefault(pair, jobs()), streams)

        sides = {
            "rl-mlx": functools.partial(side, self.ours.run),
            "mlx-lm": functools.partial(side, self.theirs.run),
        }
        found = in_turns(sides, self.pairs)
        ours, theirs = found["rl-mlx"], found["mlx-lm"]
        same = [a == b for x, y in zip(ours, theirs) for a, b in zip(x.ids, y.ids)]
        last = ours[-1].timings
        return {
            "tokens per second": {
                n: median([r.rate for r in each], 1) for n, each in found.items()
            },
            "ratio": ratios([r.rate for r in ours], [r.rate for r in theirs]),
            "first token, seconds": {n: median([r.first for r in e]) for n, e in found.items()},
            "same answers": f"{sum(same)} of {len(same)}",
            "prefilled tokens": sum(t.prompt_tokens - t.reused for t in last),
            "prompt tokens": sum(t.prompt_tokens for t in last),
        }


def ragged(bench: Bench) -> dict[str, Any]:
    """8 streams of ragged lengths; when one leaves another joins."""
    shape = Random(1)

    def jobs() -> list[Job]:
        return [(bench.ids(shape.randint(8, 160)), shape.randint(16, 128)) for _ in range(24)]

    return bench.compare(jobs, streams=8)


def shared(bench: Bench, streams: int) -> dict[str, Any]:
    """Requests that arrive at once and begin with the same 512 tokens."""
    prefix, suffix, tokens = 512, 16, 32

    def jobs() -> list[Job]:
        start = bench.ids(prefix)
        return [([*start, *bench.ids(suffix)], tokens) for _ in range(streams)]

    found = bench.compare(jobs)
    found["prefix plus suffixes"] = prefix + streams * suffix
    return found


def tenth_turn(bench: Bench) -> dict[str, Any]:
    """The time to the first token of a conversation's tenth turn, against the same without it."""
    said, answered = 48, 48

    def with_tree(_: int) -> float:
        talk: list[int] = []
        for _turn in range(10):
            talk += bench.ids(said)
            last = bench.ours.run([(talk, answered)])
            talk = [*talk, *last.ids[0]]
        return last.first

    def without(_: int) -> float:
        return bench.ours.run([(bench.ids(10 * said + 9 * answered), answered)]).first

    found = in_turns({"with": with_tree, "without": without}, bench.pairs)
    return {
        "prompt tokens": 10 * said + 9 * answered,
        "first token, seconds": {n: median(each, 4) for n, each in found.items()},
        "ratio": ratios(found["with"], found["without"]),
    }


def kv_bytes(bench: Bench) -> dict[str, Any]:
    """Bytes of the arena against the arithmetic, for one stream and for eight."""
    c = bench.config
    heads = c.get("num_key_value_heads", c["num_attention_heads"])
    dim = c.get("head_dim") or c["hidden_size"] // c["num_attention_heads"]
    per_token = 2 * c["num_hidden_layers"] * heads * dim * 4
    found: dict[str, Any] = {"bytes a token": per_token}
    for streams in (1, 8):
        length, tokens = 600, 560  # long answers: all streams run together before the first ends
        seen: list[int] = []
        stop = threading.Event()

        def watch(seen: list[int] = seen, stop: threading.Event = stop) -> None:
            while not stop.wait(0.001):
                seen.append(bench.ours.backend._engine._runner.arena.nbytes)

        watcher = threading.Thread(target=watch)
        watcher.start()
        bench.ours.run([(bench.ids(length - tokens), tokens) for _ in range(streams)])
        stop.set()
        watcher.join()
        least = per_token * length * streams
        found[f"{streams} x {length} tokens"] = {
            "arithmetic": least,
            "one growth step": per_token * GROWTH * streams,
            "held": max(seen),
            "within": least <= max(seen) <= least + per_token * GROWTH * streams,
        }
    return found


class Clock:
    """Seconds spent inside functions that are wrapped by it."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.calls = 0

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """``function``, timed."""

        def run(*args: Any) -> Any:
            began = time.perf_counter()
            try:
                return function(*args)
            finally:
                self.seconds += time.perf_counter() - began
                self.calls += 1

        return run


def scheduler_share(bench: Bench, streams: int = 32) -> dict[str, Any]:
    """The scheduler's part of a step, and that of all the engine thread's own work."""
    ours = Ours(bench.folder)
    engine, clock = ours.backend._engine, Clock()
    engine._scheduler.plan = clock.around(engine._scheduler.plan)
    shares, busy, steps = [], [], []
    for turn in range(bench.pairs + 1):
        jobs = [(bench.ids(16), 96) for _ in range(streams)]
        clock.seconds, clock.calls = 0.0, 0
        cpu = engine.call(lambda _: time.thread_time())
        answers = ours.run(jobs)
        cpu = engine.call(lambda _: time.thread_time()) - cpu
        if turn:
            shares.append(clock.seconds / answers.seconds)
            busy.append(cpu / answers.seconds)
            steps.append(answers.seconds / clock.calls)
    ours.backend.close()
    return {
        "scheduler, share of a step": median(shares, 5),
        "engine thread's CPU, share of a step": median(busy, 4),
        "milliseconds a step": median([1e3 * s for s in steps]),
    }


def batch_cost(bench: Bench) -> dict[str, Any]:
    """Milliseconds of a decode step by batch size; the part that is not the matrix product's."""
    sizes = (1, 2, 4, 8, 16, 32)

    def step(size: int, _: int) -> float:
        answers = bench.ours.run([(bench.ids(8), 64) for _ in range(size)])
        start = max(stamps[0] for stamps in answers.stamps)  # from here on all of them run
        times = sorted({s for stamps in answers.stamps for s in stamps if s > start})
        ends = min(stamps[-1] for stamps in answers.stamps)
        each = [t for t in times if t <= ends]
        count = sum(s > start and s <= ends for s in answers.stamps[0])
        return (each[-1] - start) / count

    found = in_turns({str(n): functools.partial(step, n) for n in sizes}, bench.pairs)
    return {
        f"batch of {n}": {
            "milliseconds a step": median([1e3 * s for s in found[str(n)]]),
            "milliseconds a token": median([1e3 * s / n for s in found[str(n)]]),
        }
        for n in sizes
    }


def random_model(folder: Path, *, hidden: int = 768, inner: int = 3072, layers: int = 3) -> int:
    """A qwen2 of random weights, large enough that products take most of a step; its size."""
    heads, kv_heads, vocab = 12, 4, 4096
    config = {
        "model_type": "qwen2", "hidden_size": hidden, "intermediate_size": inner,
        "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": kv_heads,
        "vocab_size": vocab, "max_position_embeddings": 8192, "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0, "tie_word_embeddings": True,
    }  # fmt: skip
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    kv = hidden // heads * kv_heads
    products = {
        "self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden), "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }  # fmt: skip
    weights = {"model.embed_tokens.weight": mx.random.normal((vocab, hidden), scale=0.05)}
    weights["model.norm.weight"] = mx.ones(hidden)
    for i in range(layers):
        layer = f"model.layers.{i}"
        for name, shape in products.items():
            weights[f"{layer}.{name}.weight"] = mx.random.normal(shape, scale=0.05)
        for name in ("q", "k", "v"):
            width = hidden if name == "q" else kv
            weights[f"{layer}.self_attn.{name}_proj.bias"] = mx.zeros(width)
        for name in ("input_layernorm", "post_attention_layernorm"):
            weights[f"{layer}.{name}.weight"] = mx.ones(hidden)
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    return sum(w.size for w in weights.values())


class Watch:
    """A request whose tokens are timed as they come."""

    def __init__(
        self, ours: Ours, prompt: list[int], tokens: int, clock: Callable[[], float]
    ) -> None:
        self.stamps: list[float] = []
        self.ended = threading.Event()
        self.began = clock()
        self._clock = clock
        self._backend = ours.backend
        self._id = f"watched-{self.began}"
        params = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True)
        ours.backend.submit(Request(id=self._id, prompt=tuple(prompt), params=params), self._emit)

    def _emit(self, event: Event) -> None:
        if isinstance(event, Token):
            self.stamps.append(self._clock())
        elif isinstance(event, Finished | Failed):
            self.ended.set()

    def cancel(self) -> None:
        """End it."""
        self._backend.cancel(self._id)
        self.ended.wait()

    def gaps(self, begin: float, end: float) -> list[float]:
        """Seconds between tokens, of those that came between two times; sorted."""
        pairs = itertools.pairwise(self.stamps)
        return sorted(b - a for a, b in pairs if begin < a and b < end)


def gap(
    bench: Bench, prefill: int = 4000, clock: Callable[[], float] = time.perf_counter
) -> dict[str, Any]:
    """The time between two tokens of a stream, before and while another's long prompt is read."""
    with tempfile.TemporaryDirectory() as folder:
        parameters = random_model(Path(folder))
        ours = Ours(folder, context=8192)
    ours.run([(bench.ids(600), 8)])  # kernels and costs are known from here on
    stream = Watch(ours, bench.ids(16), 8000, clock)
    while len(stream.stamps) < 100:
        time.sleep(0.01)
    other = Watch(ours, bench.ids(prefill), 1, clock)
    other.ended.wait()
    now = clock()
    stream.cancel()
    ours.backend.close()
    before, beside = stream.gaps(0, other.began), stream.gaps(other.began, now)
    quiet, worst = median(before, 6), beside[int(len(beside) * 0.99)]
    return {
        "parameters": parameters,
        "tokens of the other prompt": prefill,
        "tokens of the stream meanwhile": len(beside),
        "median gap before, ms": round(1e3 * quiet, 2),
        "median gap beside, ms": median([1e3 * g for g in beside], 2),
        "p99 gap beside, ms": round(1e3 * worst, 2),
        "longest gap beside, ms": round(1e3 * beside[-1], 2),
        "p99 / median before": round(worst / quiet, 2),
        "seconds to read the other prompt": round(now - other.began, 1),
    }


def gap_by_cpu_time(bench: Bench) -> dict[str, Any]:
    """The same by the process's CPU time, for the engine too: other programs do not count."""
    cpu = SimpleNamespace(perf_counter=time.process_time)
    with mock.patch.object(loop, "time", cpu):
        return gap(bench, clock=time.process_time)


def parts(bench: Bench) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """All that can be measured, by name."""
    yield "one_stream", lambda: one_stream(bench.folder, 256, bench.pairs)
    yield "ragged", lambda: ragged(bench)
    yield "shared_8", lambda: shared(bench, 8)
    yield "shared_32", lambda: shared(bench, 32)
    yield "tenth_turn", lambda: tenth_turn(bench)
    yield "kv_bytes", lambda: kv_bytes(bench)
    yield "scheduler_share", lambda: scheduler_share(bench)
    yield "batch_cost", lambda: batch_cost(bench)
    yield "gap", lambda: gap(bench)
    yield "gap_by_cpu_time", lambda: gap_by_cpu_time(bench)


def main() -> None:
    """Measure and print."""
    options = parser(__doc__)
    options.add_argument("folder", help="a safetensors folder that both can load")
    args = options.parse_args()
    run_parts(dict(parts(Bench(args.folder, args.pairs))), args)


if __name__ == "__main__":
    main()
