"""What MLX computes on."""

from __future__ import annotations

import mlx.core as mx


def on_cpu() -> bool:
    """Whether MLX computes on a processor: no GPU is there, or none that its build can use."""
    return mx.default_device() == mx.Device(mx.cpu)
