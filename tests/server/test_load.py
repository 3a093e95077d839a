"""Many clients at once, half of which hang up: afterwards nothing is left of them."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

CLIENTS = int(os.environ.get("RL_MLX_LOAD_CLIENTS", "30"))
SECONDS = float(os.environ.get("RL_MLX_LOAD_SECONDS", "4"))
PATHS: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"max_tokens": 12, "stream": True},
    "/v1/messages": {"max_tokens": 12, "stream": True},
    "/api/chat": {"options": {"num_predict": 12}},
    "/v1/completions": {"max_tokens": 3, "stream": False, "prompt": "Once upon a time"},
}


def open_files(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


async def client(url: str, number: int, until: float, seen: dict[str, int]) -> None:
    rng = random.Random(number)
    async with httpx.AsyncClient(base_url=url, timeout=60) as http:
        while time.monotonic() < until:
            path, more = rng.choice(list(PATHS.items()))
            body = {"model": "demo", "messages": [{"role": "user", "content": f"hi {number}"}]}
            if "prompt" in more:
                del body["messages"]
            patience = rng.choice([rng.uniform(0, 0.5), 60.0])
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(ask(http, path, {**body, **more}, seen), patience)
                seen["whole"] += 1


async def ask(http: httpx.AsyncClient, path: str, body: Any, seen: dict[str, int]) -> None:
    async with http.stream("POST", path, json=body) as reply:
        assert reply.status_code == 200, await reply.aread()
        text = "".join([piece async for piece in reply.aiter_text()])
    assert '"error"' not in text
    seen["asked"] += 1


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="counts open files in /proc")
def test_nothing_leaks(start_program: Any) -> None:
    program = start_program("demo")

    async def run(clients: int, length: float) -> dict[str, int]:
        seen = {"asked": 0, "whole": 0}
        until = time.monotonic() + length
        await asyncio.gather(*(client(program.url, n, until, seen) for n in range(clients)))
        return seen

    asyncio.run(run(2, 0.3))  # what is opened once is open now
    before = settle(program)
    seen = asyncio.run(run(CLIENTS, SECONDS))
    assert seen["whole"] > 0
    assert settle(program) <= before
    reply = httpx.post(program.url + "/v1/completions", json={"model": "demo", "prompt": "Once",
                                                              "max_tokens": 1})  # fmt: skip
    assert reply.status_code == 200
    assert program.stop() == 0
    assert not [line for line in program.lines if "Traceback" in line or " ERROR " in line]


def settle(program: Any) -> int:
    """Open files of the server when nothing runs any more."""
    end = time.monotonic() + 20
    while True:
        (model,) = httpx.get(program.url + "/api/ps").json()["models"]
        metrics = httpx.get(program.url + "/metrics").text
        is_idle = "rl_mlx_requests_active 0.0" in metrics
        if is_idle and model["running"] == model["waiting"] == 0:
            time.sleep(0.2)  # connections that just ended
            return open_files(program.pid)
        assert time.monotonic() < end, (model, metrics)
        time.sleep(0.05)
