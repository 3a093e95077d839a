"""Many clients at once, half of which hang up: afterwards nothing is left of them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SOAK = Path(__file__).parents[2] / "benchmarks" / "soak.py"


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="counts open files in /proc")
def test_nothing_leaks(demo: Path) -> None:
    """The short form of ``benchmarks/soak.py``, which takes two minutes and 200 clients."""
    command = [sys.executable, str(SOAK), "--clients", "20", "--seconds", "4"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    assert found["left"] == {}
    assert min(found["whole"], found["broken off"]) > 0
