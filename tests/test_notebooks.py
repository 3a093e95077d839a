"""The notebooks: they run from first to last cell, and what is kept of them is presentable."""

from __future__ import annotations

import base64
import json
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest

FOLDER = Path(__file__).resolve().parent.parent / "notebooks"
NAMES = (
    "01_quick_start",
    "02_anatomy_of_a_gguf",
    "03_what_quantization_costs",
    "04_kv_cache_quantization",
    "05_speculative_decoding",
    "06_choose_bits",
    "07_batching_and_prefixes",
)
_ABSOLUTE = re.compile(r"(?<![\w.<:/])/(?:[\w.-]+/)+[\w.-]+|\b[A-Za-z]:\\\w")


def read(name: str) -> Any:
    return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)


def code(book: Any) -> list[Any]:
    return [cell for cell in book.cells if cell.cell_type == "code"]


def outputs(book: Any) -> list[Any]:
    return [output for cell in code(book) for output in cell.outputs]


def test_all_are_here():
    assert sorted(path.stem for path in FOLDER.glob("*.ipynb")) == list(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_kept_is_whole_and_says_nothing_of_the_machine(name: str):
    book = read(name)
    nbformat.validate(book)
    first = book.cells[0].source
    assert first.startswith("# ")
    assert "What this shows" in first
    assert "demo" in next(c.source for c in code(book) if "MODEL" in c.source)
    assert [cell.execution_count for cell in code(book)] == list(range(1, len(code(book)) + 1))
    found = outputs(book)
    assert not [o for o in found if o.output_type == "error"]
    assert not [o for o in found if o.get("name") == "stderr"]
    texts = [json.dumps({k: v for k, v in o.items() if k != "data"}) for o in found]
    texts += [v for o in found for k, v in o.get("data", {}).items() if k != "image/png"]
    for text in [*texts, json.dumps(book.metadata)]:
        assert not _ABSOLUTE.search(text), _ABSOLUTE.search(text)
        assert socket.gethostname() not in text
    pictures = [o.data["image/png"] for o in found if "image/png" in o.get("data", {})]
    assert pictures
    assert all(base64.b64decode(p).startswith(b"\x89PNG") for p in pictures)


def test_absolute_paths_are_seen():
    for text in ("see /home/me/model.gguf", "'/tmp/x/y'", r"C:\models"):
        assert _ABSOLUTE.search(text)
    for text in ("</td></tr>", "5/8 and 3/4", "https://example.org/a/b", "org/repo:Q4_K_M"):
        assert not _ABSOLUTE.search(text)


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", NAMES)
def test_it_runs(name: str):
    # In a process of its own, which takes the kernel's sockets with it when it ends.
    program = FOLDER.parent / ".ci" / "notebook.py"
    ran = subprocess.run(
        [sys.executable, str(program), str(FOLDER / f"{name}.ipynb")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert int(ran.stdout.split()[-1]) > 0
