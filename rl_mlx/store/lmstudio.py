"""LM Studio's folder, read in place: ``models/<publisher>/<model>/<files>``."""

from __future__ import annotations

from collections.abc import Iterator

from rl_mlx.store import places
from rl_mlx.store.models import InstalledModel, folders, models_in

SOURCE = "lmstudio"


def installed(repo: str | None = None) -> Iterator[InstalledModel]:
    """Its models, or those of one ``publisher/model``."""
    for publisher in folders(places.lmstudio()):
        for folder in folders(publisher):
            name = f"{publisher.name}/{folder.name}"
            if repo is None or name.casefold() == repo.casefold():
                yield from models_in(folder, name, SOURCE)
