"""What takes its name only when it is whole."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rl_mlx.convert.staging import new_file, new_folder
from rl_mlx.errors import OutOfMemory


@pytest.fixture
def dead() -> int:
    """The number of a process that is gone."""
    done = subprocess.Popen([sys.executable, "-c", ""])
    done.wait()
    return done.pid


@pytest.mark.parametrize("name", ["model", "m[1]*.gguf"])
def test_what_dead_processes_left_goes_and_what_others_write_stays(
    name: str, dead: int, tmp_path: Path
) -> None:
    for process in (dead, os.getppid()):
        (tmp_path / f".{name}.{process}.part").mkdir()
    (tmp_path / f".m1.gguf.{dead}.part").write_text("of another name")
    with new_folder(tmp_path / name, force=False) as part:
        (part / "config.json").write_text("{}")
    left = {p.name for p in tmp_path.iterdir()}
    assert left == {name, f".{name}.{os.getppid()}.part", f".m1.gguf.{dead}.part"}
    with new_file(tmp_path / "m1.gguf") as file:
        file.write_text("whole")
    assert not (tmp_path / f".m1.gguf.{dead}.part").exists()
    assert (tmp_path / "m1.gguf").read_text() == "whole"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_leaves_what_was_there(number: int, tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_text("old")

    def fail(part: Path) -> None:
        part.write_text("half")
        raise OSError(number, "no room")

    with (
        pytest.raises(OutOfMemory, match="disk is full"),
        new_file(tmp_path / "model.gguf") as part,
    ):
        fail(part)
    with pytest.raises(PermissionError), new_file(tmp_path / "model.gguf"):
        raise PermissionError
    assert [p.name for p in tmp_path.iterdir()] == ["model.gguf"]
    assert (tmp_path / "model.gguf").read_text() == "old"


def test_all_of_it_is_on_the_disk_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[int] = []
    sync = os.fsync

    def fsync(file: Any) -> None:
        assert not {"model", "m.gguf"} & {p.name for p in tmp_path.iterdir()} - {*named}
        synced.append(Path(file.name).stat().st_size)
        sync(file)

    named: list[str] = []
    monkeypatch.setattr(os, "fsync", fsync)
    with new_folder(tmp_path / "model", force=False) as part:
        (part / "below").mkdir()
        (part / "config.json").write_text("{}")
        (part / "below" / "long.json").write_text("[1, 2, 3]")
    named.append("model")
    assert sorted(synced) == [2, 9]
    with new_file(tmp_path / "m.gguf") as file:
        file.write_text("whole")
    assert sorted(synced) == [2, 5, 9]
