"""Folders whose weights others have quantized, read as MLX's containers or as plain floats.

GPTQ, AWQ and compressed-tensors' integers are moved, none is decoded: they are affine as MLX's are,
with float32 scales so that no bit is lost. What MLX has no container for comes as plain floats.
"""

from rl_mlx.convert.prequantized.modules import plain, with_settings

__all__ = ["plain", "with_settings"]
