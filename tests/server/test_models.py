"""Which models are in memory, and which go."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rl_mlx.backends.fake import INFO, FakeBackend
from rl_mlx.errors import ModelNotFound, OutOfMemory
from rl_mlx.llm import AsyncLLM
from rl_mlx.server import models
from rl_mlx.server.models import Models
from rl_mlx.server.settings import ServerSettings
from rl_mlx.store import InstalledModel, ModelFiles


class Loader:
    """Loads fakes of 100 bytes; ``hold`` makes loading wait, ``error`` fail."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.loads: list[str] = []
        self.closed: list[str] = []
        self.memory: dict[str, Any] = {}
        self.hold: threading.Event | None = None
        self.error: Exception | None = None

    def __call__(self, files: ModelFiles, settings: Any) -> AsyncLLM:
        self.loads.append(files.name)
        self.memory[files.name] = settings.memory
        if self.hold is not None:
            assert self.hold.wait(10)
        if self.error is not None:
            raise self.error
        loader = self

        class Backend(FakeBackend):
            def close(self) -> None:
                loader.closed.append(self.info.name)
                super().close()

        backend = Backend(lambda request: [], replace(INFO, name=files.name, weight_bytes=100))
        return AsyncLLM.of(backend, self.tokenizer)


@pytest.fixture
def loader(tokenizer: Any) -> Loader:
    return Loader(tokenizer)


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Models a, b, c and d of 100 bytes each are installed."""
    found = []
    for name in "abcd":
        path = tmp_path / f"{name}.gguf"
        path.write_bytes(bytes(100))
        found.append(InstalledModel(name, path, "test", 100))
    monkeypatch.setattr(models, "installed", lambda: iter(found))

    def find(name: str) -> ModelFiles:
        match = next((m for m in found if name in (m.name, str(m.path))), None)
        if match is None:
            raise ModelNotFound(name)
        return ModelFiles(match.name, match.path)

    monkeypatch.setattr(models, "find", find)
    monkeypatch.setattr(models, "resolve", find)


@asynccontextmanager
async def managed(loader: Loader, **options: Any) -> AsyncIterator[Models]:
    manager = Models(ServerSettings(**options), loader)
    await manager.start()
    try:
        yield manager
    finally:
        await manager.close()


async def use(manager: Models, *names: str) -> None:
    for name in names:
        async with manager.lease(name):
            pass


async def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < end
        await asyncio.sleep(0.005)


def loaded(manager: Models) -> list[str]:
    return sorted(model.files.name for model in manager.loaded)


@pytest.mark.usefixtures("store")
def test_the_least_recently_used_goes_before_the_next_one_loads(loader: Loader) -> None:
    async def run() -> None:
        async with managed(loader, memory=250) as manager:
            await use(manager, "a", "b", "a", "c")
            assert loaded(manager) == ["a", "c"]
            assert loader.closed == ["b"]
            assert loader.memory["c"] == 150, "what the others leave"
        assert sorted(loader.closed) == ["a", "b", "c"]

    asyncio.run(run())


@pytest.mark.usefixtures("store")
def test_pinned_models_stay_and_what_cannot_fit_is_refused(loader: Loader) -> None:
    async def run() -> None:
        async with managed(loader, memory=250, models=("a",)) as manager:
            await use(manager, "b", "c")
            assert loaded(manager) == ["a", "c"]
        async with managed(loader, memory=150, models=("a",)) as manager:
            with pytest.raises(OutOfMemory, match="--memory"):
                await use(manager, "b")
            assert loaded(manager) == ["a"]

    asyncio.run(run())


@pytest.mark.usefixtures("store")
def test_a_model_is_loaded_once_for_all_who_wait(loader: Loader) -> None:
    async def run() -> None:
        loader.hold = threading.Event()
        async with managed(loader) as manager:
            waiting = [asyncio.create_task(use(manager, "a")) for _ in range(5)]
            await until(lambda: loader.loads == ["a"])
            waiting[0].cancel()  # the one who asked first leaves
            loader.hold.set()
            await asyncio.gather(*waiting[1:])
            assert loader.loads == ["a"]
            await use(manager, "a")
            assert loader.loads == ["a"]

    asyncio.run(run())


@pytest.mark.usefixtures("store")
def test_a_model_in_use_is_waited_for_and_nobody_starves(loader: Loader) -> None:
    async def run() -> None:
        async with managed(loader, memory=150) as manager:
            async with manager.lease("a"):
                other = asyncio.create_task(use(manager, "b"))
                await until(lambda: manager._wants_room)
                again = asyncio.create_task(use(manager, "a"))  # comes after b
                await asyncio.sleep(0.05)
                assert loader.loads == ["a"]
                assert not other.done()
                assert not again.done()
            await asyncio.gather(other, again)
            assert loader.loads == ["a", "b", "a"]

    asyncio.run(run())


@pytest.mark.usefixtures("store")
def test_a_failed_load_is_told_and_tried_again(loader: Loader) -> None:
    async def run() -> None:
        async with managed(loader) as manager:
            loader.error = OutOfMemory("too large")
            with pytest.raises(OutOfMemory, match="too large"):
                await use(manager, "a")
            loader.error = None
            await use(manager, "a")
            loader.error = OutOfMemory("too large")
            with pytest.raises(OutOfMemory):
                await use(manager, "b")
            assert loader.closed == ["a"], "room was made before it was given up"

    asyncio.run(run())


@pytest.mark.usefixtures("store")
def test_idle_models_go(loader: Loader, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "_SWEEP", 0.01)

    async def run() -> None:
        async with managed(loader, keep_alive=0.05, models=("d",)) as manager:
            await use(manager, "a")
            async with manager.lease("b", None):
                pass
            async with manager.lease("c"):
                await until(lambda: loaded(manager) == ["b", "c", "d"])
                await asyncio.sleep(0.1)
                assert "c" in loaded(manager), "it is in use"
            await until(lambda: loaded(manager) == ["b", "d"])

    asyncio.run(run())


@pytest.mark.usefixtures("store")
def test_what_is_being_unloaded_is_gone_before_the_next_one_loads(loader: Loader) -> None:
    async def run() -> None:
        async with managed(loader) as manager:
            await use(manager, "a")
            (a,) = manager.loaded
            may_close, close = asyncio.Event(), a.llm.close

            async def slowly() -> None:
                await may_close.wait()
                await close()

            a.llm.close = slowly  # type: ignore[method-assign]
            going = asyncio.create_task(manager.expire(a.files.path))
            coming = asyncio.create_task(use(manager, "b"))
            await asyncio.sleep(0.05)
            assert loader.loads == ["a"]
            may_close.set()
            await coming
            assert loader.closed == ["a"]
            assert await going

    asyncio.run(run())


@pytest.mark.usefixtures("store")
def test_a_model_that_is_loading_is_in_use(loader: Loader, tmp_path: Path) -> None:
    async def run() -> None:
        async with managed(loader) as manager:
            loader.hold = threading.Event()
            using = asyncio.create_task(use(manager, "a"))
            await until(lambda: loader.loads == ["a"])
            assert not await manager.expire(tmp_path / "a.gguf")
            loader.hold.set()
            await using
            assert await manager.expire(tmp_path / "a.gguf")
            assert loaded(manager) == []

    asyncio.run(run())


@pytest.mark.usefixtures("store")
def test_aliases_and_what_clients_may_name(loader: Loader, tmp_path: Path) -> None:
    aliases = {"small": "a", "gpt-*": "b", "loop": "loop", "c": "a"}

    async def run() -> None:
        async with managed(loader, aliases=aliases) as manager:
            assert (await manager.find("small")).name == "a"
            assert (await manager.find("gpt-4o-mini")).name == "b"
            assert (await manager.find("c")).name == "a", "an alias goes before a model"
            for name in ("loop", "none", "/etc/passwd", "../x", "", "org/repo"):
                with pytest.raises(ModelNotFound):
                    await manager.find(name)
            assert (await manager.find("a:latest")).name == "a"
            outside = tmp_path / "e.gguf"
            outside.write_bytes(b"x")
            with pytest.raises(ModelNotFound):
                await manager.find(str(outside))

    asyncio.run(run())
