"""Files and folders that take their name when they are whole, and not before.

They are written under a hidden name beside it, which says what process writes there; what a killed
process left is removed by the next that goes for the same name.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from glob import escape
from pathlib import Path

from rl_mlx.errors import DestinationExists, OutOfMemory


@contextmanager
def new_folder(destination: Path, *, force: bool) -> Iterator[Path]:
    """A folder beside ``destination``, which takes its name when all went well, else is removed.

    Raises ``DestinationExists`` where something is in the way (with ``force`` only a model folder
    is replaced, and after the new one is complete), and ``OutOfMemory`` where the disk is full.
    """
    _sweep(destination)
    _check_free(destination, force=force)
    destination.parent.mkdir(parents=True, exist_ok=True)
    part, old = (_beside(destination, end, os.getpid()) for end in ("part", "old"))
    try:
        with _room_on_disk(destination):
            part.mkdir()
            yield part
            _to_disk(*part.rglob("*"))
            if destination.exists():
                destination.rename(old)
            part.rename(destination)
    finally:
        if old.exists() and not destination.exists():
            old.rename(destination)
        for left in (part, old):
            shutil.rmtree(left, ignore_errors=True)


@contextmanager
def new_file(destination: Path) -> Iterator[Path]:
    """A file's name beside ``destination``, which it takes when all went well, else is removed.

    Raises ``OutOfMemory`` where the disk is full.
    """
    destination.parent.mkdir(parents=True, exist_ok=True)
    _sweep(destination)
    part = _beside(destination, "part", os.getpid())
    try:
        with _room_on_disk(destination):
            yield part
            _to_disk(part)
            part.replace(destination)
    finally:
        part.unlink(missing_ok=True)


def _to_disk(*paths: Path) -> None:
    """Wait until files are on the disk: a power cut leaves no hollow one under the final name."""
    for path in paths:
        if path.is_file():
            with path.open("rb+" if os.name == "nt" else "rb") as file:  # it may be read-only
                os.fsync(file)


@contextmanager
def _room_on_disk(destination: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OutOfMemory(
                f"{destination}: the disk is full; make room and start again"
            ) from error
        raise


def _check_free(destination: Path, *, force: bool) -> None:
    if not os.path.lexists(destination):
        return
    if not force:
        raise DestinationExists(f"{destination} exists; choose another name or use --force")
    holds = [p.name for p in destination.iterdir()] if destination.is_dir() else [""]
    if destination.is_symlink() or (holds and "config.json" not in holds):
        raise DestinationExists(
            f"{destination} is no model folder, so even --force leaves it; choose another name"
        )


def _beside(destination: Path, end: str, process: int) -> Path:
    return destination.with_name(f".{destination.name}.{process}.{end}")


def _sweep(destination: Path) -> None:
    """Remove what killed processes left; a model that one had moved aside comes back."""
    for end in ("old", "part"):
        for left in destination.parent.glob(f".{escape(destination.name)}.*.{end}"):
            owner = left.name.split(".")[-2]
            if not owner.isdigit() or _is_alive(int(owner)):
                continue
            if left.is_file():
                left.unlink(missing_ok=True)
                continue
            if end == "old" and not destination.exists():
                left.rename(destination)
            shutil.rmtree(left, ignore_errors=True)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # somebody else's
        return True
    return process != os.getpid()  # an earlier one had the number of this


def check_disk(
    what: object, needed: int, folder: Path, advice: str = "make room or choose another disk"
) -> None:
    """Raise ``OutOfMemory``, with ``advice``, where ``needed`` bytes do not fit on a folder's disk.

    The folder may have to be made; a disk that tells nothing is taken to have room.
    """
    folder = folder.absolute()
    place = next(p for p in (folder, *folder.parents) if p.exists())
    with suppress(OSError):
        free = shutil.disk_usage(place).free
        if free < needed:
            raise OutOfMemory(
                f"{what} takes {needed / 1e9:.1f} GB and the disk of {folder} has "
                f"{free / 1e9:.1f} GB free; {advice}"
            )
