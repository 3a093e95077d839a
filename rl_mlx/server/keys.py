"""API keys: read from a file, kept as digests, compared in constant time."""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Iterable
from pathlib import Path

from rl_mlx.errors import InvalidRequest

_DIGEST = re.compile(r"sha256:([0-9a-fA-F]{64})")
LEAST = 16
"""Characters of a key: fewer could be guessed."""


def read_keys(path: Path) -> frozenset[bytes]:
    """Digests of the keys in a file: one a line, as it is or as ``sha256:<hex>``; ``#`` begins a
    comment.

    Raises ``InvalidRequest`` for a file without keys or a key that is too short.
    """
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"cannot read the API keys in {path}: {error}") from error
    found = [text for line in lines if (text := line.partition("#")[0].strip())]
    if not found:
        raise InvalidRequest(f"{path} has no API key; write one a line")
    short = next((n for n, text in enumerate(found, 1) if len(text) < LEAST), None)
    if short is not None:
        raise InvalidRequest(f"key {short} of {path} is shorter than {LEAST} characters")
    return frozenset(map(_digest, found))


def is_key(given: str, keys: Iterable[bytes]) -> bool:
    """Whether ``given`` is one of ``keys``; takes the same time whichever it is."""
    digest = hashlib.sha256(given.encode("utf-8", "surrogatepass")).digest()
    found = [hmac.compare_digest(digest, key) for key in keys]
    return any(found)


def _digest(text: str) -> bytes:
    match = _DIGEST.fullmatch(text)
    return bytes.fromhex(match[1]) if match else hashlib.sha256(text.encode()).digest()
