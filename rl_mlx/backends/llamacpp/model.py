"""A model and its contexts in llama.cpp: loading, memory, one batch. Schedules nothing."""

from __future__ import annotations

import ctypes
import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from rl_mlx.backends.llamacpp.library import (
    INSTALL_NATIVE,
    KV_BYTES,
    KV_TYPES,
    NUMA,
    ROPE_SCALING,
    SPLIT_MODES,
    Batch,
    ContextParams,
    Library,
    ModelParams,
)
from rl_mlx.backends.llamacpp.options import LlamaCppOptions
from rl_mlx.convert import inspect
from rl_mlx.errors import (
    BackendUnavailable,
    EngineError,
    FormatError,
    InvalidRequest,
    ModelNotFound,
    OutOfMemory,
    UnsupportedModel,
)

ALL_LAYERS = 9999
_RPC_TIMEOUT = 10.0  # seconds
_NO_CELLS = 1  # llama_decode: no room for the batch in the cache


class CacheFull(Exception):
    """No free cells for a batch; the caller makes room and tries again."""


@dataclass(frozen=True)
class KV:
    """The types of the KV cache's two halves."""

    k: str = "f16"
    v: str = "f16"


class Model:
    """Weights and vocabulary. ``close`` frees them, after all contexts."""

    def __init__(
        self, library: Library, path: Path, options: LlamaCppOptions, gpu_layers: int
    ) -> None:
        if not path.exists():
            raise ModelNotFound(f"no such file: {path}")
        self.library = library
        self.path = path
        self.notes: list[str] = []
        self._api = api = library.api
        self.gpu_layers = gpu_layers
        self.handle = self._load(options)
        if api.llama_model_has_encoder(self.handle):
            self.close()
            raise UnsupportedModel(f"{path.name} is an encoder model; only decoders are run here")
        self._vocab = api.llama_model_get_vocab(self.handle)
        self.vocab: int = api.llama_vocab_n_tokens(self._vocab)
        self.hidden: int = api.llama_model_n_embd(self.handle)
        self.layers: int = api.llama_model_n_layer(self.handle)
        self.trained_context: int = api.llama_model_n_ctx_train(self.handle)
        self.parameters: int = api.llama_model_n_params(self.handle)
        self.nbytes: int = api.llama_model_size(self.handle)
        self.can_rewind = not (
            api.llama_model_is_recurrent(self.handle) or api.llama_model_is_hybrid(self.handle)
        )

    def _load(self, options: LlamaCppOptions) -> int:
        params = _model_params(self.library, options, self.gpu_layers)
        handle: int | None = self._api.llama_model_load_from_file(str(self.path).encode(), params)
        reason = self.library.errors()
        if handle is None:
            raise _load_error(self.path, reason)
        return handle

    def metadata(self, key: str) -> str:
        """A metadata value as text, empty where there is none."""
        buffer = ctypes.create_string_buffer(256)
        length = self._api.llama_model_meta_val_str(self.handle, key.encode(), buffer, 256)
        return buffer.value.decode("utf-8", "replace") if length >= 0 else ""

    def piece(self, token: int) -> bytes:
        """A token's entry in the vocabulary, as the file has it."""
        text: bytes = self._api.llama_vocab_get_text(self._vocab, token)
        return text

    def kv_bytes_per_token(self, kv: KV) -> int:
        """Bytes of cache one token takes over all layers that attend."""
        architecture = self.metadata("general.architecture")
        heads: int = self._api.llama_model_n_head_kv(self.handle)
        default = self.hidden // max(1, self._api.llama_model_n_head(self.handle))
        width_k = int(self.metadata(f"{architecture}.attention.key_length") or default)
        width_v = int(self.metadata(f"{architecture}.attention.value_length") or default)
        return int(self.layers * heads * (width_k * KV_BYTES[kv.k] + width_v * KV_BYTES[kv.v]))

    def close(self) -> None:
        """Free the weights; safe to call twice."""
        handle, self.handle = self.handle, 0
        if handle:
            self._api.llama_model_free(handle)


