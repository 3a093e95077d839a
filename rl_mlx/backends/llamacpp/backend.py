"""The llama.cpp backend: opens a model, checks requests, and hands them to the engine."""

from __future__ import annotations

import weakref
from collections.abc import Sequence as Seq
from contextlib import ExitStack, closing

import numpy as np
import numpy.typing as npt

from rl_mlx.backends.base import Backend, Emit, Stats, default_context
from rl_mlx.backends.llamacpp.draft import Both, Drafter, DraftModel, Lookup
from rl_mlx.backends.llamacpp.engine import Engine
from rl_mlx.backends.llamacpp.exported import gguf_of
from rl_mlx.backends.llamacpp.library import GPU_KINDS, Library, open_library
from rl_mlx.backends.llamacpp.model import KV, Context, Model, layer_counts, prepare
from rl_mlx.backends.llamacpp.options import LlamaCppOptions
from rl_mlx.backends.llamacpp.slots import Slots
from rl_mlx.backends.machine import cpu_name, memory_available, memory_total
from rl_mlx.engine.sequence import Sequence
from rl_mlx.errors import ContextOverflow, InvalidRequest, OutOfMemory, UnsupportedModel
from rl_mlx.sample.seeds import fresh_seed
from rl_mlx.settings import KVFormat, ModelSettings, parse_memory
from rl_mlx.store import ModelFiles, resolve
from rl_mlx.types import ModelInfo, Request

DEFAULT_CONTEXT = 32768
"""Longest context that is taken unless one is asked for: its whole cache is allocated at once."""
PARALLEL = 8
"""Sequences at once, where ``parallel`` does not say."""
DRAFT_TOKENS = 4
"""Most tokens guessed a step, unless ``draft_tokens`` says so."""
_WORTH_COPYING = 64  # tokens: a copy moves a whole sequence, so short prefixes are computed again
_KV_OF_BITS = {8: "q8_0", 6: "q5_1", 4: "q4_0"}
_KV_OF_DTYPE = {"float32": "f32", "float16": "f16", "bfloat16": "bf16", None: "f16"}


