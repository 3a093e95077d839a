"""Memory: how much there is for weights, arena, prefix tree and scratch, and the device limits that
go with it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import mlx.core as mx

from rl_mlx.errors import OutOfMemory

_GPU_SHARE = 0.9  # of what a GPU can hold at once; the rest is the system's and the display's
_RAM_SHARE = 0.75
_CACHE_SHARE = 0.05  # of the budget, for buffers that MLX keeps for reuse


class Device(Protocol):
    """What is asked of a device; simulated in tests."""

    def capacity(self) -> int:
        """Bytes that may be in use at once without swapping."""

    def share(self) -> float:
        """The part of it that is ours unless somebody says otherwise."""

    def set_limits(self, wired: int, cached: int) -> tuple[int, int]:
        """Set how much stays wired and how much MLX may keep for reuse; returns what was set
        before.
        """


class MLXDevice:
    """The device MLX runs on."""

    def __init__(self, ram: int) -> None:
        """``ram``: bytes of main memory that this process may use."""
        self._ram = ram
        self._info = mx.device_info()

    def capacity(self) -> int:
        """The GPU's recommended working set on Apple Silicon, its memory on CUDA, else RAM."""
        for key in ("max_recommended_working_set_size", "total_memory"):
            if key in self._info:
                return int(self._info[key])
        return self._ram

    def share(self) -> float:
        """More of a GPU's own figure than of all RAM."""
        return _RAM_SHARE if self.capacity() == self._ram else _GPU_SHARE

    def set_limits(self, wired: int, cached: int) -> tuple[int, int]:
        """Wired memory is Metal's alone."""
        before = mx.set_wired_limit(wired) if mx.metal.is_available() else 0
        return before, mx.set_cache_limit(cached)


@dataclass
class Governor:
    """The budget and who has which part of it, in bytes. Nothing is allocated past it."""

    device: Device
    budget: int
    weights: int
    scratch: int = 0

    def check_weights(self, name: str) -> None:
        """Raises ``OutOfMemory`` where the weights alone would pass the budget."""
        if self.weights + self.scratch > self.budget:
            raise OutOfMemory(
                f"{name} needs {self.weights / 1e9:.1f} GB for its weights and "
                f"{self.scratch / 1e9:.1f} GB to work; the budget is {self.budget / 1e9:.1f} GB "
                "(set memory= or --memory, or take a smaller quantization)"
            )

    @property
    def room(self) -> int:
        """What arena and prefix tree may take together."""
        return max(0, self.budget - self.weights - self.scratch)

    def make_room(self, arena: int, tree: int, evict: Callable[[int], int]) -> bool:
        """Whether an arena of ``arena`` bytes fits beside a tree of ``tree``, which ``evict`` may
        cut.

        ``evict(limit)`` brings the tree to at most ``limit`` bytes if it can; returns what is left.
        """
        if arena + tree > self.room:
            tree = evict(max(0, self.room - arena))
        return arena + tree <= self.room

    def limit_device(self) -> Callable[[], None]:
        """Set the device's limits for this budget; the function returned puts the old ones back."""
        before = self.device.set_limits(self.budget, int(self.budget * _CACHE_SHARE))

        def put_back() -> None:
            self.device.set_limits(*before)

        return put_back
