"""Fixtures of all tests."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data beside the project; tests that need it are skipped without it."""
    path = ROOT.parent / "shared"
    if not path.is_dir():
        pytest.skip("needs the test data in ../shared, which is not here")
    return path
