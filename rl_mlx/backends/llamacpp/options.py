"""What only llama.cpp knows: ``LLM(..., backend_options={"gpu_layers": 20})`` on this backend."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal

from rl_mlx.backends.llamacpp.library import KV_TYPES, NUMA, ROPE_SCALING, SPLIT_MODES
from rl_mlx.backends.machine import physical_cores
from rl_mlx.errors import InvalidRequest
from rl_mlx.settings import ModelSettings


@dataclass(frozen=True, kw_only=True)
class LlamaCppOptions:
    """How llama.cpp loads and runs a model; a bad or unknown one raises ``InvalidRequest``.

    ``gpu_layers``: how many layers go to the GPU, ``all``, or ``auto`` (as many as fit).
    ``tensor_split``: shares of several GPUs, ``split_mode`` how they share (``layer``, ``row``,
    ``none``), ``main_gpu`` which one works alone. ``threads`` (decode) and ``threads_batch``
    (prefill): None for the physical cores that this process may use. ``batch``: most tokens of one
    step, and of one prefill chunk. ``unified``: one cache of
    ``context`` tokens for all of them, rather than one each, which is faster; None for one each
    where that takes at most a quarter of the memory. ``flash_attention``: None lets llama.cpp
    choose. ``cache_type_k`` and ``cache_type_v``: ``f32``, ``f16``, ``bf16``, ``q8_0``, ``q5_1``,
    ``q5_0``, ``q4_1``, ``q4_0`` or ``iq4_nl``. ``rope_*`` and ``yarn_orig_context`` stretch the
    context. ``mmap`` and ``mlock``: map the file, lock it in memory. ``numa``: ``distribute``,
    ``isolate``, ``numactl`` or ``mirror``. ``rpc``: ``host:port`` of workers.
    """

    gpu_layers: int | Literal["auto", "all"] = "auto"
    tensor_split: tuple[float, ...] = ()
    split_mode: str = "layer"
    main_gpu: int = 0
    threads: int | None = None
    threads_batch: int | None = None
    batch: int = 512
    unified: bool | None = None
    flash_attention: bool | None = None
    cache_type_k: str | None = None
    cache_type_v: str | None = None
    rope_scaling: str | None = None
    rope_freq_base: float | None = None
    rope_freq_scale: float | None = None
    yarn_orig_context: int | None = None
    mmap: bool = True
    mlock: bool = False
    numa: str | None = None
    rpc: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.gpu_layers not in {"auto", "all"} and not _is_count(self.gpu_layers, 0):
            raise InvalidRequest(
                f"gpu_layers must be a number, auto or all, not {self.gpu_layers!r}"
            )
        for name, lowest in _LOWEST.items():
            value = getattr(self, name)
            if value is not None and not _is_count(value, lowest):
                raise InvalidRequest(f"{name} must be at least {lowest}, not {value!r}")
        for name, known in _CHOICES.items():
            value = getattr(self, name)
            if value is not None and value not in known:
                raise InvalidRequest(f"{name} must be one of {', '.join(known)}, not {value!r}")
        for name, or_none in _SWITCHES.items():
            value = getattr(self, name)
            if not isinstance(value, bool) and not (or_none and value is None):
                raise InvalidRequest(f"{name} must be true or false, not {value!r}")
        for name in ("rope_freq_base", "rope_freq_scale"):
            value = getattr(self, name)
            object.__setattr__(self, name, None if value is None else _number(name, value))
        shares = (_number("tensor_split", share) for share in _parts(self.tensor_split))
        object.__setattr__(self, "tensor_split", tuple(shares))
        object.__setattr__(self, "rpc", tuple(str(worker) for worker in _parts(self.rpc)))

    def in_force(self) -> dict[str, Any]:
        """The options as they will be, with the threads of this machine; None where llama.cpp or
        the model decides.
        """
        threads = self.threads or physical_cores()
        batch = self.threads_batch or threads
        return asdict(replace(self, threads=threads, threads_batch=batch))

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


def in_force(settings: ModelSettings) -> dict[str, Any]:
    """The options that ``settings`` and this machine make, for people to see; none where the
    settings name another backend, whose options they then are.
    """
    if settings.backend not in {"auto", "llama.cpp"}:
        return {}
    return LlamaCppOptions.of(settings.backend_options).in_force()


_LOWEST = {
    "batch": 1,
    "main_gpu": 0,
    "threads": 1,
    "threads_batch": 1,
    "yarn_orig_context": 1,
}
_CHOICES: dict[str, Mapping[str, int]] = {
    "cache_type_k": KV_TYPES,
    "cache_type_v": KV_TYPES,
    "rope_scaling": ROPE_SCALING,
    "split_mode": SPLIT_MODES,
    "numa": NUMA,
}


_SWITCHES = {"unified": True, "flash_attention": True, "mmap": False, "mlock": False}


def _number(name: str, value: object) -> float:
    """``value``, or the number that a text such as ``0.5`` is."""
    try:
        number = float(value) if isinstance(value, (int, float, str)) else math.nan
    except ValueError:
        number = math.nan
    if isinstance(value, bool) or not 0 <= number < math.inf:
        raise InvalidRequest(f"{name} must be a number from 0 up, not {value!r}")
    return number


def _parts(value: object) -> Sequence[object]:
    """What a text has between its commas; a list, or a single value, as it is."""
    if isinstance(value, str):
        return value.split(",")
    return value if isinstance(value, (list, tuple)) else (value,)


def _is_count(value: object, lowest: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= lowest
