"""``rl-mlx rm``: delete a downloaded model."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from rl_mlx.cli.terminal import is_terminal, size
from rl_mlx.errors import InvalidRequest, ModelNotFound

NAME = "rm"
_OTHERS = {
    "ollama": "it is Ollama's: ollama rm {name}",
    "lmstudio": "it is LM Studio's: delete it there",
    "llama.cpp": "it is llama.cpp's: delete {path}",
    "built in": "it is part of rl-mlx",
}


def command(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A name that rl-mlx list shows.")],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Delete a model from the Hugging Face cache."""
    from rl_mlx.store import installed, remove

    found = next((m for m in installed() if m.name == model), None)
    if found is None:
        raise ModelNotFound(f"no model {model!r} here; rl-mlx list shows the names")
    if found.source in _OTHERS:
        name = found.name.removeprefix("ollama:")
        why = _OTHERS[found.source].format(name=name, path=found.path)
        raise InvalidRequest(f"{found.name} stays: {why}")
    if not yes:
        if not is_terminal(sys.stdin):
            raise InvalidRequest(f"to delete {found.name} without being asked, add --yes")
        if not typer.confirm(f"Delete {found.name} ({size(found.bytes)})?", err=True):
            raise typer.Exit(1)
    print(f"deleted {found.name}, {size(remove(found))} freed")
