"""The MLX backend by itself: how weights are held."""

from __future__ import annotations

from importlib.resources import files
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from rl_mlx.errors import OutOfMemory
from rl_mlx.model.layers import DenseMatrix, Matrix, QuantizedMatrix

DEMO = files("rl_mlx.demo") / "demo.gguf"


def head_of(backend: Any) -> Matrix:
    found: Matrix = backend._engine.call(lambda runner: runner._model._head.matrix)
    return found


@pytest.mark.skipif(mx.default_device() != mx.Device(mx.cpu), reason="GPUs multiply packed weights")
def test_on_a_cpu_packed_weights_become_floats_where_they_take_little_memory(
    open_model: Any,
) -> None:
    roomy = open_model(DEMO, backend="mlx", context=256, memory="1GB")
    tight = open_model(DEMO, backend="mlx", context=256, memory="50MB")
    assert isinstance(head_of(roomy), DenseMatrix)
    assert isinstance(head_of(tight), QuantizedMatrix)
    assert roomy.info.weight_bytes == tight.info.weight_bytes  # what the model has, packed
    ids = list(range(5, 60))
    want, got = tight.logits(ids), roomy.logits(ids)
    assert np.abs(got - want).max() < 1e-5 * np.abs(want).max()
    with pytest.raises(OutOfMemory):
        open_model(DEMO, backend="mlx", context=256, memory="5MB")