class Context:
    """A KV cache for ``sequences`` of ``length`` tokens, and the batch that is being built for it.

    ``unified``: all sequences share ``length`` cells, rather than having so many each.
    """

    def __init__(
        self,
        model: Model,
        options: LlamaCppOptions,
        kv: KV,
        length: int,
        sequences: int,
        *,
        unified: bool = True,
        outputs: Literal["last", "logits", "embeddings"] = "last",
        outputs_per_sequence: int = 1,
    ) -> None:
        self._api = model.library.api
        self._model = model
        self.unified = unified
        params = _context_params(model, options, kv)
        params.n_seq_max, params.kv_unified = sequences, unified
        params.n_ctx = length if unified else length * sequences
        params.n_batch = params.n_ubatch = options.batch
        params.n_outputs_max_per_seq = outputs_per_sequence if outputs == "last" else options.batch
        params.embeddings = outputs == "embeddings"
        self._handle: int | None = self._api.llama_init_from_model(model.handle, params)
        reason = model.library.errors()
        if self._handle is None:
            kind = OutOfMemory if _is_memory(reason) else EngineError
            raise kind(
                f"llama.cpp cannot make a context of {length} tokens: {reason or 'no reason given'}"
            )
        # llama.cpp lowers it to the context's length, and aborts the process on a larger batch.
        self.capacity: int = self._api.llama_n_batch(self._handle)
        self._memory = self._api.llama_get_memory(self._handle)
        self._row = ctypes.c_float * (model.hidden if outputs == "embeddings" else model.vocab)
        self._make_batch()

    def _make_batch(self) -> None:
        n = self.capacity
        self._tokens = np.zeros(n, np.int32)
        self._positions = np.zeros(n, np.int32)
        self._counts = np.ones(n, np.int32)
        self._sequences = np.zeros(n, np.int32)
        # llama_batch wants a pointer to the sequence ids of each token: all lie in one array.
        self._pointers = self._sequences.ctypes.data + 4 * np.arange(n, dtype=np.uint64)
        self._outputs = np.zeros(n, np.int8)
        self._batch = Batch(
            0, self._tokens.ctypes.data, None, self._positions.ctypes.data,
            self._counts.ctypes.data, self._pointers.ctypes.data, self._outputs.ctypes.data,
        )  # fmt: skip
        self.size = 0

    @property
    def room(self) -> int:
        """Tokens that the batch can still take."""
        return self.capacity - self.size

    def add(self, tokens: Sequence[int], start: int, sequence: int, outputs: int) -> int:
        """Put tokens at positions ``start ..`` of a sequence into the batch; the last ``outputs``
        give logits.

        Returns the index in the batch of the first of those.
        """
        first, end = self.size, self.size + len(tokens)
        self._tokens[first:end] = tokens
        self._positions[first:end] = range(start, start + len(tokens))
        self._sequences[first:end] = sequence
        self._outputs[first:end] = 0
        self._outputs[end - outputs : end] = 1
        self.size = end
        return end - outputs

    def run(self) -> None:
        """Decode the batch. Raises ``CacheFull`` (the batch is kept) or ``EngineError``."""
        self._batch.n_tokens = self.size
        status = self._api.llama_decode(self._handle, self._batch)
        if status == _NO_CELLS:
            raise CacheFull
        self.size = 0
        if status != 0:
            reason = self._model.library.errors() or "no reason given"
            raise EngineError(f"llama.cpp failed to decode ({status}): {reason}")

    def discard(self) -> None:
        """Empty the batch."""
        self.size = 0

    def logits(self, index: int) -> npt.NDArray[np.float32]:
        """Logits ``[vocab]`` of a batch entry: a view, valid until the next ``run``."""
        return self._view(self._api.llama_get_logits_ith(self._handle, index))

    def embedding(self, index: int) -> npt.NDArray[np.float32]:
        """Last hidden state ``[hidden]`` of a batch entry: a view, valid until the next ``run``."""
        return self._view(self._api.llama_get_embeddings_ith(self._handle, index))

    def _view(self, address: int | None) -> npt.NDArray[np.float32]:
        if not address:
            raise EngineError("llama.cpp gave no output for a token that was asked for")
        row: npt.NDArray[np.float32] = np.frombuffer(
            memoryview(self._row.from_address(address)), np.float32
        )
        return row

    def keep(self, sequence: int, length: int) -> bool:
        """Forget a sequence past ``length``; False where this model's state cannot be cut there."""
        kept: bool = self._api.llama_memory_seq_rm(self._memory, sequence, length, -1)
        return kept

    def share(self, source: int, target: int, length: int) -> None:
        """Give ``target`` the first ``length`` tokens of ``source``: cells are shared if unified,
        else copied.
        """
        self._api.llama_memory_seq_cp(self._memory, source, target, -1, -1)
        self.keep(target, length)

    def close(self) -> None:
        """Free the cache; safe to call twice."""
        handle, self._handle = self._handle, None
        if handle is not None:
            self._api.llama_free(handle)


