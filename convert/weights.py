"""One view of a model on disk, whatever its format: a Hugging Face style config and tensors by
canonical name.

Canonical names and layouts are those of a converted MLX checkpoint, which are the ones mlx-lm's
models use after ``sanitize``: ``model.layers.0.self_attn.q_proj.weight``, experts stacked as
``mlp.switch_mlp.gate_proj`` ``[experts, out, in]``, Q and K in the half-split rope order, Gemma's
norms without the +1. A GGUF file, a Hugging Face folder and an MLX folder all come out the same, so
that one loader serves the three.

Arrays are NumPy. NumPy has no bfloat16: such arrays are uint16 bit patterns with ``dtype ==
"bfloat16"``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

FloatType = Literal["float32", "float16", "bfloat16"]
Mode = Literal["affine", "mxfp4", "mxfp8", "nvfp4"]


@dataclass(frozen=True)
class Dense:
    """A plain array; bfloat16 comes as its uint16 bit patterns."""

    array: npt.NDArray[Any]
    dtype: FloatType

    @property
    def shape(self) -> tuple[int, ...]:
        """The logical shape."""
        return self.array.shape


@dataclass(frozen=True)
class Packed:
    """A quantized array in MLX's own container, ready for ``mx.quantized_matmul``.

    ``weight`` is uint32 ``[..., out, in * bits / 32]``, one LSB-first bit stream a row; ``scales``
    and ``biases`` are ``[..., out, in / group_size]`` in ``dtype`` (``value = scale * q + bias``).
    The block-float modes have uint8 scales and no biases.
    """

    weight: npt.NDArray[np.uint32]
    scales: npt.NDArray[Any]
    biases: npt.NDArray[Any] | None
    bits: int
    group_size: int
    mode: Mode
    dtype: FloatType

    @property
    def shape(self) -> tuple[int, ...]:
        """The logical shape, as if dense."""
        return (*self.weight.shape[:-1], self.weight.shape[-1] * 32 // self.bits)


Tensor = Dense | Packed


class Weights(ABC):
    """A model on disk, opened by its header alone; tensors are read when asked for."""

    path: Path
    config: dict[str, Any]
    """Hugging Face style, with ``model_type``; ``quantization`` too where the folder is an MLX one.
    """

    @abstractmethod
    def names(self) -> list[str]:
        """Canonical names of weights, without the ``.scales``/``.biases`` companions of packed
        ones.
        """

    @abstractmethod
    def shape(self, name: str) -> tuple[int, ...]:
        """Logical shape; costs no reading. ``KeyError`` where there is no such tensor."""

    @abstractmethod
    def nbytes(self, name: str, *, exact: bool = False) -> int:
        """Bytes that ``load`` will take, known beforehand."""

    @abstractmethod
    def load(self, name: str, scales: FloatType = "float32", *, exact: bool = False) -> Tensor:
        """Read one tensor. ``scales`` is the float type of a packed tensor's scales and biases.

        ``exact``: a tensor that no packed container holds to the last bit comes dense, in float32.

        Raises ``FormatError`` where the bytes are not there or the shape contradicts the config.
        """

    def release(self) -> None:  # noqa: B027 - nothing to do where no file is mapped
        """Give the memory of what was read back to the system; arrays stay valid."""

    @abstractmethod
    def close(self) -> None:
        """Let go of the file; arrays already loaded stay valid."""
