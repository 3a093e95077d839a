"""Numbers of a configuration that cannot be are refused in a line, from folders and files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest

from rl_mlx import LLM
from rl_mlx.convert import export
from rl_mlx.convert.gguf.weights import GGUFWeights
from rl_mlx.errors import FormatError


@pytest.fixture
def granite(make_folder: Callable[[dict[str, Any]], Path], named: Callable[[str], Any]) -> Path:
    return make_folder(named("granite"))


def test_a_folder_that_divides_by_zero(granite: Path) -> None:
    config = json.loads((granite / "config.json").read_text("utf-8"))
    (granite / "config.json").write_text(json.dumps({**config, "logits_scaling": 0.0}), "utf-8")
    with pytest.raises(FormatError, match="divisor"):
        LLM(str(granite), backend="mlx")


def test_a_file_that_divides_by_zero(granite: Path) -> None:
    file = granite.with_suffix(".gguf")
    export(granite, file)
    reader = gguf.GGUFReader(file, "r+")
    reader.fields["granite.logit_scale"].parts[-1][0] = 0.0
    reader.data.flush()
    with pytest.raises(FormatError, match=r"granite\.logit_scale cannot be 0\.0"):
        GGUFWeights(file)
