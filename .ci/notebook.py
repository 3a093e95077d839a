#!/usr/bin/env python3
"""Run notebooks from the first cell to the last: ``.ci/notebook.py [--keep] FILE...``.

``--keep`` writes what they printed and drew back into the files, as it is committed. Each runs in
an empty folder, over sockets that are files: no ports that another program might take.
"""

from __future__ import annotations

import sys
import tempfile
from copy import deepcopy
from pathlib import Path
from typing import Any

import nbformat
from jupyter_client import AsyncKernelManager
from nbclient import NotebookClient


def run(book: Any) -> None:
    """Execute all cells; raises what nbclient raises for an error in one."""
    metadata = deepcopy(book.metadata)  # which would else say what Python ran here
    with tempfile.TemporaryDirectory(prefix="nb") as sockets, tempfile.TemporaryDirectory() as here:
        kernel = AsyncKernelManager(kernel_name="python3", transport="ipc", ip=f"{sockets}/k")
        client = NotebookClient(
            book, km=kernel, timeout=1000, startup_timeout=300,
            record_timing=False, coalesce_streams=True,
        )  # fmt: skip
        client.execute(cwd=here)
    book.metadata = metadata
    for cell in book.cells:
        cell.metadata.clear()


def main(arguments: list[str]) -> None:
    """Run each file; a line with its name and how many pictures it drew."""
    keep = "--keep" in arguments
    for path in (Path(name) for name in arguments if name != "--keep"):
        book = nbformat.read(path, as_version=4)
        run(book)
        outputs = [output for cell in book.cells for output in cell.get("outputs", [])]
        print(path.stem, sum("image/png" in output.get("data", {}) for output in outputs))
        if keep:
            nbformat.write(book, path)


if __name__ == "__main__":
    main(sys.argv[1:])
