"""The metadata of a GGUF file under its architecture's prefix, checked as it is read."""

from __future__ import annotations

import math

import numpy as np

from rl_mlx.convert.gguf.reader import GGUFFile
from rl_mlx.convert.gguf.rope import short
from rl_mlx.errors import FormatError, UnsupportedModel


class Keys:
    """The keys of one architecture, without its prefix, and sizes that much follows from."""

    def __init__(self, file: GGUFFile, arch: str) -> None:
        self.file = file
        self.path = file.paths[0]
        self.arch = arch
        # Blocks that guess the tokens after the next one (MTP) come last, and are left alone.
        self.layers = self.count("block_count") - file.int(f"{arch}.nextn_predict_layers", 0)
        self.hidden = self.count("embedding_length")
        self.heads = max(self.per_layer("attention.head_count"))
        self.head_dim = self.count("attention.key_length", self.hidden // max(self.heads, 1))

    def has(self, key: str) -> bool:
        """Whether the file says it."""
        return f"{self.arch}.{key}" in self.file.metadata

    def count(self, key: str, default: int | None = None) -> int:
        """A positive whole number."""
        value = self.file.int(f"{self.arch}.{key}", default)
        if not 0 < value < 1 << 31:
            raise FormatError(f"{self.path}: {self.arch}.{key} cannot be {value}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A finite number, as short as float32 allows."""
        value = short(self.file.float(f"{self.arch}.{key}", default))
        if not math.isfinite(value):
            raise FormatError(f"{self.path}: {self.arch}.{key} cannot be {value}")
        return value

    def divisor(self, key: str, default: float | None = None) -> float:
        """A finite number above zero."""
        value = self.number(key, default)
        if value <= 0:
            raise FormatError(f"{self.path}: {self.arch}.{key} cannot be {value}")
        return value

    def per_layer(self, key: str, default: int | None = None) -> list[int]:
        """A number a layer, from an array or from one number for all."""
        value = self.file.get(f"{self.arch}.{key}")
        if not isinstance(value, np.ndarray):
            return [self.file.int(f"{self.arch}.{key}", default)] * min(self.layers, 1 << 16)
        if value.dtype.kind not in "iub" or len(value) < self.layers:
            raise FormatError(
                f"{self.path}: {self.arch}.{key} must give {self.layers} whole numbers"
            )
        return [int(v) for v in value[: self.layers]]

    def uniform(self, key: str, default: int | None = None) -> int:
        """A positive number that is the same in all layers."""
        values = set(self.per_layer(key, default))
        if len(values) != 1:
            raise UnsupportedModel(
                f"{self.path}: {self.arch}.{key} differs from layer to layer, which is not "
                "supported on MLX; try --backend llama.cpp"
            )
        return self.positive(key, values.pop())

    def positive(self, key: str, value: int) -> int:
        """``value``, or ``FormatError`` where it is below 1."""
        if value < 1:
            raise FormatError(f"{self.path}: {self.arch}.{key} cannot be {value}")
        return value
