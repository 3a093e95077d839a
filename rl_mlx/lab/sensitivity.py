"""What each tensor's quantization costs by itself: measured, with the model's own activations.

A tensor at a time is quantized, the text is predicted again from its layer on, and the KL
divergence from the unchanged model is its sensitivity. Runs on MLX, for the families of
``rl_mlx.model``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from rl_mlx.convert.open import open_weights
from rl_mlx.convert.pieces import source
from rl_mlx.convert.recipe import KEEP, Recipe
from rl_mlx.errors import InvalidRequest, UnsupportedModel
from rl_mlx.lab.measurement import Measurement, Record
from rl_mlx.lab.plots import axes
from rl_mlx.lab.tensors import place
from rl_mlx.lab.text import Text, read_text
from rl_mlx.store import resolve
from rl_mlx.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from matplotlib.axes import Axes

QUANTS = ("q2", "q3", "q4", "q5", "q6", "q8")


@dataclass(frozen=True)
class Cost:
    """One matrix in one container: ``kl`` in nats a token when it alone is so; ``rms`` as in
    ``TensorError``. ``quant`` is ``keep`` where it is left as it is.
    """

    name: str
    layer: int | None
    role: str
    weights: int
    quant: str
    bytes: int
    kl: float
    rms: float


@dataclass(frozen=True)
class Sensitivity(Measurement):
    """All matrices in all containers that were tried. ``rest`` are the bytes of everything else
    in a converted folder.
    """

    model: str
    text: str
    tokens: int
    group_size: int
    parameters: int
    rest: int
    costs: tuple[Cost, ...]

    def records(self) -> list[Record]:
        """A row for each matrix and container."""
        return [asdict(cost) for cost in self.costs]

    @property
    def quants(self) -> tuple[str, ...]:
        """The containers that were tried, without ``keep``."""
        return tuple(dict.fromkeys(c.quant for c in self.costs if c.quant != KEEP))

    def layers(self, quant: str) -> dict[int | None, float]:
        """One number a layer, the sum over its matrices; None is what lies outside of them."""
        found: dict[int | None, float] = {}
        for cost in self.costs:
            if cost.quant == quant:
                found[cost.layer] = found.get(cost.layer, 0.0) + cost.kl
        return found

    def plot(self, ax: Axes | None = None, quant: str | None = None) -> Axes:
        """A map of layers and roles; darker hurts more. ``quant`` is the first without."""
        quant = quant or self.quants[0]
        costs = [c for c in self.costs if c.quant == quant]
        worst = max(costs, key=lambda c: c.kl)
        title = f"At {quant}, {worst.name.removesuffix('.weight')} costs most: {worst.kl:.2g}"
        ax = axes(ax, title, "", "layer", (8, 4))
        roles = list(dict.fromkeys(c.role for c in costs))
        rows = sorted({c.layer for c in costs}, key=lambda layer: (layer is None, layer))
        grid = np.full((len(rows), len(roles)), np.nan)
        for c in costs:
            grid[rows.index(c.layer), roles.index(c.role)] = max(c.kl, 1e-12)
        logs = np.log10(grid)
        low, high = np.nanmin(logs), np.nanmax(logs)
        # White is for where there is nothing.
        shown = ax.imshow(logs, cmap="Greys", aspect="auto", vmin=low - (high - low) / 4)
        ax.grid(visible=False)
        ax.set_xticks(range(len(roles)), roles, rotation=30, ha="right")
        ax.set_yticks(range(len(rows)), ["outside" if r is None else str(r) for r in rows])
        ax.figure.colorbar(shown, ax=ax, label="log10 of KL, nats a token")
        return ax


def sensitivity(
    model: str | Path,
    text: Text | None = None,
    *,
    quants: Sequence[str] = QUANTS,
    group_size: int = 64,
    window: int = 128,
    windows: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> Sensitivity:
    """Measure every matrix of ``model`` in every one of ``quants`` (names of ``convert.Recipe``).

    The text's first ``windows`` times ``window`` tokens are read, at once. A container that would
    take no less than the matrix does now is left out. ``progress(done, total)`` counts forwards.

    Raises ``InvalidRequest`` for an unknown quant or a text that is too short, and
    ``UnsupportedModel`` for a family that runs through mlx-lm.
    """
    # MLX is loaded only here: the rest of the lab does without.
    from rl_mlx.lab.probe import Probe, kept  # noqa: PLC0415
    from rl_mlx.model.load import is_ours  # noqa: PLC0415

    recipes = {q: Recipe(quant=q, group_size=_group(q, group_size)) for q in quants}
    text = read_text() if text is None else text
    files = resolve(str(model))
    tokens = _tokens(Tokenizer.open(files.path), text, window, windows)
    with closing(open_weights(files.path)) as weights:
        if not is_ours(weights.config):
            raise UnsupportedModel(
                f"{files.name}: {weights.config.get('model_type')!r} runs through mlx-lm, where "
                "single tensors cannot be exchanged"
            )
        probe = Probe(weights, tokens)
        parts = [source(weights, name) for name in weights.names()]
        costs: list[Cost] = []
        for done, part in enumerate(parts):
            layer, role = place(part.name)
            for quant, size, kl, rms in probe.costs(part, recipes):
                costs.append(Cost(part.name, layer, role, part.weights, quant, size, kl, rms))
            if progress:
                progress(done + 1, len(parts))
        measured = {cost.name for cost in costs}
        return Sensitivity(
            model=files.name,
            text=text.name,
            tokens=tokens.size,
            group_size=group_size,
            parameters=sum(part.weights for part in parts),
            rest=sum(
                kept(weights, part).nbytes(part.weights)
                for part in parts
                if part.name not in measured
            ),
            costs=tuple(costs),
        )


def _group(quant: str, group_size: int) -> int | None:
    return group_size if quant.startswith("q") else None


def _tokens(tokenizer: Tokenizer, text: Text, window: int, windows: int) -> npt.NDArray[np.int32]:
    lead = [tokenizer.bos_id] if tokenizer.add_bos and tokenizer.bos_id is not None else []
    ids = tokenizer.encode(text.text, add_special=False)
    each = window - len(lead)
    if window < 2 or windows < 1 or len(ids) < each * windows:
        raise InvalidRequest(
            f"{text.name} has {len(ids)} tokens here, fewer than {windows} windows of {window}; "
            "take a longer text or smaller windows"
        )
    rows = [[*lead, *ids[i * each : (i + 1) * each]] for i in range(windows)]
    return np.array(rows, np.int32)
