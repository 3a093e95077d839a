"""Where the chat remembers what was typed."""

from __future__ import annotations

import os
from pathlib import Path


def history_path() -> Path:
    """``$XDG_STATE_HOME/rl-mlx/history``, else below ``~/.local/state``."""
    state = os.environ.get("XDG_STATE_HOME")
    base = Path(state) if state else Path.home() / ".local" / "state"
    return base / "rl-mlx" / "history"
