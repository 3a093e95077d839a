"""The prefix tree's disk tier: what requests left in the tree, kept for the next start.

A file a block, ``PARENT-NAME.safetensors``, in a folder for each model and format; a name is the
digest of all tokens from the beginning on. A thread of its own writes, so that no stream waits for
the disk; files are read before the first request. One that is not whole, or not what was written,
is deleted and never used.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import queue
import threading
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import mlx.core as mx
import numpy as np

from rl_mlx.cache.arena import Piece
from rl_mlx.cache.layers import KVPiece, State
from rl_mlx.cache.prefix import BLOCK, Node, PrefixTree
from rl_mlx.convert.safetensors import SafetensorsFile
from rl_mlx.errors import FormatError, RlMlxError

FORMAT = 2
"""Counted up when the meaning of what is in the files changes."""
_ROOT = "0" * 32
_TYPES: Mapping[mx.Dtype, str] = MappingProxyType(
    {mx.float32: "F32", mx.float16: "F16", mx.bfloat16: "BF16", mx.uint32: "U32"}
)
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Record:
    """A tensor as safetensors has it: its type, its shape and its bytes."""

    dtype: str
    shape: Sequence[int]
    data: memoryview

    @classmethod
    def of(cls, dtype: str, array: mx.array | np.ndarray) -> _Record:
        return cls(dtype, array.shape, memoryview(array))  # type: ignore[arg-type]


@dataclass(frozen=True)
class _File:
    path: Path
    size: int
    used: int

    @property
    def parent(self) -> str:
        return self.path.stem.partition("-")[0]

    @property
    def name(self) -> str:
        return self.path.stem.partition("-")[2]


class DiskTier:
    """Files below ``root``, at most ``limit`` bytes for all models together; the least recently
    used are deleted first. ``keep`` and ``restore`` belong to the device's thread.
    """

    def __init__(self, root: Path, limit: int, **key: object) -> None:
        """``key`` is all that decides what a block holds: weights, types, KV format."""
        words = json.dumps({"format": FORMAT, "block": BLOCK, **key}, sort_keys=True, default=str)
        self._root = root
        self._folder = root / hashlib.sha256(words.encode()).hexdigest()[:32]
        self._limit = limit
        self._can_write = True
        self._paths: queue.SimpleQueue[list[Node[Piece]] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._write_all, name="rl-mlx-disk", daemon=True)
        self._thread.start()

    def restore(self, tree: PrefixTree[Piece], room: int) -> None:
        """Fill an empty tree with at most ``room`` bytes of what was used last."""
        files: defaultdict[str, list[_File]] = defaultdict(list)
        for file in sorted(_files(self._folder.glob("*.safetensors")), key=_age):
            room -= file.size
            if room < 0:
                break
            files[file.parent].append(file)
        waiting = [(tree.root, file) for file in files[_ROOT]]
        found: list[tuple[_File, Node[Piece]]] = []
        while waiting:
            parent, file = waiting.pop()
            try:
                tokens, piece = _read(file)
            except RlMlxError as error:
                log.warning("dropped a block of the prefix cache: %s", error)
                _delete(file.path)
                continue
            node = tree.add(parent, tokens, piece)
            found.append((file, node))
            waiting += [(node, child) for child in files[file.name]]
        for _, node in sorted(found, key=lambda each: each[0].used):
            assert node.parent is not None, "only the root has none"
            tree.find(node.parent, node.tokens)  # as recently used as it was

    def keep(self, node: Node[Piece]) -> None:
        """Have the blocks up to this one written, and noted as used now; waits for nothing."""
        path = []
        while node.parent is not None:
            path.append(node)
            node = node.parent
        if path:
            self._paths.put(path[::-1])

    def close(self) -> None:
        """Write what is still to be written, and join the thread. Safe to call twice."""
        self._paths.put(None)
        self._thread.join()

    def _write_all(self) -> None:
        while (path := self._paths.get()) is not None:
            try:
                if self._write(path):
                    self._prune()
            except OSError as error:
                if self._can_write:
                    log.warning("the prefix cache cannot be written to %s: %s", self._root, error)
                self._can_write = False

    def _write(self, path: list[Node[Piece]]) -> bool:
        """Write what is not there yet, and note that all was used; whether something was new."""
        self._folder.mkdir(0o700, parents=True, exist_ok=True)
        parent, files, is_new = _ROOT, [], False
        for node in path:
            name = _name(parent, node.tokens)
            file = self._folder / f"{parent}-{name}.safetensors"
            if not file.exists():
                piece = node.piece
                if piece is None:  # evicted meanwhile
                    break
                _write(file, _records(node.tokens, piece))
                is_new = True
            files.append(file)
            parent = name
        now = time.time_ns()
        for depth, file in enumerate(files):  # a block is never older than those that need it
            os.utime(file, ns=(now - depth, now - depth))
        return is_new

    def _prune(self) -> None:
        files = sorted(_files(self._root.glob("*/*")), key=_age)
        total = sum(file.size for file in files)
        while total > self._limit and files:
            oldest = files.pop()
            total -= oldest.size
            _delete(oldest.path)


def _age(file: _File) -> int:
    return -file.used


def _files(paths: Iterable[Path]) -> list[_File]:
    found = []
    for path in paths:
        try:
            state = path.stat()
        except OSError:  # deleted by another process meanwhile
            continue
        found.append(_File(path, state.st_size, state.st_mtime_ns))
    return found


def _delete(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        log.warning("the prefix cache cannot delete %s: %s", path, error)


def _name(parent: str, tokens: Sequence[int]) -> str:
    words = np.array(tokens, "<i4").tobytes()
    return hashlib.blake2b(parent.encode() + words, digest_size=16).hexdigest()


def _records(tokens: Sequence[int], piece: Piece) -> dict[str, _Record]:
    """A block's tensors by name; their bytes are not copied."""
    records = {"tokens": _Record.of("I32", np.array(tokens, "<i4"))}
    for i, part in enumerate(piece.layers):
        if part is None:
            records[f"{i}.state.0"] = _Record("U8", (0,), memoryview(b""))
            continue
        if not isinstance(part, KVPiece):
            records.update({f"{i}.state.{j}": _record(p) for j, p in enumerate(part)})
            continue
        kinds = [("keys", part.keys), ("values", part.values)]
        if part.head is not None:
            kinds += [("head_keys", part.head[0]), ("head_values", part.head[1])]
        for kind, planes in kinds:
            records.update({f"{i}.{kind}.{j}": _record(p) for j, p in enumerate(planes)})
    return records


