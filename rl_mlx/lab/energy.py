"""Energy that the processor says it took: RAPL's counters under Linux, where they may be read.

They count whole packages, other programs included. macOS shows energy to root alone (powermetrics),
so there is none there.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

ROOT = Path("/sys/class/powercap")


class Meter:
    """Joules since it was made. ``packages`` counts the processors whose counters can be read."""

    def __init__(self, root: Path = ROOT) -> None:
        self._ranges = {
            folder: limit
            for folder in sorted(root.glob("intel-rapl:*"))
            if folder.name.count(":") == 1
            and (limit := _number(folder / "max_energy_range_uj")) is not None
            and _number(folder / "energy_uj") is not None
        }
        self.packages = len(self._ranges)
        self._start = self._read()

    def joules(self) -> float | None:
        """None where nothing can be read."""
        now = self._read()
        if not now or now.keys() != self._start.keys():
            return None
        # The counters begin again at 0 behind their range.
        spent = ((now[f] - self._start[f]) % (self._ranges[f] + 1) for f in now)
        return sum(spent) / 1e6

    def _read(self) -> Mapping[Path, int]:
        values = {folder: _number(folder / "energy_uj") for folder in self._ranges}
        return {folder: value for folder, value in values.items() if value is not None}


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None
