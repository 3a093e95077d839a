"""``rl-mlx pull``: download a model, or bring it up to date."""

from __future__ import annotations

from typing import Annotated

import typer

from rl_mlx.cli.options import Json
from rl_mlx.cli.terminal import print_json
from rl_mlx.errors import InvalidRequest

NAME = "pull"


def command(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="org/repo, org/repo:Q4_K_M, or its address.")
    ],
    json: Json = False,
) -> None:
    """Download a model, or bring it up to date."""
    from rl_mlx.store import hub

    ref = hub.HubRef.parse(model)
    if ref is None:
        raise InvalidRequest(f"{model!r} is not on Hugging Face; write org/repo or org/repo:Q4_K_M")
    files = hub.download(ref)
    if json:
        print_json({"name": files.name, "path": str(files.path)})
    else:
        print(f"{files.name} is ready: rl-mlx chat {files.name}")
