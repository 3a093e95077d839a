"""What only llama.cpp knows: ``LLM(..., backend_options={"gpu_layers": 20})`` on this backend."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from rl_mlx.backends.llamacpp.library import KV_TYPES, NUMA, ROPE_SCALING, SPLIT_MODES
from rl_mlx.errors import InvalidRequest


@dataclass(frozen=True, kw_only=True)
class LlamaCppOptions:
    """How llama.cpp loads and runs a model; a bad or unknown one raises ``InvalidRequest``.

    ``gpu_layers``: how many layers go to the GPU, ``all``, or ``auto`` (as many as fit).
    ``tensor_split``: shares of several GPUs, ``split_mode`` how they share (``layer``, ``row``,
    ``none``), ``main_gpu`` which one works alone. ``threads`` (decode) and ``threads_batch``
    (prefill): None for the physical cores that this process may use. ``batch``: most tokens of one
    step, and of one prefill chunk. ``parallel``: sequences at once. ``unified``: one cache of
    ``context`` tokens for all of them, rather than one each, which is faster; None for one each
    where that takes at most a quarter of the memory. ``flash_attention``: None lets llama.cpp
    choose. ``cache_type_k`` and ``cache_type_v``: ``f32``, ``f16``, ``bf16``, ``q8_0``, ``q5_1``,
    ``q5_0``, ``q4_1``, ``q4_0`` or ``iq4_nl``. ``rope_*`` and ``yarn_orig_context`` stretch the
    context. ``mmap`` and ``mlock``: map the file, lock it in memory. ``numa``: ``distribute``,
    ``isolate``, ``numactl`` or ``mirror``. ``rpc``: ``host:port`` of workers. ``draft_tokens``: the
    most tokens guessed a step.
    """

    gpu_layers: int | Literal["auto", "all"] = "auto"
    tensor_split: tuple[float, ...] = ()
    split_mode: str = "layer"
    main_gpu: int = 0
    threads: int | None = None
    threads_batch: int | None = None
    batch: int = 512
    parallel: int = 8
    unified: bool | None = None
    flash_attention: bool | None = None
    cache_type_k: str | None = None
    cache_type_v: str | None = None
    rope_scaling: str | None = None
    rope_freq_base: float = 0.0
    rope_freq_scale: float = 0.0
    yarn_orig_context: int = 0
    mmap: bool = True
    mlock: bool = False
    numa: str | None = None
    rpc: tuple[str, ...] = ()
    draft_tokens: int = 4

    def __post_init__(self) -> None:
        if self.gpu_layers not in {"auto", "all"} and not _is_count(self.gpu_layers, 0):
            raise InvalidRequest(
                f"gpu_layers must be a number, auto or all, not {self.gpu_layers!r}"
            )
        for name, lowest in _LOWEST.items():
            value = getattr(self, name)
            if value is not None and not _is_count(value, lowest):
                raise InvalidRequest(f"{name} must be at least {lowest}, not {value!r}")
        if self.parallel > _MAX_SEQUENCES:
            raise InvalidRequest(f"parallel must be at most {_MAX_SEQUENCES}, not {self.parallel}")
        for name, known in _CHOICES.items():
            value = getattr(self, name)
            if value is not None and value not in known:
                raise InvalidRequest(f"{name} must be one of {', '.join(known)}, not {value!r}")
        for name in ("tensor_split", "rpc"):
            value = getattr(self, name)
            object.__setattr__(
                self, name, tuple(value.split(",") if isinstance(value, str) else value)
            )

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> LlamaCppOptions:
        """From a table; raises ``InvalidRequest`` for a name that is not known."""
        known = [f.name for f in fields(cls)]
        for name in options:
            if name not in known:
                raise InvalidRequest(
                    f"unknown option {name!r} of llama.cpp; known are {', '.join(known)}"
                )
        return cls(**options)


_MAX_SEQUENCES = 255  # LLAMA_MAX_SEQ less the one that logits and embeddings use
_LOWEST = {
    "batch": 1,
    "parallel": 1,
    "draft_tokens": 1,
    "main_gpu": 0,
    "threads": 1,
    "threads_batch": 1,
    "yarn_orig_context": 0,
}
_CHOICES: dict[str, Mapping[str, int]] = {
    "cache_type_k": KV_TYPES,
    "cache_type_v": KV_TYPES,
    "rope_scaling": ROPE_SCALING,
    "split_mode": SPLIT_MODES,
    "numa": NUMA,
}


def _is_count(value: object, lowest: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= lowest
