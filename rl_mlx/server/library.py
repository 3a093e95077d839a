"""Ollama's tags, show, ps, pull, delete and version: the models on this machine."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import math
import re
import threading
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

from rl_mlx import __version__
from rl_mlx.convert.files import read_json
from rl_mlx.convert.gguf.reader import GGUFFile
from rl_mlx.errors import InvalidRequest, ModelNotFound, RlMlxError
from rl_mlx.server.endpoint import Call, Json, Stream
from rl_mlx.server.models import Loaded
from rl_mlx.server.problems import BadParameter, line
from rl_mlx.server.schemas.ollama import NamedRequest, PullRequest, ShowRequest
from rl_mlx.store import InstalledModel, ModelFiles, hub, installed, remove
from rl_mlx.text.tokenizer import Tokenizer

_DIGEST = re.compile(r"(?:sha256-)?([0-9a-f]{64})")
_PAUSE = 0.5  # seconds between two lines of a download's progress
_LONG = 64  # entries of a list in a header above which only verbose shows it


async def tags(call: Call[Any]) -> Json:  # noqa: ARG001 - nothing is asked
    """``GET /api/tags``."""
    return Json({"models": await asyncio.to_thread(lambda: [_tag(m) for m in installed()])})


def _tag(model: InstalledModel) -> dict[str, Any]:
    return {
        "name": model.name,
        "model": model.name,
        "modified_at": _modified(model.path),
        "size": model.bytes,
        "digest": _digest(model.path),
        "details": details(model.path, model.name),
    }


def _modified(path: Path) -> str:
    return datetime.fromtimestamp(path.stat().st_mtime, timezone.utc).isoformat()


def _digest(path: Path) -> str:
    """The file's SHA-256 where its store names it so, else one of what it is and when."""
    match = _DIGEST.fullmatch(path.resolve().name)
    if match:
        return match[1]
    found = path.stat()
    return hashlib.sha256(f"{path} {found.st_size} {found.st_mtime_ns}".encode()).hexdigest()


def details(path: Path, name: str) -> dict[str, Any]:
    """Format, family, size and quantization, as far as headers and names tell."""
    family, parameters = "", 0
    if path.is_dir():
        family = str(read_json(path / "config.json").get("model_type", ""))
    else:
        with contextlib.suppress(RlMlxError, OSError), GGUFFile.open(path) as file:
            family = file.str("general.architecture", "")
            parameters = sum(math.prod(t.shape) for t in file.tensors.values())
    quant = name.rpartition(":")[2] if ":" in name else ""
    return {
        "parent_model": "",
        "format": "safetensors" if path.is_dir() else "gguf",
        "family": family,
        "families": [family] if family else [],
        "parameter_size": _count(parameters),
        "quantization_level": quant,
    }


