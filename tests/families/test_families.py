"""Every family: safetensors and GGUF, on MLX and on llama.cpp, against transformers.

``benchmarks/families.py`` writes the measured errors into ``docs/families.md``.
"""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from rl_mlx import LLM
from rl_mlx.convert import export
from rl_mlx.convert.gguf.mapping import architecture
from rl_mlx.convert.gguf.names import gguf_name
from rl_mlx.convert.hfconfig import bilingual
from rl_mlx.convert.layout import layout

needs_llamacpp = pytest.mark.skipif(
    importlib.util.find_spec("xllamacpp") is None or sys.platform == "win32",
    reason="needs llama.cpp's binding, whose C API is hidden on Windows",
)
Entry = dict[str, Any]
Record = Callable[[str, object], None]


def logits(model: Path, ids: list[int], backend: str = "mlx") -> np.ndarray:
    with LLM(str(model), backend=backend, dtype="float32") as llm:
        return llm.logits(ids)


def error(got: np.ndarray, want: np.ndarray, same: float = 1.0) -> float:
    """Relative L2, where at least ``same`` of the positions have the same best token."""
    assert got.shape == want.shape
    assert (got.argmax(-1) == want.argmax(-1)).mean() >= same
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def exported(family: Entry, folder: Path) -> Path:
    if "gguf" in family:
        pytest.skip(family["gguf"])
    export(folder, folder.with_suffix(".gguf"))
    return folder.with_suffix(".gguf")


def test_names_are_those_of_gguf_py(family: Entry) -> None:
    if "gguf" in family:
        pytest.skip(family["gguf"])
    config = bilingual(family["config"])
    assert architecture(config["model_type"]) in gguf.MODEL_ARCH_NAMES.values()
    known = set(gguf.TENSOR_NAMES.values())  # which architecture has which, llama.cpp checks
    for name in layout(config, 10_000):
        target = gguf_name(config["model_type"], name)
        stem = re.sub(r"^blk\.\d+", "blk.{bid}", target).removesuffix(".weight")
        assert stem.removesuffix(".bias") in known, name


def test_transformers_has_our_logits(
    family: Entry,
    transformers_folder: Callable[[Entry], tuple[Path, np.ndarray]],
    ids: list[int],
    record_property: Record,
) -> None:
    folder, want = transformers_folder(family)
    found = error(logits(folder, ids), want)
    record_property("safetensors", found)
    assert found < 1e-3
    file = exported(family, folder)
    found = error(logits(file, ids), want)
    record_property("gguf", found)
    assert found < 1e-3


@needs_llamacpp
def test_llamacpp_has_our_logits(
    family: Entry, make_folder: Callable[[Entry], Path], ids: list[int], record_property: Record
) -> None:
    if "gguf" in family:
        pytest.skip(family["gguf"])
    folder = make_folder(family)
    file = exported(family, folder)
    want = logits(folder, ids)
    assert error(logits(file, ids), want) < 1e-5
    known = family.get("llama.cpp", {})
    found = error(logits(file, ids, "llama.cpp"), want, known.get("same", 1.0))
    record_property("llama.cpp", found)
    assert found < known.get("bound", 2e-3)