class LlamaCppBackend(Backend):
    """A GGUF file on llama.cpp behind an engine of its own."""

    def __init__(
        self,
        model: Model,
        engine: Engine,
        info: ModelInfo,
        options: LlamaCppOptions,
        kv: KV,
        cells: int,
    ) -> None:
        self.info = info
        self._model = model
        self._engine = engine
        self._options = options
        self._kv = kv
        self._cells = cells
        # Joins the thread at interpreter exit too, before the library is torn down under it.
        self._finalizer = weakref.finalize(self, engine.close)

    @classmethod
    def open(cls, files: ModelFiles, settings: ModelSettings) -> LlamaCppBackend:
        """Load a model.

        Raises ``BackendUnavailable``, ``InvalidRequest``, ``FormatError``, ``UnsupportedModel`` or
        ``OutOfMemory``.
        """
        if settings.prefix_cache is not None:
            raise UnsupportedModel(
                "llama.cpp keeps no prefixes on disk; leave prefix_cache out, or take backend mlx"
            )
        options = LlamaCppOptions.of(settings.backend_options)
        library = open_library()
        kv = kv_types(settings, options)
        path = gguf_of(files.path)
        prepare(library, options)
        full: OutOfMemory | None = None
        for layers in layer_counts(library, options, path):
            try:
                with ExitStack() as opened:
                    model = opened.enter_context(closing(Model(library, path, options, layers)))
                    if full is not None:
                        model.notes.append(f"only {layers} layers are on the GPU: {full}")
                    backend = cls._start(library, model, files, settings, options, kv, opened)
                    opened.pop_all()  # from here on the engine's thread closes them
                    return backend
            except OutOfMemory as error:
                full = error
        assert full is not None, "there is at least one count of layers"
        raise full

    @classmethod
    def _start(
        cls, library: Library, model: Model, files: ModelFiles, settings: ModelSettings,
        options: LlamaCppOptions, kv: KV, opened: ExitStack,
    ) -> LlamaCppBackend:  # fmt: skip
        budget = parse_memory(settings.memory or "75%", memory_total())
        length = _length(model, settings, kv, budget)
        unified, parallel = options.unified, settings.parallel or PARALLEL
        if unified is None:
            each = length * model.kv_bytes_per_token(kv)
            unified = parallel * each > (budget - model.nbytes) / 4
        drafter = _drafter(library, model, settings, options, length, parallel, unified=unified)
        if drafter is not None:
            opened.callback(drafter.close)
        guesses = (settings.draft_tokens or DRAFT_TOKENS) if drafter is not None else 0
        context = Context(
            model, options, kv, length, parallel,
            unified=unified, outputs_per_sequence=1 + guesses,
        )  # fmt: skip

        def release() -> None:
            if drafter is not None:
                drafter.close()
            context.close()
            model.close()

        worth = 1 if unified else _WORTH_COPYING
        slots = Slots(parallel, can_cut=model.can_rewind, worth=worth)
        engine = Engine(context, slots, drafter, guesses, release)
        info = _info(library, model, files, kv, length, budget)
        return cls(model, engine, info, options, kv, length * (1 if unified else parallel))

    def submit(self, request: Request, emit: Emit) -> None:
        """See ``Backend.submit``."""
        self._check(request.prompt)
        room = self.info.context - len(request.prompt)
        if room < 1:
            raise ContextOverflow(
                f"the prompt has {len(request.prompt)} tokens and the context is "
                f"{self.info.context}; shorten it or load the model with a longer context"
            )
        wanted, seed = request.params.max_tokens, request.params.seed
        limit = room if wanted is None else min(wanted, room)
        self._engine.submit(Sequence(request, emit, limit, fresh_seed() if seed is None else seed))

    def cancel(self, request_id: str) -> None:
        """See ``Backend.cancel``."""
        self._engine.cancel(request_id)

    def stats(self) -> Stats:
        """See ``Backend.stats``."""
        running, waiting, tokens = self._engine.counts()
        held = self._cells * self.info.kv_bytes_per_token
        return Stats(
            running, waiting, tokens * self.info.kv_bytes_per_token, self.info.weight_bytes + held
        )

    def logits(self, ids: Seq[int]) -> npt.NDArray[np.float32]:
        """See ``Backend.logits``."""
        self._check(ids)
        return self._engine.call(lambda: self._forward(ids, embeddings=False))

    def embed(self, ids: Seq[int]) -> npt.NDArray[np.float32]:
        """See ``Backend.embed``."""
        self._check(ids)
        mean = self._engine.call(lambda: self._forward(ids, embeddings=True)).mean(axis=0)
        unit: npt.NDArray[np.float32] = mean / max(float(np.linalg.norm(mean)), 1e-12)
        return unit

    def _forward(self, ids: Seq[int], *, embeddings: bool) -> npt.NDArray[np.float32]:
        """Logits or last hidden states of every position, in a context of its own that is freed
        again.
        """
        context = Context(
            self._model, self._options, self._kv, max(len(ids), 32), 1,
            outputs="embeddings" if embeddings else "logits",
        )  # fmt: skip
        try:
            rows = []
            for start in range(0, len(ids), context.capacity):
                part = ids[start : start + context.capacity]
                context.add(part, start, 0, len(part))
                context.run()
                read = context.embedding if embeddings else context.logits
                rows += [read(i).copy() for i in range(len(part))]
            return np.stack(rows)
        finally:
            context.close()

    def _check(self, ids: Seq[int]) -> None:
        if not ids:
            raise InvalidRequest("the prompt is empty: it encodes to no tokens")
        if len(ids) > self.info.context:
            raise ContextOverflow(
                f"{len(ids)} tokens are more than the context of {self.info.context}; "
                "shorten the text or load the model with a longer context"
            )
        outside = next((t for t in ids if not 0 <= t < self.info.vocab), None)
        if outside is not None:
            raise InvalidRequest(
                f"token id {outside} is outside the vocabulary of {self.info.vocab}"
            )

    def close(self) -> None:
        """See ``Backend.close``."""
        self._finalizer()


