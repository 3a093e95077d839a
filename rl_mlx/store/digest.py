"""What tells a model from another, without reading its weights."""

from __future__ import annotations

import hashlib
from pathlib import Path

_SMALL = (".json", ".jinja")


def digest(path: Path) -> str:
    """Hexadecimal, of a folder's or a GGUF file's parts: small files by what they hold, weights by
    size and time, as reading them would take too long.
    """
    found = hashlib.sha256()
    for file in _files(path):
        found.update(file.name.encode())
        if file.suffix in _SMALL:
            found.update(file.read_bytes())
        else:
            state = file.stat()
            found.update(f"{state.st_size} {state.st_mtime_ns}".encode())
    return found.hexdigest()


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        return sorted(p for p in path.iterdir() if p.suffix in (*_SMALL, ".safetensors"))
    first, _, rest = path.name.rpartition("-00001-of-")
    return sorted(path.parent.glob(f"{first}-*-of-{rest}")) if first else [path]
