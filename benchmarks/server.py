"""The server against the Python API, and against the servers of llama.cpp and mlx-lm.

    python benchmarks/server.py model.gguf --backend llama.cpp --pairs 7

Parts: ``overhead`` (the same requests by the Python API and over HTTP, at 1 and at 16 streams),
``clients`` (64 chat clients, us and the peer of that backend), ``gap`` (the time between two tokens
of one stream while another reads a long prompt). Sides take turns, all loaded; figures are medians.
mlx-lm's server (``--peer mlx-lm``) needs a folder. The model ``bigger`` is a random one that is
made here, in float32 or as ``--quant`` says. On a machine that is shared, run it at real-time
priority (``chrt -r 1``): with two cores and three processes, other work changes who waits for whom.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import multiprocessing
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

sys.path.insert(0, str(Path(__file__).parent))

from _bigger import write_folder, write_gguf
from _paired import in_turns, median, parser, ratios, run_parts

from rl_mlx import AsyncLLM
from rl_mlx.convert import convert

PROMPT = "Tell me a story about a fox who learns to read."
LONG = "The quick brown fox jumps over the lazy dog. "


@dataclass
class Run:
    """Streams that ran together: when each token came, from the start, a list a stream."""

    seconds: float
    tokens: int
    first: list[float]
    times: list[list[float]]

    @property
    def speed(self) -> float:
        """Tokens a second of all streams together."""
        return self.tokens / self.seconds


async def over_http(url: str, bodies: list[dict[str, Any]]) -> Run:
    """Send requests together and read their streams; a client of a few lines takes little CPU."""
    begun = time.perf_counter()
    times = await asyncio.gather(*(_ask(url, body, begun) for body in bodies))
    seconds = time.perf_counter() - begun
    return Run(seconds, sum(t[0] for t in times), [t[1][0] for t in times], [t[1] for t in times])


async def _ask(url: str, body: dict[str, Any], begun: float) -> tuple[int, list[float]]:
    place = urlsplit(url)
    reader, writer = await asyncio.open_connection(place.hostname, place.port)
    content = json.dumps(body).encode()
    writer.write(
        f"POST {place.path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(content)}\r\nConnection: close\r\n\r\n".encode()
        + content
    )
    times, tokens = [], 0
    status = await reader.readline()
    if b" 200 " not in status:
        raise SystemExit((status + await reader.read()).decode())
    async for line in reader:
        if not line.startswith(b"data: {"):
            continue
        line = line.replace(b'": ', b'":')  # as some write their JSON
        if b'"content":"' in line and b'"content":""' not in line:
            times.append(time.perf_counter() - begun)
        elif b'"completion_tokens"' in line:
            tokens = json.loads(line[6:])["usage"]["completion_tokens"]
        elif b'"error"' in line:
            raise SystemExit(line.decode())
    writer.close()
    return tokens or len(times), times


def chat_body(model: str, tokens: int, prompt: str = PROMPT) -> dict[str, Any]:
    """A chat whose answer has as many tokens as wanted."""
    return {
        "model": model,
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


async def by_api(llm: AsyncLLM, streams: int, tokens: int) -> Run:
    """The same by the Python API."""
    begun = time.perf_counter()

    async def one() -> tuple[int, list[float]]:
        times, made = [], 0
        messages = [{"role": "user", "content": PROMPT}]
        options: Any = {"max_tokens": tokens, "temperature": 0, "ignore_eos": True}
        async for chunk in llm.chat(messages, stream=True, **options):  # type: ignore[union-attr]
            if chunk.text:
                times.append(time.perf_counter() - begun)
            if chunk.usage is not None:
                made = chunk.usage.completion_tokens
        return made, times

    found = await asyncio.gather(*(one() for _ in range(streams)))
    seconds = time.perf_counter() - begun
    return Run(seconds, sum(f[0] for f in found), [f[1][0] for f in found], [f[1] for f in found])


def free_port() -> int:
    """A port nobody listens at."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


