"""How the lab draws: quiet axes, units on both, and a palette that is readable in grey.

Lines differ by marker and dash, not by colour alone; the colours are Okabe and Ito's (2008), taken
in an order of falling darkness.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rl_mlx.lab.measurement import optional

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
DASHES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)))


def axes(ax: Axes | None, title: str, x: str, y: str, size: tuple[float, float] = (7, 4)) -> Axes:
    """``ax``, or new ones, with a title at the left, labels, and a light grid."""
    if ax is None:
        figure = optional("matplotlib.pyplot").figure(figsize=size, dpi=100, layout="constrained")
        ax = figure.add_subplot()
    ax.set_title(title, loc="left", fontsize=11, fontweight="bold")
    ax.set_xlabel(x)
    ax.set_ylabel(y)
    ax.grid(visible=True, color="0.9", linewidth=0.8)
    ax.set_axisbelow(b=True)
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    return ax


def style(index: int) -> dict[str, Any]:
    """Colour, marker and dash of the ``index``-th line."""
    return {
        "color": COLOURS[index % len(COLOURS)],
        "marker": MARKERS[index % len(MARKERS)],
        "linestyle": DASHES[index % len(DASHES)],
        "markersize": 5,
    }
