"""Many clients at once who hang up as they please: nothing of them may be left afterwards.

    python benchmarks/soak.py [--model demo] [--clients 200] [--seconds 120]

Starts ``rl-mlx serve`` on a free port of this machine, asks all APIs at once, streaming and not,
and breaks off half of what was asked. Then the server must be idle, have no more open files,
threads and tasks than before, answer the next request, log no error, and end when told to. Exits
with 1 and says what is left otherwise. Linux: open files are counted in /proc.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx

PATHS: list[tuple[str, dict[str, Any]]] = [
    ("/v1/chat/completions", {"max_tokens": 12, "stream": True}),
    ("/v1/chat/completions", {"max_tokens": 6, "n": 2}),
    ("/v1/messages", {"max_tokens": 12, "stream": True}),
    ("/v1/responses", {"max_output_tokens": 12, "stream": True}),
    ("/api/chat", {"options": {"num_predict": 12}}),
    ("/v1/completions", {"max_tokens": 3, "prompt": "Once upon a time"}),
]
PATIENCE = 120.0


class Server:
    """``rl-mlx serve`` as a process; its log lies in a file."""

    def __init__(self, model: str, home: Path, backend: str) -> None:
        config = home / "config.toml"
        is_cpp = backend == "llama.cpp"
        config.write_text("parallel = 8\n[backend_options]\nthreads = 1\n" if is_cpp else "")
        self._log = home / "log"
        environ = {**os.environ, "RL_MLX_CONFIG": str(config), "RL_MLX_BACKEND": backend}
        command = [sys.executable, "-m", "rl_mlx.cli.main", "serve", model, "--port", "0"]
        with self._log.open("w") as log:
            self.process = subprocess.Popen(command, stderr=log, env=environ)
        self.url = self._address()

    def _address(self) -> str:
        for _ in range(600):
            found = re.search(r"answers at (\S+);", self._log.read_text())
            if found:
                return found[1]
            if self.process.poll() is not None:
                break
            time.sleep(0.1)
        raise SystemExit(f"the server did not start: {self._log.read_text()}")

    @property
    def errors(self) -> list[str]:
        """Lines of its log that should not be there."""
        lines = self._log.read_text().splitlines()
        return [line for line in lines if "Traceback" in line or " ERROR " in line]

    def held(self) -> dict[str, int]:
        """What it holds once it is idle: requests, sequences, tasks, open files, threads."""
        end = time.monotonic() + 30
        while True:
            metrics = httpx.get(self.url + "/metrics").text
            (model,) = httpx.get(self.url + "/api/ps").json()["models"]
            active, tasks = (
                int(float(re.findall(rf"^rl_mlx_{name} (\S+)", metrics, re.MULTILINE)[0]))
                for name in ("requests_active", "tasks")
            )
            rows = model["running"] + model["waiting"]
            if not (active or rows) or time.monotonic() > end:
                time.sleep(0.3)  # connections that just ended
                place = Path("/proc", str(self.process.pid))
                files, threads = (len(list((place / n).iterdir())) for n in ("fd", "task"))
                return {
                    "requests": active, "rows": rows, "tasks": tasks, "open files": files,
                    "threads": threads,
                }  # fmt: skip
            time.sleep(0.05)

    def stop(self) -> int:
        """Its exit code."""
        self.process.terminate()
        return self.process.wait(60)


async def client(url: str, model: str, number: int, until: float, seen: Counter[str]) -> None:
    """Ask until the time is over; now and then with little patience."""
    rng = random.Random(number)
    while time.monotonic() < until:
        async with httpx.AsyncClient(base_url=url, timeout=PATIENCE) as http:
            for _ in range(rng.randint(1, 5)):  # then a new connection
                path, more = rng.choice(PATHS)
                text = f"hello from {number}"
                body: dict[str, Any] = {"model": model, "input": text, **more}
                if path != "/v1/responses":
                    del body["input"]
                    if "prompt" not in more:
                        body["messages"] = [{"role": "user", "content": text}]
                patience = rng.choice([rng.uniform(0, 1), PATIENCE])
                seen["asked"] += 1
                try:
                    await asyncio.wait_for(ask(http, path, body, seen), patience)
                except (asyncio.TimeoutError, TimeoutError):
                    seen["broken off"] += 1


async def ask(http: httpx.AsyncClient, path: str, body: Any, seen: Counter[str]) -> None:
    """One request, read to its end."""
    async with http.stream("POST", path, json=body) as reply:
        text = "".join([piece async for piece in reply.aiter_text()])
    if reply.status_code == 429:
        seen["turned away"] += 1
    elif reply.status_code != 200 or '"error":{' in text:
        seen["failed"] += 1
    else:
        seen["whole"] += 1


def soak(model: str, backend: str, clients: int, seconds: float) -> dict[str, Any]:
    """What was asked, and what was left of it; ``left`` is empty where all is well."""
    seen: Counter[str] = Counter()

    async def run(count: int, length: float) -> None:
        until = time.monotonic() + length
        await asyncio.gather(*(client(server.url, name, n, until, seen) for n in range(count)))

    with tempfile.TemporaryDirectory() as home, contextlib.ExitStack() as ends:
        server = Server(model, Path(home), backend)
        ends.callback(server.process.kill)
        (loaded,) = httpx.get(server.url + "/api/ps").json()["models"]
        name = loaded["name"]
        asyncio.run(run(4, 1.0))  # what is opened once is open now
        before = server.held()
        seen.clear()
        asyncio.run(run(clients, seconds))
        after = server.held()
        reply = httpx.post(server.url + "/v1/completions", timeout=60,
                           json={"model": name, "prompt": "Once", "max_tokens": 1})  # fmt: skip
        left = {n: f"{before[n]} before, {after[n]} after" for n in after if after[n] > before[n]}
        if reply.status_code != 200:
            left["next request"] = reply.text
        if server.errors:
            left["log"] = server.errors[:5]
        if (code := server.stop()) != 0:
            left["exit code"] = code
    if seen["failed"] or not seen["whole"] or not seen["broken off"]:
        left["requests"] = dict(seen)
    return {
        "clients": clients, "seconds": seconds, **seen, "before": before, "after": after,
        "left": left,
    }  # fmt: skip


def main() -> None:
    """Measure, print, and fail where something is left."""
    made = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    made.add_argument("--model", default="demo")
    made.add_argument("--backend", default="llama.cpp", choices=["llama.cpp", "mlx"])
    made.add_argument("--clients", type=int, default=200)
    made.add_argument("--seconds", type=float, default=120.0)
    options = made.parse_args()
    found = soak(options.model, options.backend, options.clients, options.seconds)
    print(json.dumps(found, indent=2))
    if found["left"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