@contextmanager
def our_server(options: argparse.Namespace) -> Iterator[str]:
    """``rl-mlx serve`` in a process; gives the address of its chat."""
    with tempfile.TemporaryDirectory() as home:
        config = Path(home, "config.toml")
        config.write_text(
            f"parallel = {options.parallel}\n[backend_options]\nthreads = {options.threads}\n"
            if options.backend == "llama.cpp"
            else ""
        )
        port = free_port()
        command = [sys.executable, "-m", "rl_mlx.cli.main", "serve", options.model]
        command += ["--backend", options.backend, "--port", str(port)]
        command += ["--context", str(options.context)]
        environ = {**os.environ, "RL_MLX_CONFIG": str(config)}
        with _process(command, port, environ):
            yield f"http://127.0.0.1:{port}/v1/chat/completions"


@contextmanager
def _process(
    command: list[str], port: int, environ: dict[str, str] | None = None
) -> Iterator[None]:
    with subprocess.Popen(command, stderr=subprocess.DEVNULL, env=environ) as process:
        try:
            _wait_for(port, process.poll)
            yield
        finally:
            process.terminate()


def _wait_for(port: int, ended: Callable[[], Any]) -> None:
    for _ in range(600):
        try:
            with socket.create_connection(("127.0.0.1", port), 1):
                return
        except OSError:
            if ended() is not None:
                raise SystemExit("a server did not start") from None
            time.sleep(0.1)
    raise SystemExit("a server did not answer")


def _llama_server(model: str, port: int, threads: int, context: int, parallel: int) -> None:
    import xllamacpp

    for stream in (1, 2):  # it writes a line a request
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    params = xllamacpp.CommonParams()
    params.model.path = model
    params.port = port
    params.n_ctx = context * parallel
    params.n_parallel = parallel
    params.cpuparams.n_threads = threads
    server = xllamacpp.Server(params)  # held: its threads answer as long as it lives
    while server is not None:
        time.sleep(1)


@contextmanager
def peer_server(options: argparse.Namespace) -> Iterator[str]:
    """The peer in a process."""
    port = free_port()
    url = f"http://127.0.0.1:{port}/v1/chat/completions"
    if options.peer == "mlx-lm":
        command = [sys.executable, "-m", "mlx_lm.server", "--model", options.model]
        with _process([*command, "--port", str(port)], port):
            yield url
        return
    process = multiprocessing.get_context("spawn").Process(
        target=_llama_server,
        args=(options.model, port, options.threads, options.context, options.parallel),
        daemon=True,
    )
    process.start()
    try:
        _wait_for(port, lambda: process.exitcode)
        yield url
    finally:
        process.terminate()
        process.join()


def open_api(options: argparse.Namespace) -> AsyncLLM:
    """The model in this process, with the settings of the server's."""
    is_cpp = options.backend == "llama.cpp"
    return AsyncLLM(
        options.model,
        backend=options.backend,
        context=options.context,
        parallel=options.parallel if is_cpp else None,
        backend_options={"threads": options.threads} if is_cpp else {},
    )


def overhead(options: argparse.Namespace) -> dict[str, Any]:
    """What HTTP costs: speed and time to the first token of both, pair by pair."""
    report: dict[str, Any] = {}
    loop = asyncio.new_event_loop()
    llm = loop.run_until_complete(asyncio.to_thread(open_api, options))
    with our_server(options) as url:
        for streams in (1, 16):
            bodies = [chat_body(options.name, options.tokens)] * streams

            def http(_: int, bodies: list[dict[str, Any]] = bodies) -> Run:
                return loop.run_until_complete(over_http(url, bodies))

            def api(_: int, streams: int = streams) -> Run:
                return loop.run_until_complete(by_api(llm, streams, options.tokens))

            found = in_turns({"api": api, "server": http}, options.pairs)
            speeds = {side: [run.speed for run in runs] for side, runs in found.items()}
            firsts = {side: [min(run.first) for run in runs] for side, runs in found.items()}
            report[f"{streams} streams"] = {
                "tokens/s of the API": median(speeds["api"], 1),
                "tokens/s of the server": median(speeds["server"], 1),
                "server / API": ratios(speeds["server"], speeds["api"])["median"],
                "first token later by, ms": median(
                    [1000 * (s - a) for s, a in zip(firsts["server"], firsts["api"], strict=True)],
                    1,
                ),
            }
    loop.run_until_complete(llm.close())
    loop.close()
    return report


