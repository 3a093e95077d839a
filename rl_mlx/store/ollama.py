"""Ollama's store, read in place: a manifest names the blob that is the GGUF file."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from rl_mlx.convert.files import read_json
from rl_mlx.errors import FormatError, InvalidRequest, ModelNotFound, UnsupportedModel
from rl_mlx.store import places
from rl_mlx.store.models import InstalledModel, folders

PREFIX = "ollama:"
SOURCE = "ollama"
_HOST, _NAMESPACE, _TAG = "registry.ollama.ai", "library", "latest"
_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._:-]{0,255}")
_DIGEST = re.compile(r"sha256[:-]([0-9a-f]{64})")
_LAYER = "application/vnd.ollama.image."


def find(name: str) -> InstalledModel | None:
    """The model that Ollama calls ``name`` (``[host/][namespace/]model[:tag]``); None where it has
    none.

    Raises ``FormatError`` for a damaged manifest, ``ModelNotFound`` where its blob is missing,
    ``UnsupportedModel`` for a model stored as loose tensors, ``InvalidRequest`` for a name that is
    no name.
    """
    path = _manifest(name)
    return _read(path, name) if path.is_file() else None


def is_name(text: str) -> bool:
    """True for what Ollama could call a model."""
    try:
        _manifest(text)
    except InvalidRequest:
        return False
    return True


def installed() -> Iterator[InstalledModel]:
    """Every model of the store that can be run; damaged ones are left out."""
    root = places.ollama() / "manifests"
    for host in folders(root):
        for namespace in folders(host):
            for model in folders(namespace):
                for path in sorted(p for p in model.iterdir() if p.is_file()):
                    try:
                        yield _read(path, _short(path))
                    except (FormatError, ModelNotFound, UnsupportedModel):
                        continue


def _manifest(name: str) -> Path:
    *owner, last = name.split("/")
    model, _, tag = last.partition(":")
    host, namespace = ([_HOST, _NAMESPACE][: 2 - len(owner)] + owner)[:2]
    parts = (host, namespace, model, tag or _TAG)
    if len(owner) > 2 or not all(_PART.fullmatch(p) and ".." not in p for p in parts):
        raise InvalidRequest(f"{name!r} is no Ollama name; they look like llama3.1:8b")
    return places.ollama().joinpath("manifests", *parts)


def _short(path: Path) -> str:
    """The name as ``ollama list`` prints it."""
    host, namespace, model, tag = path.parts[-4:]
    owner = [] if (host, namespace) == (_HOST, _NAMESPACE) else [namespace]
    return "/".join([*([] if host == _HOST else [host]), *owner, f"{model}:{tag}"])


def _read(path: Path, name: str) -> InstalledModel:
    layers = read_json(path).get("layers")
    if not isinstance(layers, list) or not all(isinstance(layer, dict) for layer in layers):
        raise FormatError(
            f"the Ollama manifest {path} is damaged; repair it by: ollama pull {name}"
        )
    kinds = {str(layer.get("mediaType")).removeprefix(_LAYER): layer for layer in layers}
    if "model" not in kinds:
        raise UnsupportedModel(
            f"Ollama keeps {name} as loose tensors, or not at all; use its Hugging Face repository"
        )
    match = _DIGEST.fullmatch(str(kinds["model"].get("digest")))
    if match is None:
        raise FormatError(f"the Ollama manifest {path} names no sha256 blob; ollama pull {name}")
    blobs = places.ollama() / "blobs"
    for blob in (blobs / f"sha256-{match[1]}", blobs / f"sha256:{match[1]}"):
        if blob.is_file():
            return InstalledModel(PREFIX + name, blob, SOURCE, blob.stat().st_size)
    raise ModelNotFound(f"Ollama's file for {name} is missing; get it again by: ollama pull {name}")