def _record(array: mx.array) -> _Record:
    return _Record.of(_TYPES[array.dtype], array)


def _digest(records: Mapping[str, _Record]) -> bytes:
    digest = hashlib.blake2b(digest_size=32)
    for name, record in sorted(records.items()):
        digest.update(f"{name} {record.dtype} {list(record.shape)} ".encode())
        digest.update(record.data)
    return digest.digest()


def _write(path: Path, records: dict[str, _Record]) -> None:
    """Under a temporary name first, for nobody but the owner: prompts can be read from it."""
    records["digest"] = _Record("U8", (32,), memoryview(_digest(records)))
    header, end = {}, 0
    for name, record in records.items():
        offsets = [end, end + record.data.nbytes]
        header[name] = {"dtype": record.dtype, "shape": record.shape, "data_offsets": offsets}
        end = offsets[1]
    text = json.dumps(header).encode()
    temporary = path.with_name(f"{path.name}.{os.getpid()}.{threading.get_ident()}")
    try:
        opened = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(opened, "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for record in records.values():
                file.write(record.data)
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def _read(file: _File) -> tuple[tuple[int, ...], Piece]:
    """A block's tokens and piece. Raises ``FormatError`` for anything but what was written."""
    source = SafetensorsFile.open(file.path)
    arrays = {name: source.array(name) for name in source.tensors}
    records = {n: _Record.of(source.tensors[n].dtype, a) for n, a in arrays.items()}
    records.pop("digest", None)
    digest, words = arrays.pop("digest", None), arrays.pop("tokens", None)
    if digest is None or words is None or digest.tobytes() != _digest(records):
        raise FormatError(f"{file.path}: not what was written")
    tokens = tuple(words.tolist())
    if _name(file.parent, tokens) != file.name:
        raise FormatError(f"{file.path}: under another block's name")
    layers: dict[int, dict[str, list[mx.array]]] = {}
    for name, array in arrays.items():
        index, kind = name.split(".")[:2]
        loaded = mx.array(array)
        if source.tensors[name].dtype == "BF16":
            loaded = loaded.view(mx.bfloat16)
        layers.setdefault(int(index), {}).setdefault(kind, []).append(loaded)
    source.close()
    piece = Piece(tuple(_layer(layers[i]) for i in range(len(layers))))
    mx.eval(piece.arrays())
    return tokens, piece


def _layer(kinds: Mapping[str, list[mx.array]]) -> KVPiece | State | None:
    if "state" in kinds:
        state = tuple(kinds["state"])
        return state if state[0].size else None
    head = (kinds["head_keys"], kinds["head_values"]) if "head_keys" in kinds else None
    return KVPiece(kinds["keys"], kinds["values"], head)
