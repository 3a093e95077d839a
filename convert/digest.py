"""What a model's files contain, in one number."""

from __future__ import annotations

import hashlib
import mmap
from collections.abc import Sequence
from pathlib import Path

_AT_ONCE = 4 << 20  # bytes, of whole pages


def digest(files: Sequence[Path]) -> str:
    """SHA-256 of a file, or of the list of its parts' digests, a line each, in hexadecimal."""
    found = [_file_digest(path) for path in files]
    if len(found) == 1:
        return found[0]
    return hashlib.sha256("".join(f"{line}\n" for line in found).encode()).hexdigest()


def _file_digest(path: Path) -> str:
    """Hashed where it is mapped, which saves a copy; pages that were read are given back."""
    hashed = hashlib.sha256()
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        for start in range(0, len(mapped), _AT_ONCE):
            count = min(_AT_ONCE, len(mapped) - start)
            with memoryview(mapped) as view, view[start : start + count] as part:
                hashed.update(part)
            if hasattr(mmap, "MADV_DONTNEED"):
                mapped.madvise(mmap.MADV_DONTNEED, start, count)
    return hashed.hexdigest()
