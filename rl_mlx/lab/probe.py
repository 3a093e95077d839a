"""A decoder in which one tensor at a time is exchanged, and how far its predictions move."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from rl_mlx.cache.arena import Arena, ArenaStep
from rl_mlx.convert import fidelity
from rl_mlx.convert.gguf.weights import GGUFWeights
from rl_mlx.convert.pieces import Holding, Source, Unfit, hold, values
from rl_mlx.convert.quantize import dequantize
from rl_mlx.convert.recipe import KEEP, Recipe
from rl_mlx.convert.weights import Dense, FloatType, Tensor, Weights
from rl_mlx.lab.text import PIECE, log_probs
from rl_mlx.model.decoder import Decoder
from rl_mlx.model.device import on_cpu
from rl_mlx.model.load import layer_of, load_decoder, reload

_DTYPE: FloatType = "float32"


def kept(weights: Weights, part: Source) -> Holding:
    """How ``convert`` holds a tensor that its recipe leaves alone."""
    if not part.packed:
        return Holding("float16")
    if isinstance(weights, GGUFWeights):
        return fidelity.choose(part, "faithful", "float16").holdings[0]
    return fidelity.unchanged(part).holdings[0]


class _Changed(Weights):
    """Weights of which one tensor is another."""

    def __init__(self, weights: Weights, name: str, tensor: Tensor) -> None:
        self.path, self.config = weights.path, weights.config
        self._weights = weights
        self._name, self._tensor = name, tensor

    def names(self) -> list[str]:
        """See ``Weights``, here and below."""
        return self._weights.names()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._weights.shape(name)

    def nbytes(self, name: str, *, exact: bool = False) -> int:
        return self._weights.nbytes(name, exact=exact)

    def load(self, name: str, scales: FloatType = "float32", *, exact: bool = False) -> Tensor:
        if name == self._name:
            return self._tensor
        return self._weights.load(name, scales, exact=exact)

    def close(self) -> None:
        self._weights.close()


class Probe:
    """The unchanged model's states before each block, and its predictions."""

    def __init__(self, weights: Weights, tokens: npt.NDArray[np.int32]) -> None:
        self._weights = weights
        self._tokens = mx.array(tokens)
        self._decoder = load_decoder(weights, tokens.shape[1], _DTYPE, unpack=on_cpu())
        step = self._step(self._decoder)
        self._states = [self._decoder.embed(self._tokens, step)]
        for block in self._decoder.blocks:
            self._states.append(block(self._states[-1], step))
            mx.eval(self._states[-1])
        last = self._decoder.through(self._states[-1], step, len(self._decoder.blocks))
        self._probs = list(self._predictions(self._decoder, last))

    def costs(
        self, part: Source, recipes: Mapping[str, Recipe]
    ) -> Iterator[tuple[str, int, float, float]]:
        """Of one tensor: each container's name, bytes, divergence and relative RMS error.

        The first is ``keep``; nothing for what is never quantized.
        """
        held = {
            quant: holding
            for quant, recipe in recipes.items()
            if (holding := recipe.holding(part.name, part.shape, "float16"))
            and (not part.packed or holding.nbytes(part.weights) < part.nbytes)
        }
        if not held:
            return
        true = values(part.read(0, part.rows))
        power = float(np.square(true, dtype=np.float64).sum()) or 1.0
        yield KEEP, kept(self._weights, part).nbytes(part.weights), 0.0, 0.0
        for quant, holding in held.items():
            try:
                made = dequantize(hold(Dense(true, "float32"), holding))
            except Unfit:
                continue
            error = float(np.square(made - true, dtype=np.float64).sum())
            kl = self._kl(part.name, Dense(made.reshape(part.shape), "float32"))
            yield quant, holding.nbytes(part.weights), kl, (error / power) ** 0.5

    def _kl(self, name: str, tensor: Dense) -> float:
        """Mean divergence of the predictions when ``tensor`` takes the place of ``name``."""
        changed = _Changed(self._weights, name, tensor)
        decoder = reload(self._decoder, changed, _DTYPE, name, unpack=on_cpu())
        step = self._step(decoder)
        first = layer_of(decoder, name)
        if first is None and name == "lm_head.weight":
            first = len(decoder.blocks)
        x = decoder.embed(self._tokens, step) if first is None else self._states[first]
        found = self._predictions(decoder, decoder.through(x, step, first or 0))
        total = sum(float((np.exp(p) * (p - q)).sum()) for p, q in zip(self._probs, found))
        return max(total / self._tokens.size, 0.0)

    def _step(self, decoder: Decoder) -> ArenaStep:
        rows, length = self._tokens.shape
        arena = Arena(decoder.cache_specs, decoder.dtype, length)
        for _ in range(rows):
            arena.add_row()
        return arena.begin(0, rows, length)

    def _predictions(self, decoder: Decoder, hidden: mx.array) -> Iterator[npt.NDArray[np.float64]]:
        flat = hidden.reshape(-1, hidden.shape[-1])
        for start in range(0, flat.shape[0], PIECE):
            yield log_probs(np.array(decoder.head(flat[start : start + PIECE]).astype(mx.float32)))
