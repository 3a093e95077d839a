"""The models that are loaded: on demand, in a memory budget, the least recently used go first."""

from __future__ import annotations

import asyncio
import fnmatch
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from rl_mlx.backends.machine import memory_total
from rl_mlx.errors import ModelNotFound, OutOfMemory
from rl_mlx.llm import AsyncLLM
from rl_mlx.server.settings import ServerSettings
from rl_mlx.settings import ModelSettings, parse_memory
from rl_mlx.store import ModelFiles, find, installed, resolve
from rl_mlx.text.router import Format
from rl_mlx.text.template import ChatTemplate

Load = Callable[[ModelFiles, ModelSettings], AsyncLLM]
KEEP = object()
"""For ``keep_alive``: as the server was told."""
_SWEEP = 1.0


@dataclass(eq=False)
class Loaded:
    """A model in memory. ``expires`` is when it goes if nobody asks for it, by ``time.monotonic``;
    None for never.
    """

    llm: AsyncLLM
    files: ModelFiles
    pinned: bool = False
    own_template: str | None = None
    load_seconds: float = 0.0
    used: float = field(default_factory=time.monotonic)
    expires: float | None = None

    @cached_property
    def template(self) -> ChatTemplate:
        """The chat template. Raises ``InvalidRequest`` where there is none."""
        if self.own_template is not None:
            return self.llm.tokenizer.make_template(self.own_template)
        return self.llm.tokenizer.template

    @cached_property
    def source(self) -> str:
        """All of the template's text."""
        return "\n".join(self.template.sources.values())

    @cached_property
    def format(self) -> Format:
        """How the model marks reasoning and calls."""
        return Format.of(self.template.sources)

    @cached_property
    def shown(self) -> frozenset[int]:
        """Control tokens that the router must see."""
        return self.llm.tokenizer.markers_of(self.format)

    @property
    def footprint(self) -> int:
        """Bytes it holds now: weights and KV cache."""
        info, stats = self.llm.info, self.llm.stats()
        held = info.weight_bytes + stats.kv_bytes
        # MLX's own figure is that of the whole process.
        return held if info.backend == "mlx" else max(held, stats.memory_bytes)


