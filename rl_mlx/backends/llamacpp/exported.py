"""A folder of safetensors as the GGUF file that llama.cpp reads: written once, then cached."""

from __future__ import annotations

import logging
from pathlib import Path

from rl_mlx.convert import export
from rl_mlx.convert.staging import check_disk
from rl_mlx.store import places
from rl_mlx.store.digest import digest

_FORMAT = 2  # counted up when what the export writes changes
log = logging.getLogger(__name__)


def gguf_of(path: Path) -> Path:
    """``path`` itself if it is a file, else the GGUF file of that folder, exported if it is not
    there.

    Raises what ``export`` raises: ``UnsupportedModel``, ``FormatError``, ``OutOfMemory`` for a full
    disk.
    """
    if not path.is_dir():
        return path
    name = f"{path.resolve().name}-{digest(path)[:16]}-{_FORMAT}.gguf"
    target = places.ours("gguf") / name
    if not target.exists():
        needed = sum(file.stat().st_size for file in path.glob("*.safetensors"))  # about as large
        advice = "make room, or set XDG_CACHE_HOME to a folder elsewhere"
        check_disk(f"{path.name} as GGUF", needed, target.parent, advice)
        log.info("exporting %s to %s, once", path, target)
        export(path, target, force=True, progress=_Logged())
    return target


class _Logged:
    """Progress as log lines, one for every tenth."""

    def __init__(self) -> None:
        self._tenth = 0

    def __call__(self, done: int, total: int) -> None:
        tenth = 10 * done // max(total, 1)
        if tenth > self._tenth:
            self._tenth = tenth
            log.info("exported %d%% of %.1f GB", 10 * tenth, total / 1e9)
