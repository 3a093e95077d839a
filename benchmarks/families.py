"""Measure every family of the tests and write the table of ``docs/families.md``.

``python benchmarks/families.py`` runs ``tests/families/test_families.py`` and keeps the errors that
it records. It needs the ``parity`` and ``dev`` extras. With names of families, those alone are run
and shown.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from rl_mlx.model.families import FAMILIES

ROOT = Path(__file__).resolve().parent.parent
TESTS = ROOT / "tests" / "families" / "test_families.py"
REGISTRY = TESTS.parent / "registry"
PAGE = ROOT / "docs" / "families.md"
START, END = "<!-- table -->\n", "<!-- end of table -->"
COLUMNS = ("safetensors", "gguf", "llama.cpp")
HEADS = ("family", "safetensors", "GGUF", "llama.cpp on the exported GGUF", "implementation")


class Measured:
    """A pytest plugin that keeps what the tests record, and why those that were skipped were."""

    def __init__(self) -> None:
        self.rows: dict[str, dict[str, str]] = {}
        self.failed = False

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Called by pytest after each phase of a test."""
        if "[" not in report.nodeid or (report.when != "call" and not report.skipped):
            return
        family = report.nodeid.rpartition("[")[2].rstrip("]")
        row = self.rows.setdefault(family, {})
        for column, value in report.user_properties:
            row[column] = f"{value:.0e}" if isinstance(value, float) else str(value)
        self.failed |= report.failed


def table(rows: dict[str, dict[str, str]]) -> str:
    """Markdown, a line a family."""
    lines = [HEADS, ("---",) * len(HEADS)]
    for family, row in sorted(rows.items()):
        entry = json.loads((REGISTRY / f"{family}.json").read_text("utf-8"))
        model_type = entry["config"].get("model_type", family)
        by = "ours" if model_type in FAMILIES else "mlx-lm's"
        absent = "unmeasured" if entry.get("transformers") is False else "no"
        lines.append((family, *(row.get(column, absent) for column in COLUMNS), by))
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def main(names: list[str]) -> int:
    """Run the tests, then print the table, and write it where it is of all families."""
    measured = Measured()
    chosen = ["-k", " or ".join(f"[{name}]" for name in names)] if names else []
    pytest.main(["-q", "-p", "no:cacheprovider", str(TESTS), *chosen], [measured])
    made = table(measured.rows)
    if names or measured.failed:
        print(made)
        return int(measured.failed)
    page = PAGE.read_text("utf-8")
    before, rest = page.split(START, 1)
    PAGE.write_text(before + START + made + END + rest.split(END, 1)[1], "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
