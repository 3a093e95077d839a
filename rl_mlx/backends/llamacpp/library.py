"""llama.cpp's C API by ctypes, from the library in the ``xllamacpp`` wheel, or in llama-cpp-python
where that was compiled for this machine.

The classes of these bindings are not used: xllamacpp's server loses the ids of tokens that end
inside a UTF-8 character and opens a listener, llama-cpp-python's runs one request at a time.
Layouts follow ``include/llama.h`` of the pinned releases and are checked against the library's own
defaults before anything is passed to it.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.metadata
import importlib.util
import sys
from collections import deque
from collections.abc import Iterator
from ctypes import (
    CFUNCTYPE,
    POINTER,
    Structure,
    c_bool,
    c_char_p,
    c_float,
    c_int32,
    c_size_t,
    c_uint8,
    c_uint32,
    c_uint64,
    c_void_p,
)  # fmt: skip
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rl_mlx.backends.machine import missing_instructions
from rl_mlx.errors import BackendUnavailable

VERSION = "2026.10.11549"
"""The release of xllamacpp (llama.cpp b11549) whose header the structures below follow."""
NATIVE_VERSION = "0.3.36"
"""The release of llama-cpp-python, whose llama.cpp is a few weeks older."""
INSTALL_BINDING = f"install it: pip install xllamacpp=={VERSION}"
INSTALL_NATIVE = "pip install 'rl-mlx[native]'"

# enum ggml_type: the types that a KV cache can have
KV_TYPES = {
    "f32": 0, "f16": 1, "bf16": 30, "q8_0": 8, "q5_1": 7, "q5_0": 6, "q4_1": 3, "q4_0": 2,
    "iq4_nl": 20,
}  # fmt: skip
KV_BYTES = {
    "f32": 4.0, "f16": 2.0, "bf16": 2.0, "q8_0": 34 / 32, "q5_1": 24 / 32, "q5_0": 22 / 32,
    "q4_1": 20 / 32, "q4_0": 18 / 32, "iq4_nl": 18 / 32,
}  # fmt: skip
ROPE_SCALING = {"none": 0, "linear": 1, "yarn": 2, "longrope": 3}
SPLIT_MODES = {"none": 0, "layer": 1, "row": 2}
NUMA = {"distribute": 1, "isolate": 2, "numactl": 3, "mirror": 4}
GPU_KINDS = (1, 2)  # enum ggml_backend_dev_type: a GPU with its own memory, or with the host's
_ERROR, _CONTINUED = 4, 5  # enum ggml_log_level


class ModelParams(Structure):
    """``struct llama_model_params``; the tail is room for fields that may be appended."""

    _fields_ = [
        ("devices", c_void_p),
        ("tensor_buft_overrides", c_void_p),
        ("n_gpu_layers", c_int32),
        ("split_mode", c_int32),
        ("load_mode", c_int32),
        ("lazy_mode", c_int32),
        ("main_gpu", c_int32),
        ("tensor_split", POINTER(c_float)),
        ("progress_callback", c_void_p),
        ("progress_callback_user_data", c_void_p),
        ("kv_overrides", c_void_p),
        ("vocab_only", c_bool),
        ("check_tensors", c_bool),
        ("use_extra_bufts", c_bool),
        ("no_host", c_bool),
        ("no_alloc", c_bool),
        ("load_mtp", c_bool),
        ("tail", c_uint8 * 64),
    ]


class ContextParams(Structure):
    """``struct llama_context_params``."""

    _fields_ = [
        ("n_ctx", c_uint32),
        ("n_batch", c_uint32),
        ("n_ubatch", c_uint32),
        ("n_seq_max", c_uint32),
        ("n_rs_seq", c_uint32),
        ("n_outputs_max", c_uint32),
        ("n_outputs_max_per_seq", c_uint32),
        ("n_threads", c_int32),
        ("n_threads_batch", c_int32),
        ("ctx_type", c_int32),
        ("rope_scaling_type", c_int32),
        ("pooling_type", c_int32),
        ("attention_type", c_int32),
        ("flash_attn_type", c_int32),
        ("rope_freq_base", c_float),
        ("rope_freq_scale", c_float),
        ("yarn_ext_factor", c_float),
        ("yarn_attn_factor", c_float),
        ("yarn_beta_fast", c_float),
        ("yarn_beta_slow", c_float),
        ("yarn_orig_ctx", c_uint32),
        ("defrag_thold", c_float),
        ("cb_eval", c_void_p),
        ("cb_eval_user_data", c_void_p),
        ("type_k", c_int32),
        ("type_v", c_int32),
        ("moe_cache_size", c_size_t),
        ("abort_callback", c_void_p),
        ("abort_callback_data", c_void_p),
        ("embeddings", c_bool),
        ("offload_kqv", c_bool),
        ("no_perf", c_bool),
        ("op_offload", c_bool),
        ("swa_full", c_bool),
        ("kv_unified", c_bool),
        ("samplers", c_void_p),
        ("n_samplers", c_size_t),
        ("ctx_other", c_void_p),
        ("tail", c_uint8 * 64),
    ]


class NativeContextParams(Structure):
    """The same in the release of llama-cpp-python, which lacks one field."""

    _fields_ = [f for f in ContextParams._fields_ if f[0] != "moe_cache_size"]


class Batch(Structure):
    """``struct llama_batch``."""

    _fields_ = [
        ("n_tokens", c_int32),
        ("token", c_void_p),
        ("embd", c_void_p),
        ("pos", c_void_p),
        ("n_seq_id", c_void_p),
        ("seq_id", c_void_p),
        ("logits", c_void_p),
    ]


LogCallback = CFUNCTYPE(None, c_int32, c_char_p, c_void_p)

# name -> (result, *arguments)
_PROTOTYPES: dict[str, tuple[Any, ...]] = {
    "llama_log_set": (None, LogCallback, c_void_p),
    "llama_backend_init": (None,),
    "llama_numa_init": (None, c_int32),
    "llama_print_system_info": (c_char_p,),
    "llama_model_default_params": (ModelParams,),
    "llama_model_load_from_file": (c_void_p, c_char_p, ModelParams),
    "llama_model_free": (None, c_void_p),
    "llama_model_get_vocab": (c_void_p, c_void_p),
    "llama_model_n_ctx_train": (c_int32, c_void_p),
    "llama_model_n_embd": (c_int32, c_void_p),
    "llama_model_n_layer": (c_int32, c_void_p),
    "llama_model_n_head": (c_int32, c_void_p),
    "llama_model_n_head_kv": (c_int32, c_void_p),
    "llama_model_size": (c_uint64, c_void_p),
    "llama_model_n_params": (c_uint64, c_void_p),
    "llama_model_has_encoder": (c_bool, c_void_p),
    "llama_model_is_recurrent": (c_bool, c_void_p),
    "llama_model_is_hybrid": (c_bool, c_void_p),
    "llama_model_meta_val_str": (c_int32, c_void_p, c_char_p, c_char_p, c_size_t),
    "llama_vocab_n_tokens": (c_int32, c_void_p),
    "llama_vocab_get_text": (c_char_p, c_void_p, c_int32),
    "llama_context_default_params": (ContextParams,),
    "llama_init_from_model": (c_void_p, c_void_p, ContextParams),
    "llama_free": (None, c_void_p),
    "llama_n_batch": (c_uint32, c_void_p),
    "llama_get_memory": (c_void_p, c_void_p),
    "llama_memory_clear": (None, c_void_p, c_bool),
    "llama_memory_seq_rm": (c_bool, c_void_p, c_int32, c_int32, c_int32),
    "llama_memory_seq_cp": (None, c_void_p, c_int32, c_int32, c_int32, c_int32),
    "llama_decode": (c_int32, c_void_p, Batch),
    "llama_get_logits_ith": (c_void_p, c_void_p, c_int32),
    "llama_get_embeddings_ith": (c_void_p, c_void_p, c_int32),
    "ggml_backend_dev_count": (c_size_t,),
    "ggml_backend_dev_get": (c_void_p, c_size_t),
    "ggml_backend_dev_name": (c_char_p, c_void_p),
    "ggml_backend_dev_description": (c_char_p, c_void_p),
    "ggml_backend_dev_type": (c_int32, c_void_p),
    "ggml_backend_dev_memory": (None, c_void_p, POINTER(c_size_t), POINTER(c_size_t)),
    "ggml_backend_dev_backend_reg": (c_void_p, c_void_p),
    "ggml_backend_reg_name": (c_char_p, c_void_p),
    "ggml_backend_reg_by_name": (c_void_p, c_char_p),
    "ggml_backend_reg_get_proc_address": (c_void_p, c_void_p, c_char_p),
    "ggml_backend_register": (None, c_void_p),
}  # fmt: skip

# What the pinned release's default parameters hold: a library whose layout moved cannot show all of
# these.
_MODEL_DEFAULTS = {
    "n_gpu_layers": -1, "split_mode": 1, "load_mode": -1, "lazy_mode": 1,
    "main_gpu": 0, "use_extra_bufts": True, "vocab_only": False, "check_tensors": False,
}  # fmt: skip
_CONTEXT_DEFAULTS = {
    "n_ctx": 512, "n_batch": 2048, "n_ubatch": 512, "n_seq_max": 1, "n_outputs_max_per_seq": 1,
    "n_threads": 4, "n_threads_batch": 4, "rope_scaling_type": -1, "pooling_type": -1,
    "attention_type": -1, "flash_attn_type": -1, "yarn_ext_factor": -1.0, "yarn_beta_slow": -1.0,
    "defrag_thold": -1.0, "type_k": 1, "type_v": 1, "embeddings": False, "offload_kqv": True,
    "no_perf": True, "op_offload": True, "swa_full": True, "kv_unified": False,
}  # fmt: skip


@dataclass(frozen=True)
class Binding:
    """A package that brings the library: as it is installed, as it is imported, and where in it the
    library lies. A ``native`` one is compiled where it is installed, so that it fits the CPU.
    """

    package: str
    module: str
    version: str
    files: tuple[str, ...]
    context_params: type[Structure]
    native: bool = False

    def folder(self) -> Path | None:
        """Where it is installed; imports nothing."""
        spec = importlib.util.find_spec(self.module)
        return Path(spec.origin).parent if spec is not None and spec.origin else None

    def installed_version(self) -> str:
        """Its release, without the mark of what it was built for; empty where it has none."""
        try:
            return importlib.metadata.version(self.package).split("+")[0]
        except importlib.metadata.PackageNotFoundError:
            return ""


WHEEL = Binding(
    "xllamacpp", "xllamacpp", VERSION, ("xllamacpp*.so", "xllamacpp*.dylib"), ContextParams
)
NATIVE = Binding(
    "llama-cpp-python", "llama_cpp", NATIVE_VERSION, ("lib/libllama.so", "lib/libllama.dylib"),
    NativeContextParams, native=True,
)  # fmt: skip


class Library:
    """The open library. ``api.llama_decode(...)`` and so on are its functions; ``errors()`` its
    last words.
    """

    def __init__(self, path: Path, binding: Binding) -> None:
        self.path = path
        self.binding = binding
        self._log: deque[str] = deque(maxlen=200)
        self._level = 0
        self.api = ctypes.CDLL(str(path))
        layouts = {ContextParams: binding.context_params}
        for name, (result, *arguments) in _PROTOTYPES.items():
            function = getattr(self.api, name)
            function.restype = layouts.get(result, result)
            function.argtypes = [layouts.get(kind, kind) for kind in arguments]
        self._check_layouts()
        self._callback = LogCallback(self._on_log)  # held: the library keeps only the address
        self.api.llama_log_set(self._callback, None)
        self.api.llama_backend_init()

    def _on_log(self, level: int, text: bytes | None, _data: object) -> None:
        if level != _CONTINUED:
            self._level = level
        if self._level == _ERROR and text:
            self._log.append(text.decode("utf-8", "replace"))

    def _check_layouts(self) -> None:
        for params, expected in (
            (self.api.llama_model_default_params(), _MODEL_DEFAULTS),
            (self.api.llama_context_default_params(), _CONTEXT_DEFAULTS),
        ):
            for name, value in expected.items():
                if getattr(params, name) != value:
                    raise BackendUnavailable(
                        f"{self.binding.package} has another memory layout than its release "
                        f"{self.binding.version} ({name}); {INSTALL_BINDING}"
                    )

    def errors(self) -> str:
        """What was logged as errors since the last call, as one line."""
        text = "".join(self._log)
        self._log.clear()
        return "; ".join(line.strip() for line in text.splitlines() if line.strip())

    @property
    def has_gpu(self) -> bool:
        """Whether a GPU can be used; accelerators of the CPU (BLAS, AMX) are none."""
        return any(device[3] in GPU_KINDS for device in self.devices())

    def devices(self) -> Iterator[tuple[str, str, str, int, int, int]]:
        """(name, description, backend, kind, free bytes, total bytes) of each device; the kind is
        one of ``GPU_KINDS`` or of the CPU.
        """
        api = self.api
        for index in range(api.ggml_backend_dev_count()):
            device = api.ggml_backend_dev_get(index)
            free, total = c_size_t(), c_size_t()
            api.ggml_backend_dev_memory(device, ctypes.byref(free), ctypes.byref(total))
            registry = api.ggml_backend_reg_name(api.ggml_backend_dev_backend_reg(device))
            yield (
                api.ggml_backend_dev_name(device).decode(),
                api.ggml_backend_dev_description(device).decode("utf-8", "replace"),
                registry.decode(),
                api.ggml_backend_dev_type(device),
                free.value,
                total.value,
            )


@functools.cache
def open_library() -> Library:
    """Find, check and open the library, once a process: the native one where it is installed.

    Raises ``BackendUnavailable`` where no binding is there, is another release, cannot be loaded,
    or was built for instructions that this CPU lacks (which would kill the process).
    """
    if sys.platform == "win32":
        raise BackendUnavailable(
            "llama.cpp's wheel for Windows hides the C API; start a llama-server and give its "
            'address (backend="http://127.0.0.1:8080"), or use WSL'
        )
    binding = _installed()
    missing = [] if binding.native else missing_instructions()
    if missing:
        raise BackendUnavailable(
            f"llama.cpp's wheel needs {', '.join(missing)}, which this CPU lacks; compile it for "
            f"this one: {INSTALL_NATIVE}"
        )
    folder = binding.folder()
    assert folder is not None, "it is installed"
    path = next((p for pattern in binding.files for p in folder.glob(pattern)), None)
    if path is None:
        raise BackendUnavailable(f"{binding.package} in {folder} has no library; {INSTALL_BINDING}")
    try:
        return Library(path, binding)
    except (OSError, AttributeError) as error:
        raise BackendUnavailable(_why_not(error)) from error


def _installed() -> Binding:
    """The binding to use. A llama-cpp-python of another release is somebody else's, and let be."""
    if NATIVE.folder() is not None and NATIVE.installed_version() == NATIVE.version:
        return NATIVE
    if WHEEL.folder() is None:
        raise BackendUnavailable(f"llama.cpp's binding is not installed; {INSTALL_BINDING}")
    version = WHEEL.installed_version()
    if version != WHEEL.version:
        raise BackendUnavailable(
            f"xllamacpp {version} is not the tested {VERSION}; {INSTALL_BINDING}"
        )
    return WHEEL


def _why_not(error: Exception) -> str:
    """One line with the fix for a library that will not load."""
    if "libgomp" in str(error):
        return (
            "llama.cpp needs libgomp; install it: apt-get install libgomp1 (or dnf install libgomp)"
        )
    if "GLIBC" in str(error) or "musl" in str(error):
        return f"llama.cpp's wheel does not fit this system's C library: {error}"
    return f"llama.cpp's library cannot be loaded: {error}; {INSTALL_BINDING}"