def _count(parameters: int) -> str:
    for unit, size in (("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if parameters >= size:
            return f"{parameters / size:.1f}{unit}"
    return str(parameters) if parameters else ""


async def ps(call: Call[Any]) -> Json:
    """``GET /api/ps``; ours adds the backend and how busy it is."""
    loaded = call.state.models.loaded
    return Json({"models": [await asyncio.to_thread(_process, model) for model in loaded]})


def _process(model: Loaded) -> dict[str, Any]:
    info, stats = model.llm.info, model.llm.stats()
    size = model.footprint
    expires = None
    if not model.pinned and model.expires is not None:
        left = timedelta(seconds=model.expires - time.monotonic())
        expires = (datetime.now(timezone.utc) + left).isoformat()
    return {
        "name": model.files.name,
        "model": model.files.name,
        "size": size,
        "digest": _digest(model.files.path) if model.files.path.exists() else "",
        "details": details(model.files.path, model.files.name),
        "expires_at": expires,
        "size_vram": 0 if info.device.startswith("CPU") else size,
        "context_length": info.context,
        "backend": info.backend,
        "running": stats.running,
        "waiting": stats.waiting,
    }


async def version(call: Call[Any]) -> Json:  # noqa: ARG001 - nothing is asked
    """``GET /api/version``."""
    return Json({"version": __version__})


def _name(body: NamedRequest) -> str:
    name = body.model or body.name
    if name is None:
        raise BadParameter("model", "this parameter is required")
    return name


async def show(call: Call[ShowRequest]) -> Json:
    """``POST /api/show``."""
    files = await call.state.models.find(_name(call.body))
    return Json(await asyncio.to_thread(_show, files, verbose=call.body.verbose))


def _show(files: ModelFiles, *, verbose: bool) -> dict[str, Any]:
    tokenizer = Tokenizer.open(files.path)
    sources = tokenizer.template.sources if tokenizer.has_template else {}
    template = sources.get("default") or next(iter(sources.values()), "")
    capabilities = ["completion", "embedding"]
    if "tools" in template:
        capabilities.append("tools")
    if re.search(r"<think>|enable_thinking|reasoning_content", template):
        capabilities.append("thinking")
    return {
        "modelfile": f"FROM {files.name}\n",
        "parameters": "",
        "template": template,
        "details": details(files.path, files.name),
        "model_info": _model_info(files.path, verbose=verbose),
        "capabilities": capabilities,
        "modified_at": _modified(files.path),
    }


def _model_info(path: Path, *, verbose: bool) -> dict[str, Any]:
    if path.is_dir():
        return {"general.architecture": "", **read_json(path / "config.json")}
    with GGUFFile.open(path) as file:
        found = {name: _plain(value, verbose=verbose) for name, value in file.metadata.items()}
        count = sum(math.prod(t.shape) for t in file.tensors.values())
    found.pop("tokenizer.chat_template", None)
    return {**found, "general.parameter_count": count}


def _plain(value: Any, *, verbose: bool) -> Any:
    """A value of a header as JSON has them; long lists only where they are wanted."""
    if isinstance(value, (str, bool, int)) or value is None:
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if hasattr(value, "item") and not getattr(value, "shape", ()):
        return _plain(value.item(), verbose=verbose)
    if not verbose and len(value) > _LONG:
        return []
    return [_plain(item, verbose=verbose) for item in value]


async def delete(call: Call[NamedRequest]) -> Json:
    """``DELETE /api/delete``: from the Hugging Face cache alone, as ``rl-mlx rm``."""
    name = _name(call.body)
    model = await asyncio.to_thread(lambda: next((m for m in installed() if m.name == name), None))
    if model is None:
        raise ModelNotFound(f"no model {name!r} here; GET /api/tags lists what there is")
    if not await call.state.models.expire(model.path):
        raise InvalidRequest(f"{name} is in use")
    await asyncio.to_thread(remove, model)
    call.state.models.forget(model.path)
    return Json({})


async def pull(call: Call[PullRequest]) -> Json | Stream:
    """``POST /api/pull``: from Hugging Face, as ``rl-mlx pull``."""
    name = _name(call.body)
    ref = hub.HubRef.parse(name)
    if ref is None:
        raise BadParameter("model", f"{name!r:.100} is not on Hugging Face; give org/repo:Q4_K_M")
    items = _pull(ref)
    if call.body.stream:
        return Stream(items)
    async with aclosing(items) as lines:
        async for _ in lines:
            pass
    return Json({"status": "success"})


async def _pull(ref: hub.HubRef) -> AsyncGenerator[bytes, None]:
    """Lines of progress. Who stops reading them stops the download; what came is kept."""
    progress = _Progress()
    task = asyncio.create_task(asyncio.to_thread(hub.download, ref, progress.bar()))
    try:
        await asyncio.wait([task], timeout=_PAUSE)
        if task.done():
            task.result()
        yield line({"status": "pulling manifest"})
        while not task.done():
            for entry in progress.entries():
                yield line(entry)
            await asyncio.wait([task], timeout=_PAUSE)
        task.result()
        for entry in progress.entries():
            yield line(entry)
        yield line({"status": "success"})
    finally:
        progress.stopped.set()
        await asyncio.gather(task, return_exceptions=True)


class _Progress:
    """What the hub's client tells its progress bars, by file."""

    def __init__(self) -> None:
        self.stopped = threading.Event()
        self._files: dict[str, list[int]] = {}

    def entries(self) -> list[dict[str, Any]]:
        """A line for each file."""
        return [
            {"status": f"pulling {name}", "digest": name, "total": total, "completed": done}
            for name, (done, total) in list(self._files.items())
        ]

    def bar(self) -> type[Any]:
        """A class that looks like ``tqdm``."""
        files, stopped = self._files, self.stopped
        from tqdm.auto import tqdm  # type: ignore[import-untyped]  # noqa: PLC0415

        class Bar(tqdm):  # type: ignore[misc]
            def __init__(self, *args: Any, **options: Any) -> None:
                super().__init__(*args, **{**options, "disable": True})
                self._entry = [int(options.get("initial") or 0), int(options.get("total") or 0)]
                files[str(options.get("desc") or "file")] = self._entry

            def update(self, n: float | None = 1) -> bool | None:
                if stopped.is_set():
                    raise RlMlxError("the download was stopped")
                self._entry[0] += int(n or 0)
                return None

        return Bar
