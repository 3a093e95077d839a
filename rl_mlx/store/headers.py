"""The headers of a model on the hub, fetched by byte ranges: to look at it without its weights."""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

from rl_mlx.convert.files import is_weights
from rl_mlx.convert.gguf.header import read_header
from rl_mlx.convert.safetensors import MAX_HEADER
from rl_mlx.errors import FormatError, RlMlxError
from rl_mlx.store.hub import HubRef, choose, explained
from rl_mlx.store.models import ModelFiles, Variant, variants

_FIRST = 1 << 19  # bytes asked for at first: most safetensors headers, small GGUF ones
_GROWTH = 4
_LARGEST = 1 << 27  # of a GGUF header; vocabularies of 256,000 tokens take 15 MB
_WHOLE = 1 << 20  # other files are fetched whole, up to this size


@dataclass(frozen=True)
class Repository:
    """A repository on the hub: its files and their sizes in bytes, at one commit."""

    ref: HubRef
    sizes: Mapping[str, int]

    def variants(self) -> list[Variant]:
        """The GGUF models in it that are whole."""
        return [v for v in variants(self.sizes) if v.complete]

    def bytes(self, files: tuple[str, ...]) -> int:
        """What some of its files take together."""
        return sum(self.sizes[name] for name in files)


def repository(ref: HubRef) -> Repository:
    """List a repository; raises what ``hub.download`` raises for one that is not to be had."""
    from huggingface_hub import HfApi  # noqa: PLC0415 - it costs 0.2 s

    with explained(ref):
        api = HfApi(endpoint=os.environ.get("HF_ENDPOINT"), library_name="rl-mlx")
        info = api.model_info(ref.repo, revision=ref.revision, files_metadata=True)
    sizes = {f.rfilename: f.size or 0 for f in info.siblings or []}
    return Repository(replace(ref, revision=info.sha or ref.revision), sizes)


@contextmanager
def peek(found: Repository) -> Iterator[ModelFiles]:
    """The model that ``found.ref`` names, in a folder of its own that is gone at the end.

    Its files are as long as the real ones, but hold the headers only; the rest is holes that take
    no room. Raises ``ModelNotFound`` for what is not there, ``FormatError`` for a broken header,
    ``RlMlxError`` for a network that fails or a server that gives no ranges.
    """
    name, files = choose(found.sizes, found.ref)
    with tempfile.TemporaryDirectory(prefix="rl-mlx-") as folder, explained(found.ref):
        for file in files:
            path = Path(folder, file)
            path.parent.mkdir(parents=True, exist_ok=True)
            remote = _Remote(found.ref, file, found.sizes[file], path)
            if file.lower().endswith(".gguf"):
                remote.gguf()
            elif is_weights(file):
                remote.safetensors()
            elif remote.size <= _WHOLE:
                remote.fetch(remote.size)
        first = Path(folder, files[0])
        yield ModelFiles(name, first if first.suffix.lower() == ".gguf" else first.parent)


class _Remote:
    """A file on the hub, of which ``path`` holds the first bytes."""

    def __init__(self, ref: HubRef, file: str, size: int, path: Path) -> None:
        from huggingface_hub import hf_hub_url  # noqa: PLC0415 - as above

        self.size = size
        self._name = f"{ref}: {file}"
        self._path = path
        self._have = 0
        endpoint = os.environ.get("HF_ENDPOINT")
        self._url = hf_hub_url(ref.repo, file, revision=ref.revision, endpoint=endpoint)

    def safetensors(self) -> None:
        """Fetch the header; what it says is checked by whoever opens the file."""
        self.fetch(_FIRST)
        with self._path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
        if length <= MAX_HEADER:
            self.fetch(8 + length)

    def gguf(self) -> None:
        """Fetch ever more until the header is whole: its length is nowhere written."""
        wanted = _FIRST
        while True:
            self.fetch(wanted)
            if self._have == self.size or self._is_whole() or wanted >= _LARGEST:
                return
            wanted *= _GROWTH

    def _is_whole(self) -> bool:
        """Whether all up to the first tensor is here. Beyond lie zeros, which may well parse."""
        with self._path.open("rb") as file:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        if data[:4] != b"GGUF":
            return True  # whoever opens it says what it is
        try:
            tensors = read_header(self._path, data).tensors
        except FormatError:
            return False
        return bool(tensors) and min(t.offset for t in tensors) <= self._have

    def fetch(self, end: int) -> None:
        """Bring the file up to byte ``end``, or all of it where that is less."""
        hub: Any = import_module("huggingface_hub.utils")  # Any: its names are not re-exported
        end = min(end, self.size)
        with self._path.open("r+b" if self._have else "wb") as file:
            file.truncate(self.size)
            if end <= self._have:
                return
            headers = hub.build_hf_headers(library_name="rl-mlx")
            headers["Range"] = f"bytes={self._have}-{end - 1}"
            with hub.get_session().stream("GET", self._url, headers=headers) as answer:
                hub.hf_raise_for_status(answer)
                if answer.status_code != 206 and end - self._have < self.size:
                    raise RlMlxError(
                        f"{self._name}: the server gives whole files only, no headers; "
                        "rl-mlx pull downloads the model"
                    )
                file.seek(self._have)
                for piece in answer.iter_bytes():
                    self._have += file.write(piece[: end - self._have])
        if self._have < end:
            raise RlMlxError(f"{self._name}: the server sent less than was asked for; try again")
