"""Open a model on disk, whatever its format."""

from __future__ import annotations

import re
from pathlib import Path

from rl_mlx.convert.folder import FolderWeights
from rl_mlx.convert.gguf.weights import GGUFWeights
from rl_mlx.convert.weights import Weights
from rl_mlx.errors import FormatError, ModelNotFound

_LATER_PART = re.compile(r".*-(?!00001)\d{5}-of-\d{5}\.gguf", re.IGNORECASE)


def open_weights(path: Path | str) -> Weights:
    """The weights of a GGUF file, a Hugging Face or MLX folder, or a folder with one GGUF model.

    Only headers are read. Raises ``ModelNotFound`` where there is nothing, ``FormatError`` where
    the file or folder is no model or damaged, and ``UnsupportedModel`` where nobody here runs it.
    """
    path = Path(path)
    if path.is_dir():
        return _open_folder(path)
    if path.suffix == ".safetensors" and path.is_file():
        raise FormatError(f"{path}: a part of a model; give its folder, {path.parent}")
    return GGUFWeights(path)


def _open_folder(path: Path) -> Weights:
    if (path / "config.json").exists():
        return FolderWeights(path)
    found = sorted(p for p in path.iterdir() if _is_model(p))
    if len(found) == 1:
        return GGUFWeights(found[0])
    if found:
        names = ", ".join(p.name for p in found[:5])
        raise FormatError(f"{path}: holds {len(found)} models; give one of its files: {names}")
    raise ModelNotFound(f"{path}: the folder holds neither a config.json nor a GGUF file")


def _is_model(path: Path) -> bool:
    """Whether ``path`` is a GGUF file that is no later part of one and no projector of images."""
    name = path.name
    return (
        path.suffix.lower() == ".gguf"
        and not _LATER_PART.fullmatch(name)
        and not name.lower().startswith("mmproj")
    )
