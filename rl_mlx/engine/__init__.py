"""The engine: token ids in, events out."""

from __future__ import annotations

from rl_mlx.engine.loop import Engine
from rl_mlx.engine.runner import Runner
from rl_mlx.engine.scheduler import Scheduler
from rl_mlx.engine.sequence import Sequence

__all__ = ["Engine", "Runner", "Scheduler", "Sequence"]
