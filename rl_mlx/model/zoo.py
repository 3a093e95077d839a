"""Families that are not ours: mlx-lm's models, on our cache.

mlx-lm is imported here alone, when one of its models is needed: it pulls in transformers and costs
seconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from rl_mlx.convert.weights import FloatType, Weights
from rl_mlx.errors import UnsupportedModel
from rl_mlx.model.attention import mask_array
from rl_mlx.model.device import on_cpu
from rl_mlx.model.load import DTYPES
from rl_mlx.model.plan import CacheSpec, KVSpec
from rl_mlx.model.rope import Offset
from rl_mlx.model.step import Mask, Step


def load_zoo(weights: Weights, dtype: FloatType) -> ZooModel:
    """mlx-lm's model of a safetensors folder.

    Raises ``UnsupportedModel`` where mlx-lm has no such family, keeps something other than keys and
    values, or the weights are not a folder.
    """
    family = weights.config.get("model_type")
    if not weights.path.is_dir():
        raise UnsupportedModel(
            f"architecture {family!r} of {weights.path.name} is not one that MLX runs here; "
            "try --backend llama.cpp"
        )
    from mlx_lm.utils import load_model  # noqa: PLC0415  (slow to import)

    if on_cpu():
        mx.disable_compile()  # it runs a C++ compiler, which need not be there
    try:
        model, _ = load_model(weights.path, lazy=True, model_config=weights.config)
    except (ValueError, TypeError, KeyError) as error:
        reason = str(error).splitlines()[0]
        raise UnsupportedModel(
            f"mlx-lm cannot load {weights.path.name} ({family}): {reason}; try --backend llama.cpp"
        ) from error
    model.set_dtype(DTYPES[dtype])
    mx.eval(model.parameters())
    return ZooModel(model, DTYPES[dtype])


class ZooModel:
    """An mlx-lm model as the engine wants it. Its ``forward`` gives logits already, and ``head``
    nothing more. It takes a view of all keys, so steps cannot be packed.
    """

    packs = False

    def __init__(self, model: Any, dtype: mx.Dtype) -> None:
        self.dtype = dtype
        self._model = model
        self.cache_specs: Sequence[CacheSpec] = _probe(model)

    def forward(self, tokens: mx.array, step: Step) -> mx.array:
        """Logits ``[B, S, vocab]``."""
        views = [_View(step, i, tokens.shape[1]) for i in range(len(self.cache_specs))]
        logits: mx.array = self._model(tokens, cache=views)
        return logits

    def head(self, hidden: mx.array) -> mx.array:
        """The logits themselves."""
        return hidden


def _probe(model: Any) -> list[CacheSpec]:
    """What each layer keeps, found by running one token."""
    from mlx_lm.models.cache import KVCache, RotatingKVCache, make_prompt_cache  # noqa: PLC0415

    caches = make_prompt_cache(model)
    for cache in caches:
        plain = type(cache) is KVCache
        rotating = type(cache) is RotatingKVCache and cache.keep == 0
        if not (plain or rotating):
            raise UnsupportedModel(
                f"mlx-lm's {type(model).__module__.rpartition('.')[2]} keeps a "
                f"{type(cache).__name__}, which MLX cannot serve here yet; try --backend llama.cpp"
            )
    mx.eval(model(mx.array([[0]]), cache=caches))
    return [
        KVSpec(c.keys.shape[1], c.keys.shape[3], c.values.shape[3], getattr(c, "max_size", None))
        for c in caches
    ]


class _View:
    """One layer of our cache in one step, looking like an mlx-lm cache of a batch."""

    def __init__(self, step: Step, layer: int, count: int) -> None:
        self._step = step
        self._layer = layer
        self._count = count

    @property
    def offset(self) -> Offset:
        """Position of the first new token, an int or an array of one a row."""
        return self._step.offset

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Keep these; return all."""
        return self._step.update(self._layer, keys, values)

    def make_mask(
        self, count: int, return_array: bool = False, window_size: int | None = None
    ) -> Mask:
        """The mask of this step."""
        assert count == self._count, "a model that runs over other tokens than it was given"
        mask = self._step.mask(self._layer, window_size)
        if not return_array:
            return mask
        seen = self._step.seen(self._layer)
        mask = mask_array(mask, count, seen)
        return mx.ones((count, seen), mx.bool_) if mask is None else mask
