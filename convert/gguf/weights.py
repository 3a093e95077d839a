"""A GGUF file as weights in canonical names and layouts."""

from __future__ import annotations

import math
import re
from pathlib import Path

import numpy as np
import numpy.typing as npt

from rl_mlx.convert import layout
from rl_mlx.convert.families import FAMILIES
from rl_mlx.convert.gguf.blocks import block
from rl_mlx.convert.gguf.changes import moved
from rl_mlx.convert.gguf.config import gguf_config
from rl_mlx.convert.gguf.mapping import change, moved_columns
from rl_mlx.convert.gguf.names import gguf_names
from rl_mlx.convert.gguf.reader import GGUFFile
from rl_mlx.convert.gguf.repack import container, repack
from rl_mlx.convert.gguf.rope import FREQS, LONGROPE
from rl_mlx.convert.gguf.types import GGMLType
from rl_mlx.convert.weights import Dense, FloatType, Tensor, Weights
from rl_mlx.errors import FormatError

_BLOCK = re.compile(r"blk\.(\d+)\.")
_DERIVED = re.compile(r"blk\.\d+\.attn_rot_embd\.\w+|.*rotary_emb\.inv_freq")


def squeezed(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A shape without its axes of 1."""
    return tuple(n for n in shape if n != 1)


class GGUFWeights(Weights):
    """The weights of a GGUF file, in one part or many.

    What the file changes in a tensor (``mapping.change``) is undone. Where it scales its rotary
    frequencies in a way that no config can say, there is a tensor ``rope_freqs.weight``, float32
    ``[dims / 2]``, by which the base frequencies are divided.
    """

    def __init__(self, path: Path) -> None:
        """Open ``path`` by its header; raises what ``GGUFFile.open`` and ``gguf_config`` raise.

        Raises ``FormatError`` too where the tensors are not those that the metadata asks for.
        """
        self.path = path
        self._file = file = GGUFFile.open(path)
        self.config = gguf_config(file)
        try:
            self._expected = layout.layout(self.config, len(file.tensors))
        except FormatError as error:
            raise FormatError(f"{path}: {error}") from error
        kind = self.config["rope_parameters"].get("rope_type")
        self._derived = {*LONGROPE, FREQS} if kind == "llama3" else {*LONGROPE}
        if FREQS in file.tensors and kind == "default":
            self._expected[FREQS] = (self.config["head_dim"] // 2,)
        self._changes = {
            name: found for name in self._expected if (found := change(self.config, name))
        }
        self._sources = gguf_names(self.config["model_type"], self._expected, file.tensors)
        self._use_older()
        self._check()

    def names(self) -> list[str]:
        """See ``Weights``."""
        return list(self._expected)

    def shape(self, name: str) -> tuple[int, ...]:
        """See ``Weights``."""
        return self._expected[name]

    def nbytes(self, name: str, *, exact: bool = False) -> int:
        """See ``Weights``."""
        shape = self._expected[name]
        info = self._file.tensors[self._sources[name]]
        made = container(info.type, info.shape[-1])
        decoded = self._is_decoded(name) or (exact and not made.exact)
        return 4 * math.prod(shape) if decoded else made.nbytes(shape)

    def load(self, name: str, scales: FloatType = "float32", *, exact: bool = False) -> Tensor:
        """See ``Weights``. Plain floats that need no change are views of the file.

        Raises ``UnsupportedModel`` for a tensor type that is not supported.
        """
        info = self._file.tensors[self._sources[name]]
        shape, done = self._expected[name], self._changes.get(name)
        if self._is_decoded(name):
            return Dense(self._decoded(name), "float32")
        raw = self._file.raw(self._sources[name])
        if done is not None and done.rows is not None:
            rows = self._file_rows(name)
            raw = raw.reshape(rows, -1)[done.places(0, rows // done.unit * len(done.rows))]
            raw = raw if shape[-1] == 1 else raw.reshape(*shape[:-1], -1)
        if exact and not container(info.type, info.shape[-1]).exact:
            return Dense(block(info.type).decode(raw).reshape(shape), "float32")
        tensor = repack(raw, info.type, scales)
        if done is not None and done.columns is not None:
            tensor = moved_columns(tensor, done.columns)
        if isinstance(tensor, Dense):  # the file may have another shape
            return Dense(tensor.array.reshape(shape), tensor.dtype)
        return tensor

    @property
    def files(self) -> tuple[Path, ...]:
        """The file, or all its parts."""
        return self._file.paths

    def type(self, name: str) -> GGMLType:
        """The type that a tensor has in the file."""
        return self._file.tensors[self._sources[name]].type

    def rows(self, name: str, start: int, stop: int) -> npt.NDArray[np.uint8]:
        """Rows of a matrix as they lie in the file, uint8 ``[stop - start, row_bytes]``.

        Their order, and that of their columns, is the canonical one; all axes but the last count as
        one. Not for what ``is_decoded``.
        """
        raw = self._file.raw(self._sources[name])
        raw = raw.reshape(-1, raw.shape[-1])
        done = self._changes.get(name)
        if done is not None and done.rows is not None:
            stop = min(stop, len(raw) // done.unit * len(done.rows))  # a kernel's rows are fewer
            raw = raw[done.places(start, stop)]
        else:
            raw = raw[start:stop]
        if done is not None and done.columns is not None:
            raw = moved(raw, done.columns)
        return raw

    def release(self) -> None:
        """See ``Weights``."""
        self._file.release()

    def close(self) -> None:
        """See ``Weights``."""
        self._file.close()

    def is_decoded(self, name: str) -> bool:
        """Whether no row of the file is a row of the tensor: numbers are others there, or columns
        are moved that share a block.
        """
        done = self._changes.get(name)
        if done is None or done.columns is None:
            return done is not None and done.value is not None
        info = self._file.tensors[self._sources[name]]
        return info.shape[-1] // len(done.columns) % info.type.block_size != 0

    def _is_decoded(self, name: str) -> bool:
        """Whether the numbers themselves are others than those in the file."""
        done = self._changes.get(name)
        return done is not None and done.value is not None

    def _decoded(self, name: str) -> npt.NDArray[np.float32]:
        """A tensor whose numbers are others than those in the file."""
        source, done, shape = self._sources[name], self._changes[name], self._expected[name]
        info = self._file.tensors[source]
        values = block(info.type).decode(self._file.raw(source)).reshape(info.shape)
        assert done.value is not None
        values = done.value(values)
        if done.rows is not None:
            rows = self._file_rows(name)
            values = values.reshape(rows, -1)[done.places(0, rows // done.unit * len(done.rows))]
        return np.ascontiguousarray(values.reshape(shape))

    def _file_rows(self, name: str) -> int:
        """Rows of the tensor in the file: of a vector, its numbers."""
        shape = self._file.tensors[self._sources[name]].shape
        return math.prod(shape[:-1]) if len(shape) > 1 else shape[0]

    def _use_older(self) -> None:
        """Take what older files have in the place of tensors that this one lacks."""
        family, tensors = FAMILIES.get(self.config["model_type"]), self._file.tensors
        if family is None:
            return
        for name in [name for name, source in self._sources.items() if source not in tensors]:
            found = family.older(self.config, name)
            if found is not None and found.source is not None and found.source in tensors:
                self._changes[name], self._sources[name] = found, found.source

    def _check(self) -> None:
        """Compare the tensors of the file with those that its metadata asks for."""
        tensors, sources = self._file.tensors, self._sources
        expected = {
            sources[name]: self._shape_in_file(name, shape)
            for name, shape in self._expected.items()
        }
        found = {
            name: info.shape
            for name, info in tensors.items()
            if name in expected or not (name in self._derived or self._is_unused(name))
        }
        for name, shape in found.items():  # converters keep axes of 1, or not
            if name in expected and squeezed(shape) == squeezed(expected[name]):
                found[name] = expected[name]
        layout.check(self.path, expected, found)
        for name in expected:
            if len(tensors[name].shape) == 1 and tensors[name].type.block_size > 1:
                raise FormatError(
                    f"{self.path}: tensor {name!r} must not be quantized, but is "
                    f"{tensors[name].type.name}; use another version of the model"
                )

    def _is_unused(self, name: str) -> bool:
        """Whether a tensor of the file follows from others, or is of a block past the last one."""
        block = _BLOCK.match(name)
        past = block is not None and int(block[1]) >= self.config["num_hidden_layers"]
        return past or _DERIVED.fullmatch(name) is not None

    def _shape_in_file(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        done = self._changes.get(name)
        return shape if done is None or done.shape is None else done.shape