class Models:
    """Gives out loaded models. Used from the event loop alone.

    A model that somebody uses, or waits for, is never unloaded. One load runs at a time; while it
    waits for room, whoever else comes waits behind it.
    """

    def __init__(self, settings: ServerSettings, load: Load, template: str | None = None) -> None:
        self._settings = settings
        self._load = load
        self._template = template
        self._budget = parse_memory(settings.memory or "75%", memory_total())
        self._known: dict[str, ModelFiles] = {}
        self._pinned: set[Path] = set()
        self._loaded: dict[Path, Loaded] = {}
        self._loading: dict[Path, asyncio.Task[Loaded]] = {}
        self._users: Counter[Path] = Counter()
        self._lock = asyncio.Lock()
        self._unloading = asyncio.Lock()
        self._freed = asyncio.Event()
        self._wants_room = False
        self.started = False
        """The models that were named are loaded."""
        self._sweeper: asyncio.Task[None] | None = None

    @property
    def loaded(self) -> list[Loaded]:
        """What is in memory, the most recently used first."""
        return sorted(self._loaded.values(), key=lambda m: m.used, reverse=True)

    async def start(self) -> None:
        """Load the models that were named; raises what loading them raises."""
        self._sweeper = asyncio.create_task(self._sweep())
        for reference in self._settings.models:
            files = await asyncio.to_thread(resolve, reference)
            self._pinned.add(files.path)
            self._known |= {reference: files, files.name: files}
            async with self.lease(reference):
                pass
        self.started = True

    async def close(self) -> None:
        """Unload all."""
        if self._sweeper is not None:
            self._sweeper.cancel()
        loading = list(self._loading.values())
        await asyncio.gather(*loading, return_exceptions=True)
        for path in list(self._loaded):
            await self._unload(path)

    @asynccontextmanager
    async def lease(self, name: str, keep_alive: object = KEEP) -> AsyncIterator[Loaded]:
        """The model of that name, loaded if need be; it stays while it is leased.

        ``keep_alive``: how many seconds it stays after that, None for ever. Raises
        ``ModelNotFound`` and what loading raises.
        """
        files = await self.find(name)
        model = await self._claim(files)
        try:
            yield model
        finally:
            model.used = time.monotonic()
            stay = self._settings.keep_alive if keep_alive is KEEP else keep_alive
            model.expires = None if stay is None else model.used + float(stay)  # type: ignore[arg-type]
            self._release(files.path)

    async def _claim(self, files: ModelFiles) -> Loaded:
        path = files.path
        while self._wants_room and path not in self._pinned:
            async with self._lock:  # behind the load that waits for room
                pass
        self._users[path] += 1
        try:
            while (model := self._loaded.get(path)) is None:
                await asyncio.shield(self._start_load(files))
        except BaseException:
            self._release(path)
            raise
        return model

    def _release(self, path: Path) -> None:
        self._users[path] -= 1
        if not self._users[path]:
            del self._users[path]
        self._freed.set()

    async def find(self, name: str) -> ModelFiles:
        """Where the model is that clients call so. Raises ``ModelNotFound``."""
        aliases = self._settings.aliases
        name = aliases.get(name, name)
        files = self._known.get(name)
        if files is not None and files.path.exists():
            return files
        files = await asyncio.to_thread(_in_store, name)
        if files is None:
            pattern = next((p for p in aliases if fnmatch.fnmatchcase(name, p)), None)
            if pattern is None or aliases[pattern] == name:
                raise ModelNotFound(
                    f"no model {name!r:.200} here; GET /v1/models lists what there is, and --alias "
                    "gives a model another name"
                )
            return await self.find(aliases[pattern])
        self._known[name] = files
        return files

    def forget(self, path: Path) -> None:
        """Names of a model that was deleted mean nothing any more."""
        self._known = {name: files for name, files in self._known.items() if files.path != path}

    async def expire(self, path: Path) -> bool:
        """Unload a model if nobody uses it, or waits for it; whether it is gone."""
        if path in self._users or path in self._loading or path in self._pinned:
            return False
        if path in self._loaded:
            await self._unload(path)
        return True

    def _start_load(self, files: ModelFiles) -> asyncio.Task[Loaded]:
        """The task that loads a model; it goes on when the one who asked first has left."""
        task = self._loading.get(files.path)
        if task is None:
            task = asyncio.create_task(self._load_one(files))
            task.add_done_callback(lambda done: self._loading_done(files.path, done))
            self._loading[files.path] = task
        return task

    def _loading_done(self, path: Path, task: asyncio.Task[Loaded]) -> None:
        del self._loading[path]
        if not task.cancelled():
            task.exception()  # seen, should nobody be left to see it

    async def _load_one(self, files: ModelFiles) -> Loaded:
        async with self._lock:
            needed = await asyncio.to_thread(weight_bytes, files.path)
            await self._make_room(files.name, needed)
            async with self._unloading:  # what is on its way out still holds its memory
                pass
            started = time.monotonic()
            while True:
                others = sum(model.footprint for model in self._loaded.values())
                settings = self._settings.model
                if others or self._settings.memory is not None:
                    settings = replace(settings, memory=max(self._budget - others, 1))
                try:
                    llm = await asyncio.to_thread(self._load, files, settings)
                    break
                except OutOfMemory:
                    if not await self._evict():
                        raise
            self._loaded[files.path] = model = Loaded(
                llm,
                files,
                pinned=files.path in self._pinned,
                own_template=self._template if files.path in self._pinned else None,
                load_seconds=time.monotonic() - started,
            )
            return model

    async def _make_room(self, name: str, needed: int) -> None:
        """Unload, the least recently used first, until ``needed`` more bytes are in the budget."""
        kept = sum(m.footprint for m in self._loaded.values() if m.pinned)
        if kept + needed > self._budget:
            raise OutOfMemory(
                f"{name} takes {needed / 1e9:.1f} GB and {max(self._budget - kept, 0) / 1e9:.1f} "
                "GB are left for it; start the server with more --memory or fewer models"
            )
        try:
            while sum(m.footprint for m in self._loaded.values()) + needed > self._budget:
                self._wants_room = True
                self._freed.clear()
                if not await self._evict():
                    await self._freed.wait()
        finally:
            self._wants_room = False

    async def _evict(self) -> bool:
        """Unload the least recently used model that nobody uses; false where all are in use."""
        free = [m for m in self.loaded if not m.pinned and not self._users[m.files.path]]
        if free:
            await self._unload(free[-1].files.path)
        return bool(free)

    async def _unload(self, path: Path) -> None:
        model = self._loaded.pop(path)
        async with self._unloading:
            await model.llm.close()

    async def _sweep(self) -> None:
        """Unload what nobody asked for in its time."""
        while True:
            await asyncio.sleep(_SWEEP)
            now = time.monotonic()
            for path, model in list(self._loaded.items()):
                if not model.pinned and model.expires is not None and model.expires <= now:
                    await self.expire(path)


def _in_store(name: str) -> ModelFiles | None:
    """An installed model by name. A path or a model that is not here is nothing: clients may name
    what is in the stores alone.
    """
    here = list(installed())
    for wanted in dict.fromkeys((name, name.removesuffix(":latest"))):
        for model in here:
            if model.name == wanted:
                return ModelFiles(model.name, model.path)
        try:
            found = find(wanted)
        except (ModelNotFound, ValueError):
            continue
        if isinstance(found, ModelFiles) and any(m.path == found.path for m in here):
            return found
    return None


def weight_bytes(path: Path) -> int:
    """Bytes of a model's files: a folder's, or a GGUF file's with its other parts."""
    if path.is_dir():
        return sum(p.stat().st_size for p in path.glob("*.safetensors"))
    first, _, rest = path.name.rpartition("-00001-of-")
    parts = path.parent.glob(f"{first}-*-of-{rest}") if first else [path]
    return sum(p.stat().st_size for p in parts)
