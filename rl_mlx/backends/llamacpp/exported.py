"""A folder of safetensors as the GGUF file that llama.cpp reads: written once, then cached."""

from __future__ import annotations

import hashlib
import logging
import os
from pathlib import Path

from rl_mlx.convert import export

_FORMAT = b"2"  # counted up when what the export writes changes
log = logging.getLogger(__name__)


def cache_folder() -> Path:
    """``$XDG_CACHE_HOME/rl-mlx/gguf``, else below ``~/.cache``."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base).expanduser() if base else Path.home() / ".cache") / "rl-mlx" / "gguf"


def gguf_of(path: Path) -> Path:
    """``path`` itself if it is a file, else the GGUF file of that folder, exported if it is not
    there.

    Raises what ``export`` raises: ``UnsupportedModel``, ``FormatError``, ``OutOfMemory`` for a full
    disk.
    """
    if not path.is_dir():
        return path
    target = cache_folder() / f"{path.resolve().name}-{_digest(path)}.gguf"
    if not target.exists():
        log.info("exporting %s to %s, once", path, target)
        export(path, target, force=True, progress=_Logged())
    return target


def _digest(folder: Path) -> str:
    """Of the config and tokenizer, and of the size and time of the weights: reading those would
    take too long.
    """
    digest = hashlib.sha256(_FORMAT)
    for file in sorted(
        p for p in folder.iterdir() if p.suffix in {".json", ".safetensors", ".jinja"}
    ):
        digest.update(file.name.encode())
        if file.suffix == ".safetensors":
            state = file.stat()
            digest.update(f"{state.st_size} {state.st_mtime_ns}".encode())
        else:
            digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


class _Logged:
    """Progress as log lines, one for every tenth."""

    def __init__(self) -> None:
        self._tenth = 0

    def __call__(self, done: int, total: int) -> None:
        tenth = 10 * done // max(total, 1)
        if tenth > self._tenth:
            self._tenth = tenth
            log.info("exported %d%% of %.1f GB", 10 * tenth, total / 1e9)
