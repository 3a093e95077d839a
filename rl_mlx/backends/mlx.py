"""The MLX backend: Metal on Apple Silicon, CUDA where MLX's build is installed, else the CPU."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from collections.abc import Sequence as Seq
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import replace

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from rl_mlx.backends.base import Backend, Emit, Stats, default_context
from rl_mlx.backends.draft import find_draft
from rl_mlx.backends.machine import memory_total
from rl_mlx.cache.arena import Arena
from rl_mlx.cache.disk import DiskTier
from rl_mlx.cache.governor import Governor, MLXDevice
from rl_mlx.convert.open import open_weights
from rl_mlx.convert.weights import FloatType, Weights
from rl_mlx.engine.chunk import ChunkSize
from rl_mlx.engine.loop import Engine, Parts
from rl_mlx.engine.runner import Runner
from rl_mlx.engine.scheduler import Scheduler
from rl_mlx.engine.sequence import Sequence
from rl_mlx.engine.speculate import Speculator
from rl_mlx.errors import ContextOverflow, InvalidRequest
from rl_mlx.model.device import on_cpu
from rl_mlx.model.load import is_ours, load_decoder
from rl_mlx.model.model import Model
from rl_mlx.sample.seeds import fresh_seed
from rl_mlx.settings import DENSE_KV, KVFormat, ModelSettings, parse_memory, parse_size
from rl_mlx.store import ModelFiles, places
from rl_mlx.store.digest import digest
from rl_mlx.types import ModelInfo, Request

CHUNK = 512
"""The most prompt tokens read in one step."""
MAX_ROWS = 64
"""Sequences at once, where ``parallel`` does not say."""


class MLXBackend(Backend):
    """A model on MLX behind the engine."""

    def __init__(self, engine: Engine, info: ModelInfo, put_back: Callable[[], object]) -> None:
        """``put_back`` undoes what was set up before the engine, once that is closed."""
        self.info = info
        self._engine = engine
        # Joins the thread at interpreter exit too, before MLX is torn down under it.
        self._finalizer = weakref.finalize(self, _close, engine, put_back)

    @classmethod
    def open(cls, files: ModelFiles, settings: ModelSettings) -> MLXBackend:
        """Load a model. Raises ``OutOfMemory`` before reading weights that would not fit."""
        weights = open_weights(files.path)
        device = MLXDevice(memory_total())
        info = _info(files, settings, weights, device)
        draft = find_draft(files, settings.draft)
        unpack = _unpacks(info)
        held = sum(
            4 * m.parameters if unpack else m.weight_bytes for m in (info, draft) if m is not None
        )
        rows = settings.parallel or MAX_ROWS
        governor = Governor(device, info.memory_budget, held, _scratch(info, rows))
        governor.check_weights(files.name)
        kv = KVFormat.parse(settings.kv_bits)
        if kv != DENSE_KV and not is_ours(weights.config):
            raise InvalidRequest(
                f"kv_bits= is not available for {info.architecture}, which runs through mlx-lm; "
                "leave it out"
            )
        kv_bytes = Future[int]()
        opened = ExitStack()

        def start() -> Parts:
            model = _load(weights, info, exact=settings.dtype == "float32", unpack=unpack)
            weights.close()
            disk = _disk(files, settings, info)
            if disk is not None:
                opened.callback(disk.close)
            runner = Runner(model, governor, CHUNK, kv, disk)
            kv_bytes.set_result(_kv_bytes_per_token(runner.arena))
            scheduler = Scheduler(
                max_rows=rows, admit=runner.admits, chunks=ChunkSize(CHUNK), packs=runner.packs
            )
            proposer = draft.load(info, runner, unpack=unpack) if draft else None
            return runner, scheduler, Speculator(proposer, settings.draft_tokens)

        with opened:
            opened.callback(governor.limit_device())
            engine = Engine(start)
            notes = draft.notes(info) if draft else ()
            info = replace(info, kv_bytes_per_token=kv_bytes.result(), notes=notes)
            return cls(engine, info, opened.pop_all().close)

    def submit(self, request: Request, emit: Emit) -> None:
        """See ``Backend.submit``."""
        context = self.info.context
        room = context - len(request.prompt)
        if not request.prompt:
            raise InvalidRequest("the prompt is empty: it encodes to no tokens")
        if room < 1:
            raise ContextOverflow(
                f"the prompt has {len(request.prompt)} tokens and the context is {context}; "
                "shorten it or load the model with a longer context"
            )
        wanted = request.params.max_tokens
        limit = room if wanted is None else min(wanted, room)
        seed = request.params.seed
        self._engine.submit(Sequence(request, emit, limit, fresh_seed() if seed is None else seed))

    def cancel(self, request_id: str) -> None:
        """See ``Backend.cancel``."""
        self._engine.cancel(request_id)

    def stats(self) -> Stats:
        """See ``Backend.stats``."""
        running, waiting, kv_bytes = self._engine.counts()
        return Stats(running, waiting, kv_bytes, mx.get_active_memory())

    def logits(self, ids: Seq[int]) -> npt.NDArray[np.float32]:
        """See ``Backend.logits``."""
        self._check(ids)
        return self._engine.call(lambda runner: runner.logits(ids))

    def embed(self, ids: Seq[int]) -> npt.NDArray[np.float32]:
        """See ``Backend.embed``."""
        self._check(ids)

        def run(runner: Runner) -> npt.NDArray[np.float32]:
            mean = runner.hidden(ids).astype(mx.float32).mean(axis=(0, 1))
            return np.array(mean / mx.maximum(mx.linalg.norm(mean), 1e-12))

        return self._engine.call(run)

    def _check(self, ids: Seq[int]) -> None:
        if not ids:
            raise InvalidRequest("there are no tokens")
        if len(ids) > self.info.context:
            raise ContextOverflow(f"{len(ids)} tokens; the context is {self.info.context}")

    def close(self) -> None:
        """See ``Backend.close``."""
        self._finalizer()


def _close(engine: Engine, put_back: Callable[[], object]) -> None:
    engine.close()
    mx.clear_cache()
    put_back()


def _disk(files: ModelFiles, settings: ModelSettings, info: ModelInfo) -> DiskTier | None:
    """The prefix tree's disk tier where one is wanted."""
    if settings.prefix_cache is None:
        return None
    return DiskTier(
        places.ours("prefixes"),
        parse_size("prefix_cache", settings.prefix_cache),
        weights=digest(files.path),
        dtype=(info.dtype, settings.dtype),  # asked for or not decides how weights are unpacked
        kv=KVFormat.parse(settings.kv_bits),
        context=info.context,  # long contexts have other rotary frequencies
    )


