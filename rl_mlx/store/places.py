"""Where models lie on this machine: the folders of each program, from its own environment
variables.
"""

from __future__ import annotations

import os
from pathlib import Path


def hub_cache() -> Path:
    """Hugging Face: ``$HF_HUB_CACHE``, else ``$HF_HOME/hub``, else ``~/.cache/huggingface/hub``."""
    if path := os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE"):
        return Path(path).expanduser()
    if home := os.environ.get("HF_HOME"):
        return Path(home).expanduser() / "hub"
    return _cache() / "huggingface" / "hub"


def ollama() -> Path:
    """Ollama: ``$OLLAMA_MODELS``, else ``~/.ollama/models``."""
    path = os.environ.get("OLLAMA_MODELS")
    return Path(path).expanduser() if path else Path.home() / ".ollama" / "models"


def lmstudio() -> Path:
    """LM Studio: the home its pointer file names, else ``~/.cache/lm-studio`` or ``~/.lmstudio``;
    in it ``models``.
    """
    home = Path.home()
    try:
        named = (home / ".lmstudio-home-pointer").read_text("utf-8").strip()
    except (OSError, UnicodeDecodeError):
        named = ""
    old = home / ".cache" / "lm-studio"
    root = Path(named) if named else old if old.is_dir() else home / ".lmstudio"
    return root / "models"


def llamacpp() -> list[Path]:
    """llama.cpp: ``$LLAMA_CACHE``, and the folders it used by default before it took Hugging
    Face's.
    """
    path = os.environ.get("LLAMA_CACHE")
    named = [Path(path).expanduser()] if path else []
    library = Path.home() / "Library" / "Caches" / "llama.cpp"
    return list(dict.fromkeys([*named, library, _cache() / "llama.cpp"]))


def ours(name: str) -> Path:
    """rl-mlx itself: ``$XDG_CACHE_HOME/rl-mlx/NAME``, else below ``~/.cache``."""
    return _cache() / "rl-mlx" / name


def _cache() -> Path:
    path = os.environ.get("XDG_CACHE_HOME")
    return Path(path).expanduser() if path else Path.home() / ".cache"
