"""A GGUF file as weights in canonical names and layouts."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from rl_mlx.convert import layout
from rl_mlx.convert.gguf.blocks import block
from rl_mlx.convert.gguf.config import gguf_config
from rl_mlx.convert.gguf.names import gguf_names
from rl_mlx.convert.gguf.reader import GGUFFile
from rl_mlx.convert.gguf.repack import container, repack
from rl_mlx.convert.gguf.rope import FREQS, LONGROPE
from rl_mlx.convert.gguf.types import GGMLType
from rl_mlx.convert.weights import Dense, FloatType, Tensor, Weights
from rl_mlx.errors import FormatError

_PERMUTED = re.compile(r"blk\.\d+\.attn_([qk])\.(?:weight|bias)")
_DERIVED = re.compile(r"blk\.\d+\.attn_rot_embd\.\w+|.*rotary_emb\.inv_freq")


class GGUFWeights(Weights):
    """The weights of a GGUF file, in one part or many.

    Rows of Q and K that are stored for interleaved rotation come in the half-split order, and
    Gemma's norms without the 1 that was added to them. Where the file scales its frequencies in a
    way that no config can say, there is a tensor ``rope_freqs.weight``, float32 ``[dims / 2]``, by
    which the base frequencies are divided.
    """

    def __init__(self, path: Path) -> None:
        """Open ``path`` by its header; raises what ``GGUFFile.open`` and ``gguf_config`` raise.

        Raises ``FormatError`` too where the tensors are not those that the metadata asks for.
        """
        self.path = path
        self._file = file = GGUFFile.open(path)
        self.config = gguf_config(file)
        self._family: str = self.config["model_type"]
        self._interleaved = file.str("general.architecture") in {"llama", "mistral3"}
        try:
            self._expected = layout.layout(self.config, len(file.tensors))
        except FormatError as error:
            raise FormatError(f"{path}: {error}") from error
        if FREQS in file.tensors and self.config["rope_parameters"]["rope_type"] == "default":
            self._expected[FREQS] = (self.config["head_dim"] // 2,)
        self._sources = gguf_names(self._family, self._expected, file.tensors)
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
        return made.nbytes(shape) if made.exact or not exact else 4 * math.prod(shape)

    def load(self, name: str, scales: FloatType = "float32", *, exact: bool = False) -> Tensor:
        """See ``Weights``. Plain floats that need no change are views of the file.

        Raises ``UnsupportedModel`` for a tensor type that is not supported.
        """
        source = self._sources[name]
        info = self._file.tensors[source]
        raw = self._file.raw(source)
        if self._family.startswith("gemma") and name.endswith("norm.weight"):
            return Dense(block(info.type).decode(raw) - np.float32(1), "float32")
        if heads := self._permuted_heads(source):
            raw = _half_split(raw.reshape(info.shape[0], -1), heads).reshape(raw.shape)
        if exact and not container(info.type, info.shape[-1]).exact:
            return Dense(block(info.type).decode(raw).reshape(self._expected[name]), "float32")
        tensor = repack(raw, info.type, scales)
        if isinstance(tensor, Dense):  # a kernel has an axis more here than in the file
            return Dense(tensor.array.reshape(self._expected[name]), tensor.dtype)
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

        Their order is the canonical one; all axes but the last count as one.
        """
        source = self._sources[name]
        raw = self._file.raw(source)
        raw = raw.reshape(-1, raw.shape[-1])
        if heads := self._permuted_heads(source):
            order = _half_split(np.arange(len(raw))[:, None], heads)[:, 0]
            taken: npt.NDArray[np.uint8] = raw[order[start:stop]]
            return taken
        return raw[start:stop]

    def release(self) -> None:
        """See ``Weights``."""
        self._file.release()

    def close(self) -> None:
        """See ``Weights``."""
        self._file.close()

    def _permuted_heads(self, source: str) -> int | None:
        """How many heads have rows to be moved; None where rows are in order."""
        match = _PERMUTED.fullmatch(source) if self._interleaved else None
        if match is None:
            return None
        heads: int = self.config[
            "num_attention_heads" if match[1] == "q" else "num_key_value_heads"
        ]
        return heads

    def _check(self) -> None:
        """Compare the tensors of the file with those that its metadata asks for."""
        tensors, sources = self._file.tensors, self._sources
        expected = {
            sources[name]: shape[:2] if name.endswith("conv.conv.weight") else shape
            for name, shape in self._expected.items()
        }
        factors = {*LONGROPE, FREQS} if self._interleaved else {*LONGROPE}
        found = {
            name: info.shape
            for name, info in tensors.items()
            if name in expected or not (name in factors or _DERIVED.fullmatch(name))
        }
        layout.check(self.path, expected, found)
        for name in expected:
            if len(tensors[name].shape) == 1 and tensors[name].type.block_size > 1:
                raise FormatError(
                    f"{self.path}: tensor {name!r} must not be quantized, but is "
                    f"{tensors[name].type.name}; use another version of the model"
                )


def _half_split(rows: npt.NDArray[Any], heads: int) -> npt.NDArray[Any]:
    """Rows ``[heads * dims, bytes]`` from pairs (0, 1), (2, 3) ... to (0, dims / 2) ...

    They are whole rows, so quantized ones are moved without being decoded.
    """
    dims = rows.shape[0] // heads
    return rows.reshape(heads, dims // 2, 2, -1).swapaxes(1, 2).reshape(rows.shape)
