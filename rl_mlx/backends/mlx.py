"""The MLX backend: Metal on Apple Silicon, CUDA where MLX's build is installed, else the CPU."""

from __future__ import annotations

import os
import weakref
from collections.abc import Sequence as Seq

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from rl_mlx.backends.base import Backend, Emit, Stats
from rl_mlx.convert.open import open_weights
from rl_mlx.convert.weights import FloatType, Weights
from rl_mlx.engine.loop import Engine
from rl_mlx.engine.runner import Runner
from rl_mlx.engine.scheduler import Scheduler
from rl_mlx.engine.sequence import Sequence
from rl_mlx.errors import ContextOverflow, InvalidRequest, OutOfMemory
from rl_mlx.model.load import is_ours, load_decoder
from rl_mlx.sample.seeds import fresh_seed
from rl_mlx.settings import ModelSettings, parse_memory
from rl_mlx.store import ModelFiles
from rl_mlx.types import ModelInfo, Request

CHUNK = 512
"""Prompt tokens read in one step."""
MAX_ROWS = 32
QUEUE_LIMIT = 1024
_ITEM_SIZE: dict[FloatType, int] = {"float32": 4, "float16": 2, "bfloat16": 2}


class MLXBackend(Backend):
    """A model on MLX behind the engine."""

    def __init__(self, engine: Engine, info: ModelInfo) -> None:
        self.info = info
        self._engine = engine
        # Joins the thread at interpreter exit too, before MLX is torn down under it.
        self._finalizer = weakref.finalize(self, engine.close)

    @classmethod
    def open(cls, files: ModelFiles, settings: ModelSettings) -> MLXBackend:
        """Load a model. Raises ``OutOfMemory`` before reading weights that would not fit."""
        if settings.draft is not None:
            raise InvalidRequest("draft= is not available on the MLX backend yet; leave it out")
        if settings.kv_bits is not None:
            raise InvalidRequest("kv_bits= is not available on the MLX backend yet; leave it out")
        weights = open_weights(files.path)
        dtype = _dtype(settings, weights)
        info = _info(files, settings, weights, dtype)
        if info.weight_bytes > info.memory_budget:
            raise OutOfMemory(
                f"{files.name} needs {info.weight_bytes / 1e9:.1f} GB for its weights alone; the "
                f"budget is {info.memory_budget / 1e9:.1f} GB (set memory= or --memory, or take a "
                "smaller quantization)"
            )

        def start() -> tuple[Runner, Scheduler]:
            if is_ours(weights.config):
                model = load_decoder(weights, info.context, dtype)
            else:
                from rl_mlx.model.zoo import load_zoo  # noqa: PLC0415  (slow to import)

                model = load_zoo(weights, dtype)
            runner = Runner(model, CHUNK)
            room = info.memory_budget - info.weight_bytes

            def admit(sequence: Sequence) -> bool:
                tokens = len(sequence.prompt) + sequence.limit
                return runner.arena.rows == 0 or (
                    (runner.arena.rows + 1) * tokens * info.kv_bytes_per_token < room
                )

            scheduler = Scheduler(
                max_rows=MAX_ROWS, chunk=CHUNK, queue_limit=QUEUE_LIMIT, admit=admit
            )
            return runner, scheduler

        return cls(Engine(start), info)

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
        mx.clear_cache()


def _dtype(settings: ModelSettings, weights: Weights) -> FloatType:
    """The type asked for; else the weights' own on a GPU, and float32 on a CPU, where halves are
    slow.
    """
    if settings.dtype is not None:
        return settings.dtype  # type: ignore[return-value]
    if mx.default_device() == mx.Device(mx.cpu):
        return "float32"
    named = weights.config.get("dtype") or weights.config.get("torch_dtype")
    return named if named in {"float16", "bfloat16"} else "float16"  # type: ignore[return-value]


def _info(
    files: ModelFiles, settings: ModelSettings, weights: Weights, dtype: FloatType
) -> ModelInfo:
    config = weights.config
    trained = int(config.get("max_position_embeddings") or 4096)
    sizes = {name: weights.nbytes(name) for name in weights.names()}
    parameters = sum(int(np.prod(weights.shape(name), dtype=np.int64)) for name in sizes)
    weight_bytes = sum(sizes.values())
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    device = mx.default_device()
    return ModelInfo(
        name=files.name,
        path=str(files.path),
        architecture=str(config.get("model_type")),
        parameters=parameters,
        bits_per_weight=8 * weight_bytes / max(parameters, 1),
        context=settings.context or trained,
        vocab=int(config["vocab_size"]),
        hidden=int(config["hidden_size"]),
        layers=int(config["num_hidden_layers"]),
        backend="mlx",
        device="cpu" if device == mx.Device(mx.cpu) else "gpu",
        dtype=dtype,
        weight_bytes=weight_bytes,
        kv_bytes_per_token=0,
        memory_budget=parse_memory(settings.memory or "75%", total),
    )
