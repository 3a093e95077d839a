"""Bits for every tensor under a budget: a knapsack over measured sensitivities.

Each tensor takes one container; the sum of their divergences is to be least while the sum of their
bytes stays in the budget (the multiple-choice knapsack, by dynamic programming over bytes). That
divergences add up is an approximation, good while they are small: the model that comes out is to be
measured, which ``divergence`` does.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import numpy as np

from rl_mlx.convert.recipe import KEEP, Recipe
from rl_mlx.errors import InvalidRequest
from rl_mlx.lab.measurement import Measurement, Record
from rl_mlx.lab.plots import axes
from rl_mlx.lab.sensitivity import Cost, Sensitivity

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_STEPS = 1 << 15
"""Into which the budget is cut; sizes are rounded up to whole ones."""


@dataclass(frozen=True)
class Allocation(Measurement):
    """A container for every matrix. ``bytes`` and ``bits_per_weight`` are of the whole model;
    ``kl`` is the sum of the measured divergences, nats a token.
    """

    model: str
    budget: int
    bytes: int
    bits_per_weight: float
    kl: float
    group_size: int
    chosen: tuple[Cost, ...]

    def records(self) -> list[Record]:
        """A row for each matrix."""
        return [asdict(cost) for cost in self.chosen]

    @property
    def recipe(self) -> Recipe:
        """For ``convert``: the container of most, and every other one by its name."""
        counts = Counter(c.quant for c in self.chosen if c.quant != KEEP)
        main = counts.most_common(1)[0][0] if counts else "q8"
        others = {c.name: c.quant for c in self.chosen if c.quant != main}
        group = self.group_size if main.startswith("q") else None
        return Recipe(quant=main, group_size=group, roles={}, tensors=others)

    def plot(self, ax: Axes | None = None) -> Axes:
        """A map of layers and roles with the bits a weight that each got."""
        title = f"{self.bits_per_weight:.2f} bits a weight, spent where they count"
        ax = axes(ax, title, "", "layer", (8, 4))
        roles = list(dict.fromkeys(c.role for c in self.chosen))
        rows = sorted({c.layer for c in self.chosen}, key=lambda layer: (layer is None, layer))
        grid = np.full((len(rows), len(roles)), np.nan)
        for c in self.chosen:
            at = rows.index(c.layer), roles.index(c.role)
            grid[at] = bits = 8 * c.bytes / c.weights
            ax.annotate(
                c.quant, at[::-1], ha="center", va="center", fontsize=8,
                color="white" if bits > 6 else "black",
            )  # fmt: skip
        shown = ax.imshow(grid, cmap="Greys", aspect="auto", vmin=1, vmax=10)
        ax.grid(visible=False)
        ax.set_xticks(range(len(roles)), roles, rotation=30, ha="right")
        ax.set_yticks(range(len(rows)), ["outside" if r is None else str(r) for r in rows])
        ax.figure.colorbar(shown, ax=ax, label="bits a weight")
        return ax


def allocate(
    found: Sensitivity, *, bits: float | None = None, size: int | None = None
) -> Allocation:
    """The containers that cost least in a budget: ``bits`` a weight, or a ``size`` in bytes.

    Raises ``InvalidRequest`` unless one of both is given, and where the smallest containers do not
    fit.
    """
    if (bits is None) == (size is None):
        raise InvalidRequest("a search needs a budget: bits= a weight, or size= in bytes")
    budget = int(size if size is not None else (bits or 0) * found.parameters / 8)
    choices: dict[str, list[Cost]] = {}
    for cost in found.costs:
        choices.setdefault(cost.name, []).append(cost)
    groups = list(choices.values())
    least = found.rest + sum(min(c.bytes for c in group) for group in groups)
    if least > budget:
        raise InvalidRequest(
            f"{found.model} takes {least} bytes ({8 * least / found.parameters:.2f} bits a weight) "
            f"in the smallest containers that were measured, and the budget is {budget}"
        )
    chosen = [group[i] for group, i in zip(groups, _knapsack(groups, budget - found.rest))]
    total = found.rest + sum(c.bytes for c in chosen)
    return Allocation(
        model=found.model,
        budget=budget,
        bytes=total,
        bits_per_weight=8 * total / found.parameters,
        kl=sum(c.kl for c in chosen),
        group_size=found.group_size,
        chosen=tuple(chosen),
    )


def _knapsack(groups: Sequence[Sequence[Cost]], budget: int) -> list[int]:
    """The index of the choice in each group; the least sum of ``kl`` within ``budget`` bytes."""
    spare = budget - sum(min(c.bytes for c in group) for group in groups)
    step = max(1, -(-spare // _STEPS))
    room = spare // step
    best = np.zeros(room + 1)
    taken = []
    for group in groups:
        least = min(c.bytes for c in group)
        options = np.full((len(group), room + 1), np.inf)
        for i, cost in enumerate(group):
            more = -(-(cost.bytes - least) // step)
            if more <= room:
                options[i, more:] = best[: room + 1 - more] + cost.kl
        taken.append(options.argmin(axis=0))
        best = options.min(axis=0)
    left, found = room, []
    for group, choice in zip(reversed(groups), reversed(taken)):
        index = int(choice[left])
        found.append(index)
        left -= -(-(group[index].bytes - min(c.bytes for c in group)) // step)
    return found[::-1]
