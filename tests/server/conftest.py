"""Servers to talk to: the real program, and the application over a fake backend."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import httpx
import pytest

from rl_mlx.backends.fake import INFO, FakeBackend
from rl_mlx.llm import AsyncLLM
from rl_mlx.server.app import build
from rl_mlx.server.run import serve_in
from rl_mlx.server.settings import ServerSettings
from rl_mlx.store import ModelFiles
from rl_mlx.text.tokenizer import Tokenizer
from rl_mlx.types import Request

DEMO = Path(str(files("rl_mlx.demo") / "demo.gguf"))
# What the template of a model that thinks and calls tools has in it.
TEMPLATE = """{%- if tools %}<tools>{{ tools | tojson }}</tools> <tool_call>{% endif %}
{%- for m in messages %}[{{ m.role }}]{{ m.content or '' }}
{%- if m.reasoning_content %}(thought: {{ m.reasoning_content }}){% endif %}
{%- for c in m.tool_calls or [] %}<call {{ c.function.name }} {{ c.function.arguments | tojson }}>
{%- endfor %}{% endfor %}
{%- if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}[assistant]"""


@pytest.fixture(scope="session")
def demo() -> Path:
    if not DEMO.is_file():
        pytest.skip("the demo model is not in this checkout")
    return DEMO


@pytest.fixture(scope="session")
def tokenizer(demo: Path) -> Tokenizer:
    return Tokenizer.open(demo)


class Program:
    """``rl-mlx serve`` as a process."""

    def __init__(self, home: Path, *arguments: str) -> None:
        config = home / "config.toml"
        config.write_text("parallel = 4\n[backend_options]\nthreads = 1\n")
        environ = {
            **os.environ,
            "HF_HOME": str(home),
            "OLLAMA_MODELS": str(home),
            "HOME": str(home),
            "RL_MLX_CONFIG": str(config),
            "RL_MLX_BACKEND": "llama.cpp",
        }
        for name in ("HF_HUB_CACHE", "LLAMA_CACHE"):
            environ.pop(name, None)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "rl_mlx.cli.main", "serve", "--port", "0", *arguments],
            env=environ,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.lines: list[str] = []
        self._ready = threading.Event()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        assert self._ready.wait(60), "the server did not start"
        found = [m[1] for line in self.lines if (m := re.search(r"answers at (\S+);", line))]
        assert found, "".join(self.lines)
        self.url = found[0]

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line)
            if "answers at" in line:
                self._ready.set()
        self._ready.set()

    @property
    def pid(self) -> int:
        return self.process.pid

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Its exit code."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        code = self.process.wait(30)
        self._reader.join(5)
        assert self.process.stderr is not None
        self.process.stderr.close()
        return code


@pytest.fixture(scope="session")
def start_program(tmp_path_factory: pytest.TempPathFactory, demo: Path) -> Iterator[Any]:
    """``start_program(*arguments)``: the real server with those; stopped at the end."""
    started: list[Program] = []

    def start(*arguments: str) -> Program:
        program = Program(tmp_path_factory.mktemp("home"), *arguments)
        started.append(program)
        return program

    yield start
    for program in started:
        program.stop()


@pytest.fixture(scope="session")
def program(start_program: Any) -> Program:
    """The real server with the demo model, at the defaults."""
    found: Program = start_program("demo", "--log-json")
    return found


@dataclass
class Fake:
    """An application over a fake backend, served in a thread. ``text`` is what the model says;
    ``reply``, if set, the function that says it.
    """

    url: str
    app: Any
    tokenizer: Tokenizer
    backends: dict[str, FakeBackend] = field(default_factory=dict)
    text: str = "Hello there!"
    reply: Callable[[Request], Iterable[int]] | None = None
    load_error: Exception | None = None
    loads: list[str] = field(default_factory=list)

    @property
    def state(self) -> Any:
        return self.app.state.server

    @property
    def requests(self) -> list[Request]:
        return self.backends["demo"].requests

    def prompt(self, number: int = -1) -> str:
        """The prompt of a request, as text."""
        return self.tokenizer.decode(self.requests[number].prompt, skip_special=False)

    def answer(self, request: Request) -> Iterable[int]:
        if self.reply is not None:
            return self.reply(request)
        return self.tokenizer.encode(self.text, add_special=False)

    def wait(self, condition: Callable[[], bool], seconds: float = 5.0) -> None:
        """Until the condition holds."""
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, "it did not come to that"
            time.sleep(0.005)


@pytest.fixture(scope="session")
def start_fake(tokenizer: Tokenizer) -> Iterator[Any]:
    """``start_fake(**settings)``: the application over a fake backend, served on a free port."""
    stops: list[Callable[[], None]] = []

    def start(*, template: str | None = TEMPLATE, **options: Any) -> Fake:
        settings = ServerSettings(
            **{"port": 0, "models": ("demo",), "host": "127.0.0.1", **options}
        )
        fake = Fake("", None, tokenizer)

        def load(files: ModelFiles, _: Any) -> AsyncLLM:
            fake.loads.append(files.name)
            if fake.load_error is not None:
                raise fake.load_error
            size = 100
            info = replace(INFO, name=files.name, vocab=tokenizer.vocab_size, weight_bytes=size)
            backend = FakeBackend(fake.answer, info)
            fake.backends[files.name] = backend
            return AsyncLLM.of(backend, tokenizer)

        fake.app = build(settings, load, template)
        ready: list[str] = []
        loop = asyncio.new_event_loop()
        stop = asyncio.Event()

        def run() -> None:
            asyncio.set_event_loop(loop)
            loop.run_until_complete(serve_in(fake.app, settings, ready.append, stop))
            loop.close()

        thread = threading.Thread(target=run)
        thread.start()

        def end() -> None:
            if thread.is_alive():
                loop.call_soon_threadsafe(stop.set)
            thread.join(30)

        stops.append(end)
        fake.wait(lambda: bool(ready) or not thread.is_alive(), 20)
        fake.url = ready[0]
        fake.stop = end  # type: ignore[attr-defined]
        return fake

    yield start
    for end in stops:
        end()


@pytest.fixture(scope="session")
def shared_fake(start_fake: Any) -> Fake:
    found: Fake = start_fake(aliases={"gpt-*": "demo", "mini": "demo"}, quiet=0.2)
    return found


@pytest.fixture
def fake(shared_fake: Fake) -> Fake:
    """The application over a fake backend, as new."""
    shared_fake.text, shared_fake.reply = "Hello there!", None
    shared_fake.requests.clear()
    return shared_fake


@pytest.fixture
def client(fake: Fake) -> Iterator[httpx.Client]:
    """An HTTP client of ``fake``."""
    with httpx.Client(base_url=fake.url, timeout=10) as found:
        yield found
