"""``rl-mlx list``: the models on this machine, whichever program put them there."""

from __future__ import annotations

from rl_mlx.cli.options import Json
from rl_mlx.cli.terminal import note, print_json, size

NAME = "list"


def command(json: Json = False) -> None:
    """List the models on this machine."""
    from rl_mlx.store import installed

    models = list(installed())
    if json:
        rows = [
            {"name": m.name, "bytes": m.bytes, "source": m.source, "path": str(m.path)}
            for m in models
        ]
        print_json(rows)
        return
    if not models:
        note("no models here; get one by: rl-mlx pull org/repo (GGUF: org/repo:Q4_K_M)")
        return
    width = max(len(m.name) for m in models)
    for model in models:
        print(f"{model.name:<{width}}  {size(model.bytes):>8}  {model.source}")