def clients(options: argparse.Namespace) -> dict[str, Any]:
    """64 chat clients: tokens a second of all together."""

    def bodies(pair: int, model: str) -> list[dict[str, Any]]:
        """No prompt comes twice: what a server kept of the last round is of no use."""
        made = [chat_body(model, options.tokens, f"{pair}, {n}. {PROMPT}") for n in range(64)]
        for body in made if options.system else ():
            text = f"{pair}. {LONG * (options.system // 10)}"
            body["messages"].insert(0, {"role": "system", "content": text})
        return made

    with our_server(options) as ours, peer_server(options) as theirs:
        sides = {
            "ours": lambda pair: asyncio.run(over_http(ours, bodies(pair, options.name))).speed,
            options.peer: lambda pair: (
                asyncio.run(over_http(theirs, bodies(pair, options.model))).speed
            ),
        }
        found = in_turns(sides, options.pairs)
    return {
        "tokens/s of ours": median(found["ours"], 1),
        f"tokens/s of {options.peer}": median(found[options.peer], 1),
        "ours / peer": ratios(found["ours"], found[options.peer]),
    }


def gap(options: argparse.Namespace) -> dict[str, Any]:
    """The time between two tokens of a stream, alone and while another's long prompt is read."""
    words = options.prefill // 10
    long_prompts = iter(range(10**6))

    async def watched(url: str, *, disturbed: bool) -> list[float]:
        stream = asyncio.create_task(over_http(url, [chat_body(options.name, options.gap_tokens)]))
        if disturbed:
            await asyncio.sleep(0.2)
            prompt = f"{next(long_prompts)} {LONG * words}"
            await over_http(url, [chat_body(options.name, 1, prompt)])
        times = (await stream).times[0]
        return sorted(b - a for a, b in itertools.pairwise(times))

    with our_server(options) as url:
        sides = {
            "alone": lambda _: asyncio.run(watched(url, disturbed=False)),
            "disturbed": lambda _: asyncio.run(watched(url, disturbed=True)),
        }
        found = in_turns(sides, options.pairs)
    alone = median([gaps[len(gaps) // 2] for gaps in found["alone"]], 5)
    worst, usual = (
        median([gaps[int(len(gaps) * 0.99)] for gaps in found[side]], 5)
        for side in ("disturbed", "alone")
    )
    return {
        "median gap alone, ms": round(1000 * alone, 2),
        "p99 gap alone, ms": round(1000 * usual, 2),
        "p99 gap while a prompt is read, ms": round(1000 * worst, 2),
        "p99 / median": round(worst / alone, 2),
    }


def main() -> None:
    """Measure."""
    made = parser(__doc__ or "")
    made.add_argument("model", nargs="?", default="demo")
    made.add_argument("--backend", default="llama.cpp", choices=["llama.cpp", "mlx"])
    made.add_argument("--peer", default="llama.cpp", choices=["llama.cpp", "mlx-lm"])
    made.add_argument("--threads", type=int, default=1, help="of llama.cpp, on every side")
    made.add_argument("--parallel", type=int, default=16)
    made.add_argument("--context", type=int, default=8192)
    made.add_argument("--tokens", type=int, default=64)
    made.add_argument("--prefill", type=int, default=4000, help="tokens of the long prompt")
    made.add_argument("--system", type=int, default=0, help="tokens that all clients begin with")
    made.add_argument("--gap-tokens", type=int, default=400)
    made.add_argument("--quant", help="of the bigger model on MLX, as `rl-mlx convert` has it: q4")
    options = made.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if options.model == "bigger":
            write = write_gguf if options.backend == "llama.cpp" else write_folder
            options.model = str(write(Path(folder, "bigger")))
            if options.quant:
                convert(options.model, Path(folder, "packed"), quant=options.quant)
                options.model = str(Path(folder, "packed"))
        measure(options)


def measure(options: argparse.Namespace) -> None:
    """All parts that are wanted."""
    from rl_mlx.store import resolve

    files = resolve(options.model)
    options.name, options.model = files.name, str(files.path)
    parts = {"overhead": overhead, "clients": clients, "gap": gap}
    run_parts({name: lambda part=part: part(options) for name, part in parts.items()}, options)


if __name__ == "__main__":
    main()