def kv_types(settings: ModelSettings, options: LlamaCppOptions) -> KV:
    """Types of the KV cache: those named, else by ``kv_bits``, else by ``dtype``, else float16."""
    wanted = KVFormat.parse(settings.kv_bits)
    if wanted.start:
        raise InvalidRequest(
            "llama.cpp quantizes its cache from the first token; leave @ out of kv_bits"
        )
    default = _KV_OF_DTYPE[settings.dtype]
    keys = _KV_OF_BITS[wanted.keys] if wanted.keys else default
    values = _KV_OF_BITS[wanted.values] if wanted.values else default
    kv = KV(options.cache_type_k or keys, options.cache_type_v or values)
    if kv.v not in _KV_OF_DTYPE.values() and options.flash_attention is False:
        raise InvalidRequest(f"a {kv.v} cache needs flash attention; leave flash_attention on")
    return kv


def _length(model: Model, settings: ModelSettings, kv: KV, budget: int) -> int:
    """Tokens a sequence may have: what was asked for, else the model's own context as far as memory
    goes.
    """
    per_token = max(1, model.kv_bytes_per_token(kv))
    room = min(budget, memory_available() + model.nbytes) - model.nbytes
    fits = room // per_token
    wanted = settings.context or min(default_context(model.trained_context), DEFAULT_CONTEXT)
    if (model.gpu_layers == 0 and wanted > fits and settings.context) or fits < 64:
        raise OutOfMemory(
            f"{model.path.name} needs {(model.nbytes + wanted * per_token) / 1e9:.1f} GB for a "
            f"context of {wanted} tokens and {max(room + model.nbytes, 0) / 1e9:.1f} GB may be "
            "used; set a shorter context, kv_bits, or more memory"
        )
    if wanted > fits and model.gpu_layers == 0:
        model.notes.append(f"the context is {fits} tokens: memory holds no more")
        return int(fits)
    if wanted < model.trained_context:
        model.notes.append(f"the context is {wanted} of the model's {model.trained_context} tokens")
    return wanted


def _drafter(
    library: Library,
    model: Model,
    settings: ModelSettings,
    options: LlamaCppOptions,
    length: int,
    parallel: int,
    *,
    unified: bool,
) -> Drafter | None:
    if settings.draft is None:
        return None
    if not model.can_rewind:
        raise UnsupportedModel(
            f"draft= needs a cache that can be cut, and {model.path.name} is a recurrent model; "
            "leave it out"
        )
    if settings.draft in {"lookup", "auto"}:
        return Lookup()
    name = settings.draft.removeprefix("lookup+")
    with ExitStack() as opened:
        path = gguf_of(resolve(name).path)
        draft = opened.enter_context(closing(Model(library, path, options, model.gpu_layers)))
        drafter = DraftModel(draft, model, options, length, parallel, unified=unified)
        opened.pop_all()
    return drafter if name == settings.draft else Both(Lookup(), drafter)


def _info(
    library: Library, model: Model, files: ModelFiles, kv: KV, length: int, budget: int
) -> ModelInfo:
    gpus = [f"{d[0]} ({d[1]})" for d in library.devices() if d[3] in GPU_KINDS]
    return ModelInfo(
        name=files.name,
        path=str(files.path),
        architecture=model.metadata("general.architecture"),
        parameters=model.parameters,
        bits_per_weight=8 * model.nbytes / max(model.parameters, 1),
        context=length,
        vocab=model.vocab,
        hidden=model.hidden,
        layers=model.layers,
        backend="llama.cpp",
        device=", ".join(gpus) if gpus and model.gpu_layers else f"CPU ({cpu_name()})",
        dtype=kv.k,
        weight_bytes=model.nbytes,
        kv_bytes_per_token=model.kv_bytes_per_token(kv),
        memory_budget=budget,
        notes=tuple(model.notes),
    )
