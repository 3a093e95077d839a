"""Which quantizations of a model fit this machine, how long a context they leave room for, and how
fast they can be.

Each token takes all active weights and the KV cache through memory once, which bounds the tokens a
second of one stream (Pope et al. 2022, arXiv:2211.05102).
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

import numpy as np

from rl_mlx.backends import machine
from rl_mlx.backends.choice import choose
from rl_mlx.convert.facts import Facts, inspect
from rl_mlx.convert.files import is_weights
from rl_mlx.errors import RlMlxError
from rl_mlx.settings import ModelSettings, parse_memory
from rl_mlx.store import find
from rl_mlx.store.headers import Repository, peek, repository
from rl_mlx.store.hub import HubRef
from rl_mlx.store.models import ModelFiles, siblings

WORK = 300_000_000
"""Bytes for the activations of a step, generously."""
CONTEXT = 8192
"""Tokens, where none are asked for and the model has as many."""
_RAM_SHARE = "75%"  # as the llama.cpp backend takes it
_PLAIN = {"F32", "F16", "BF16"}
_QUANTS = (8, 6, 5, 4, 3, 2)
_OVERHEAD = 0.5  # bits a weight for float16 scales and biases of groups of 64
_SPEEDS = ((30.0, "fast"), (10.0, "as fast as people read"), (3.0, "slow"), (0.0, "very slow"))
# Apple's figures in GB/s; of two of one name the smaller. Processors alone do not reach a GPU's.
_APPLE = MappingProxyType(
    {"Apple M1": 68, "Apple M1 Pro": 200, "Apple M1 Max": 400, "Apple M1 Ultra": 800}
    | {"Apple M2": 100, "Apple M2 Pro": 200, "Apple M2 Max": 400, "Apple M2 Ultra": 800}
    | {"Apple M3": 100, "Apple M3 Pro": 150, "Apple M3 Max": 300, "Apple M3 Ultra": 819}
    | {"Apple M4": 120, "Apple M4 Pro": 273, "Apple M4 Max": 410, "Apple M5": 153}
)  # fmt: skip


@dataclass(frozen=True)
class Fit:
    """One quantization on this machine. Sizes are bytes, ``memory`` is all that is needed.

    ``longest`` is the context that there is room for, in tokens, at most the model's own (None
    where the KV cache's size is not known); ``tokens_per_second`` an upper bound for one stream.
    """

    name: str
    weight_bytes: int
    memory: int
    fits: bool
    longest: int | None
    tokens_per_second: float
    speed: str


@dataclass(frozen=True)
class Survey:
    """A model and its quantizations, by name, with the bytes of their weights.

    ``facts`` are those of one of them.
    """

    name: str
    facts: Facts
    sizes: Mapping[str, int]

    def fits(self, context: int, budget: int, bandwidth: float) -> list[Fit]:
        """Each of them, the largest first, at ``context`` tokens, in ``budget`` bytes."""
        order = sorted(self.sizes.items(), key=lambda item: -item[1])
        return [self._fit(name, size, context, budget, bandwidth) for name, size in order]

    def _fit(self, name: str, size: int, context: int, budget: int, bandwidth: float) -> Fit:
        facts, token = self.facts, self.facts.kv_bytes_per_token
        cache = context * (token or 0)
        needed = size + cache + WORK
        longest = None
        if token:
            room = max(0, budget - size - WORK) // token
            longest = min(room, facts.context or room)
        active = size * facts.active_bytes / max(facts.weight_bytes, 1)
        rate = bandwidth / max(active + cache, 1)
        speed = next(word for least, word in _SPEEDS if rate >= least)
        return Fit(name, size, needed, needed <= budget, longest, rate, speed)


def survey(model: str) -> Survey:
    """Look at a model's headers and list its quantizations: those of a repository on the hub, those
    beside a GGUF file, and of plain floats those that ``rl-mlx convert --quant`` would make.

    Raises what finding and opening it raises. A repository that cannot be asked for may still be
    on this machine.
    """
    found = find(model)
    ref = found if isinstance(found, HubRef) else _repository_of(model)
    if ref is not None:
        try:
            return _of_hub(repository(ref))
        except RlMlxError:
            if isinstance(found, HubRef):
                raise
    assert not isinstance(found, HubRef)
    return _of_files(found)


def _repository_of(model: str) -> HubRef | None:
    return None if Path(model).expanduser().exists() else HubRef.parse(model)


def _of_hub(listed: Repository) -> Survey:
    ref = listed.ref
    sizes = {v.tag: listed.bytes(v.files) for v in listed.variants()}
    folder = "config.json" in listed.sizes and any(map(is_weights, listed.sizes))
    if ref.tag is None and sizes and not folder:
        ref = replace(ref, tag=min(sizes, key=lambda tag: sizes[tag]))
    with peek(replace(listed, ref=ref)) as files:
        facts = inspect(files.path)
    if listed.ref.tag is not None:
        sizes = {files.name.rpartition(":")[2]: facts.weight_bytes}
    return Survey(listed.ref.repo, facts, (_made(facts) if folder and not ref.tag else {}) | sizes)


def _of_files(files: ModelFiles) -> Survey:
    facts = inspect(files.path)
    if files.path.is_dir():
        return Survey(files.name, facts, _made(facts))
    folder = files.path.parent
    sizes = {v.tag: sum((folder / f).stat().st_size for f in v.files) for v in siblings(files.path)}
    return Survey(files.name, facts, sizes or {"as it is": facts.weight_bytes})


def _made(facts: Facts) -> dict[str, int]:
    """A folder as it is, and where it holds plain floats what ``--quant`` would make of it."""
    made = {"as it is": facts.weight_bytes}
    if set(facts.types) <= _PLAIN:
        made |= {f"q{n}": int(facts.parameters * (n + _OVERHEAD) / 8) for n in _QUANTS}
    return made


def budget(memory: str | None) -> int:
    """Bytes that models may take here, as the backend that ``auto`` chooses has it; raises
    ``InvalidRequest`` for a size that is none.
    """
    total = machine.memory_total()
    if memory is None and choose(ModelSettings()).names[0] == "mlx":
        from rl_mlx.cache.governor import MLXDevice  # noqa: PLC0415 - MLX may not be installed

        device = MLXDevice(total)
        return int(device.capacity() * device.share())
    return parse_memory(memory or _RAM_SHARE, total)


def bandwidth() -> float:
    """Bytes a second through memory: Apple's figure for its chip, else by copying some now."""
    known = _APPLE.get(machine.cpu_name())
    return known * 1e9 if known else _copied()


def _copied(size: int = 1 << 26, rounds: int = 3) -> float:
    """Bytes read and written a second by copying ``size`` on all cores, the best of ``rounds``."""
    threads = min(8, machine.physical_cores())
    sources = [np.ones(size // threads, np.uint8) for _ in range(threads)]
    targets = [np.zeros_like(source) for source in sources]
    best = math.inf
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(rounds):
            start = time.perf_counter()
            list(pool.map(np.copyto, targets, sources))
            best = min(best, time.perf_counter() - start)
    return 2 * sum(source.nbytes for source in sources) / best
