"""llama.cpp's old download folder, read in place: flat ``<user>_<repo>_<file>.gguf``.

What it downloads since 2026 lies in the Hugging Face layout, which ``hubcache`` reads.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from rl_mlx.store import places
from rl_mlx.store.models import InstalledModel, Variant, variants

SOURCE = "llama.cpp"


def installed(repo: str | None = None) -> Iterator[InstalledModel]:
    """Its models by their file names, or those of one hub repository as ``org/repo:TAG``.

    Where the user's name ends cannot be told from the file, so a listing keeps the whole name.
    """
    for folder in places.llamacpp():
        sizes = _sizes(folder)
        if repo is None:
            found = [(v.stem, v) for v in variants(sizes)]
        else:
            prefix = repo.replace("/", "_").casefold() + "_"
            mine = [name for name in sizes if name.casefold().startswith(prefix)]
            found = [(f"{repo}:{v.tag}", v) for v in variants(mine)]
        yield from (_model(name, v, folder, sizes) for name, v in found if v.complete)


def _sizes(folder: Path) -> dict[str, int]:
    try:
        return {p.name: p.stat().st_size for p in sorted(folder.iterdir()) if p.is_file()}
    except OSError:
        return {}


def _model(name: str, variant: Variant, folder: Path, sizes: dict[str, int]) -> InstalledModel:
    size = sum(sizes[file] for file in variant.files)
    return InstalledModel(name, folder / variant.files[0], SOURCE, size)