def _model_params(library: Library, options: LlamaCppOptions, gpu_layers: int) -> ModelParams:
    params: ModelParams = library.api.llama_model_default_params()
    params.n_gpu_layers = gpu_layers
    params.split_mode = SPLIT_MODES[options.split_mode]
    params.main_gpu = options.main_gpu
    params.load_mode = (1 if options.mmap else 0) + (2 if options.mlock else 0)
    if options.tensor_split:
        shares = (ctypes.c_float * 128)(*options.tensor_split)
        params.tensor_split = ctypes.cast(shares, ctypes.POINTER(ctypes.c_float))
    return params


def _context_params(model: Model, options: LlamaCppOptions, kv: KV) -> ContextParams:
    params: ContextParams = model.library.api.llama_context_default_params()
    threads = options.in_force()
    params.n_threads, params.n_threads_batch = threads["threads"], threads["threads_batch"]
    params.type_k, params.type_v = KV_TYPES[kv.k], KV_TYPES[kv.v]
    params.flash_attn_type = -1 if options.flash_attention is None else int(options.flash_attention)
    if options.flash_attention is None and kv.k == kv.v == "f32":
        params.flash_attn_type = 0  # on a CPU it is half as fast over float32 as plain attention
    params.rope_scaling_type = ROPE_SCALING[options.rope_scaling] if options.rope_scaling else -1
    params.rope_freq_base = options.rope_freq_base or 0  # of these, 0 is the model's own
    params.rope_freq_scale = options.rope_freq_scale or 0
    params.yarn_orig_ctx = options.yarn_orig_context or 0
    return params


def prepare(library: Library, options: LlamaCppOptions) -> None:
    """What is set once, before a model is loaded. Raises ``BackendUnavailable`` for a worker."""
    if options.numa:
        library.api.llama_numa_init(NUMA[options.numa])
    for endpoint in options.rpc:
        _add_worker(library, endpoint)


def layer_counts(library: Library, options: LlamaCppOptions, path: Path) -> Iterator[int]:
    """How many layers of ``path`` to put on the GPU: what was asked for, or under ``auto`` all,
    then ever fewer.
    """
    if isinstance(options.gpu_layers, int):
        yield options.gpu_layers
        return
    has_gpu = library.has_gpu
    yield ALL_LAYERS if has_gpu else 0
    if has_gpu and options.gpu_layers == "auto":
        layers = inspect(path).layers or 64
        yield from sorted({layers * eighths // 8 for eighths in range(8)}, reverse=True)


def _add_worker(library: Library, endpoint: str) -> None:
    """Make a machine that runs llama.cpp's rpc-server a device of this one."""
    registry = library.api.ggml_backend_reg_by_name(b"RPC")
    address = registry and library.api.ggml_backend_reg_get_proc_address(
        registry, b"ggml_backend_rpc_add_server"
    )
    if not address:
        raise BackendUnavailable(
            "this build of llama.cpp has no RPC, which rpc= needs; compile one that has: "
            f"CMAKE_ARGS=-DGGML_RPC=on {INSTALL_NATIVE}"
        )
    host, _, port = endpoint.rpartition(":")
    if not host or not port.isdigit():
        raise InvalidRequest(f"rpc takes host:port of workers, not {endpoint!r}")
    try:  # llama.cpp ends the process where nobody listens
        socket.create_connection((host, int(port)), _RPC_TIMEOUT).close()
    except OSError as error:
        raise BackendUnavailable(f"no RPC worker answers at {endpoint}: {error}") from error
    connect = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_char_p)(address)
    worker = connect(endpoint.encode())
    if not worker:
        raise BackendUnavailable(f"the RPC worker at {endpoint} has nothing: {library.errors()}")
    library.api.ggml_backend_register(worker)


def _is_memory(reason: str) -> bool:
    lowered = reason.lower()
    return any(word in lowered for word in ("alloc", "out of memory", "insufficient memory"))


def _load_error(path: Path, reason: str) -> Exception:
    if _is_memory(reason):
        return OutOfMemory(f"{path.name} does not fit into memory: {reason}")
    if "unknown model architecture" in reason or "unsupported" in reason.lower():
        return UnsupportedModel(f"llama.cpp cannot run {path.name}: {reason}")
    return FormatError(f"llama.cpp rejects {path.name}: {reason or 'no reason given'}")