def _unpacks(info: ModelInfo) -> bool:
    """Whether packed weights are held as float32. MLX on a CPU multiplies those two times faster,
    and many times with a good BLAS; only where they take little of the memory.
    """
    small = 4 * info.parameters <= info.memory_budget // 4
    return on_cpu() and info.dtype == "float32" and small


def _load(weights: Weights, info: ModelInfo, *, exact: bool, unpack: bool) -> Model:
    dtype: FloatType = info.dtype  # type: ignore[assignment]
    if is_ours(weights.config):
        return load_decoder(weights, info.context, dtype, exact=exact, unpack=unpack)
    from rl_mlx.model.zoo import load_zoo  # noqa: PLC0415  (slow to import)

    return load_zoo(weights, dtype)


def _scratch(info: ModelInfo, rows: int) -> int:
    """Bytes of activations of the largest step, generously: no layer is wider than 16 hiddens."""
    item = 4 if info.dtype == "float32" else 2
    logits = rows * info.vocab * 4 * 3
    return 4 * CHUNK * 16 * info.hidden * item + logits


def _kv_bytes_per_token(arena: Arena) -> int:
    """Bytes that one more token takes in a long sequence."""
    return (arena.bytes_for(1, 1 << 20) - arena.bytes_for(1, 1 << 19)) >> 19


def _dtype(settings: ModelSettings, weights: Weights) -> FloatType:
    """The type asked for; else the weights' own on a GPU, and float32 on a CPU, where halves are
    slow.
    """
    if settings.dtype is not None:
        return settings.dtype  # type: ignore[return-value]
    if on_cpu():
        return "float32"
    named = weights.config.get("dtype") or weights.config.get("torch_dtype")
    return named if named in {"float16", "bfloat16"} else "float16"


def _info(
    files: ModelFiles, settings: ModelSettings, weights: Weights, device: MLXDevice
) -> ModelInfo:
    config = weights.config
    dtype = _dtype(settings, weights)
    item = 4 if dtype == "float32" else 2
    parameters = weight_bytes = 0
    for name in weights.names():
        count = math.prod(weights.shape(name))
        size = weights.nbytes(name, exact=settings.dtype == "float32")
        parameters += count
        weight_bytes += count * item if size >= 2 * count else size  # dense ones in the dtype
    capacity = device.capacity()
    budget = parse_memory(settings.memory or int(capacity * device.share()), capacity)
    return ModelInfo(
        name=files.name,
        path=str(files.path),
        architecture=str(config.get("model_type")),
        parameters=parameters,
        bits_per_weight=8 * weight_bytes / max(parameters, 1),
        context=settings.context or default_context(int(config["max_position_embeddings"])),
        vocab=int(config["vocab_size"]),
        hidden=int(config["hidden_size"]),
        layers=int(config["num_hidden_layers"]),
        backend="mlx",
        device=str(mx.device_info().get("device_name", mx.default_device())),
        dtype=dtype,
        weight_bytes=weight_bytes,
        kv_bytes_per_token=0,
        memory_budget=budget,
    )
