"""The built-in demo model: a small chat model, its draft model, and the script that trains both.

``demo_path()`` and ``draft_path()`` are GGUF files inside the package;
``python -m rl_mlx.demo.train`` makes them.
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

__all__ = ["demo_path", "draft_path"]


def demo_path() -> Path:
    """The demo model, a Q8_0 GGUF file."""
    return Path(str(files(__name__) / "demo.gguf"))


def draft_path() -> Path:
    """The draft model for the demo model: same tokenizer, a sixth of the weights, Q8_0."""
    return Path(str(files(__name__) / "draft.gguf"))
