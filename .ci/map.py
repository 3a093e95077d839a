#!/usr/bin/env python3
"""Write the map into README.md: each module with the first sentence of its docstring."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("rl_mlx", "convert", "benchmarks")


def first_sentence(path: Path) -> str:
    """What a module says it is."""
    text = ast.get_docstring(ast.parse(path.read_text("utf-8"))) or ""
    paragraph = " ".join(text.split("\n\n")[0].split())
    return paragraph.split(". ")[0].rstrip(".:")


def lines() -> list[str]:
    """The map, in the order of the folders."""
    found = []
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*.py")):
            name = path.relative_to(ROOT).as_posix()
            if path.name != "__init__.py" and not name.startswith("rl_mlx/convert/"):
                found.append(f"- `{name}`: {first_sentence(path)}")
    return found


def mapped(readme: str) -> str:
    """The README with today's map between its marks."""
    start, end = "<!-- map -->\n", "<!-- end of map -->"
    before, rest = readme.split(start, 1)
    return before + start + "\n".join(lines()) + "\n" + end + rest.split(end, 1)[1]


if __name__ == "__main__":
    path = ROOT / "README.md"
    path.write_text(mapped(path.read_text("utf-8")), "utf-8")
