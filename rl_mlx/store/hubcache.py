"""The Hugging Face cache: ``models--org--name/{blobs, refs, snapshots/<commit>}``, read without the
network.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from rl_mlx.errors import InvalidRequest
from rl_mlx.store import places
from rl_mlx.store.models import InstalledModel, first_part, folders, models_in, variants

SOURCE = "huggingface"
_PREFIX = "models--"
_COMMIT = re.compile(r"[0-9a-f]{7,64}")


def installed(repo: str | None = None, revision: str = "main") -> Iterator[InstalledModel]:
    """Models of every cache in this layout, or of one ``repo``, at ``revision``."""
    for cache in dict.fromkeys([places.hub_cache(), *places.llamacpp()]):
        for folder in folders(cache):
            if not folder.name.startswith(_PREFIX):
                continue
            name = folder.name.removeprefix(_PREFIX).replace("--", "/", 1)
            snapshot = _snapshot(folder, revision)
            if snapshot and (repo is None or name.casefold() == repo.casefold()):
                yield from models_in(snapshot, name, SOURCE)


def _snapshot(folder: Path, revision: str) -> Path | None:
    """The snapshot of a branch or a commit; for ``main`` with no ref the newest there is."""
    snapshots = folders(folder / "snapshots")
    try:
        commit = (folder / "refs" / revision).read_text("ascii").strip()
    except (OSError, ValueError):  # no such ref, or it is no text
        commit = revision
    for snapshot in snapshots:
        if snapshot.name == commit and _COMMIT.fullmatch(commit):
            return snapshot
    if revision == "main" and commit == "main" and snapshots:
        return max(snapshots, key=lambda p: p.stat().st_mtime)
    return None


def remove(model: InstalledModel) -> int:
    """Delete a model of this cache; returns the bytes freed.

    Of a GGUF repository only the files of that model go, with the blobs that no other snapshot
    uses. Raises ``InvalidRequest`` for a model that lies elsewhere.
    """
    repo = next((p for p in model.path.parents if p.name == "snapshots"), Path()).parent
    if model.source != SOURCE or not repo.name.startswith(_PREFIX):
        raise InvalidRequest(f"{model.name} is not in the Hugging Face cache")
    before = _size(repo)
    if model.path.is_file():
        for path in _parts(model.path):
            _unlink(path, repo)
    else:
        for path in [p for p in model.path.rglob("*") if not p.is_dir() and _ours(p)]:
            _unlink(path, repo)
    if not any(_is_model_file(path) for path in (repo / "snapshots").rglob("*")):
        shutil.rmtree(repo)
    return before - _size(repo)


def _parts(path: Path) -> list[Path]:
    names = {p.name: p for p in path.parent.iterdir()}
    ours = [v for v in variants(names) if first_part(path).name in v.files]
    return [names[file] for v in ours for file in v.files]


def _ours(path: Path) -> bool:
    return path.suffix.lower() != ".gguf"


def _is_model_file(path: Path) -> bool:
    return path.suffix.lower() in {".gguf", ".safetensors"}


def _unlink(path: Path, repo: Path) -> None:
    """Remove a snapshot's link, and its blob when that was the last link to it."""
    blob = path.resolve()
    path.unlink()
    if blob.parent == (repo / "blobs").resolve():
        links = (p for p in (repo / "snapshots").rglob("*") if p.is_symlink())
        if not any(link.resolve() == blob for link in links):
            blob.unlink(missing_ok=True)


def _size(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file() and not p.is_symlink())
