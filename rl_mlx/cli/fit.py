"""``rl-mlx fit``: which quantizations of a model fit this machine, and how fast they can be."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from rl_mlx.cli.options import Json, Model
from rl_mlx.cli.show import count
from rl_mlx.cli.terminal import plain, print_json, say, size
from rl_mlx.errors import InvalidRequest

if TYPE_CHECKING:
    from rl_mlx.backends.fit import Fit

NAME = "fit"
_HEADS = ("", "weights", "in all", "fits", "context up to", "tokens/s up to")


def command(
    model: Model,
    context: Annotated[
        int | None, typer.Option(help="Tokens of context to have room for. [8192]", metavar="N")
    ] = None,
    memory: Annotated[
        str | None, typer.Option(help="Memory budget: 12GB, or 75%.", metavar="SIZE")
    ] = None,
    json: Json = False,
) -> None:
    """Show which quantizations of a model fit this machine."""
    from rl_mlx.backends.fit import CONTEXT, bandwidth, budget, survey

    if context is not None and context < 1:
        raise InvalidRequest(f"--context must be at least 1, not {context}")
    room = budget(memory)
    found = survey(model)
    length = context or min(CONTEXT, found.facts.context or CONTEXT)
    speed = bandwidth()
    fits = found.fits(length, room, speed)
    if json:
        more = {"name": found.name, "parameters": found.facts.parameters, "context": length}
        more |= {"budget": room, "bandwidth": int(speed), "fits": [asdict(f) for f in fits]}
        print_json(more)
        return
    say(
        f"{plain(found.name)}, {count(found.facts.parameters)} parameters, with {length} tokens of "
        f"context, in {size(room)} of memory at {size(int(speed))}/s"
    )
    rows = [_HEADS, *(_row(fit) for fit in fits)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for first, *others in rows:
        cells = [first.ljust(widths[0]), *map(str.rjust, others, widths[1:])]
        print("  ".join(cells).rstrip())
    best = next((fit for fit in fits if fit.fits), None)
    say(_advice(best))


def _row(fit: Fit) -> tuple[str, ...]:
    return (
        plain(fit.name),
        size(fit.weight_bytes),
        size(fit.memory),
        "yes" if fit.fits else "no",
        "?" if fit.longest is None else str(fit.longest),
        f"{fit.tokens_per_second:.3g}, {fit.speed}",
    )


def _advice(best: Fit | None) -> str:
    if best is None:
        return "none fits: take a smaller model, a shorter --context, or more --memory"
    return f"the largest that fits: {plain(best.name)}"
