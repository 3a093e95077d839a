"""The digest of a model's files."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest

from rl_mlx.convert import digest as module
from rl_mlx.convert.digest import digest


@pytest.mark.parametrize("size", [1, 65535, 65536, 65537, 200_000])
def test_a_file_is_hashed_whole(size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_AT_ONCE", 1 << 16)
    path = tmp_path / "model"
    path.write_bytes(np.random.default_rng(0).bytes(size))
    assert digest([path]) == hashlib.sha256(path.read_bytes()).hexdigest()


def test_parts_are_a_list_of_digests(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("one", "two")]
    for path in paths:
        path.write_text(path.name)
    lines = "".join(hashlib.sha256(p.read_bytes()).hexdigest() + "\n" for p in paths)
    assert digest(paths) == hashlib.sha256(lines.encode()).hexdigest()
