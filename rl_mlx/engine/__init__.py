"""The engine: token ids in, events out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rl_mlx.engine.scheduler import Scheduler
from rl_mlx.engine.sequence import Sequence

if TYPE_CHECKING:
    from rl_mlx.engine.loop import Engine
    from rl_mlx.engine.runner import Runner

__all__ = ["Engine", "Runner", "Scheduler", "Sequence"]


def __getattr__(name: str) -> Any:
    # Hosts without mlx use the pure parts alone.
    if name == "Engine":
        from rl_mlx.engine.loop import Engine  # noqa: PLC0415

        return Engine
    if name == "Runner":
        from rl_mlx.engine.runner import Runner  # noqa: PLC0415

        return Runner
    raise AttributeError(f"module 'rl_mlx.engine' has no attribute {name!r}")
