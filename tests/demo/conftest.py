"""The demo model, loaded once, and the forty questions."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rl_mlx import LLM
from rl_mlx.errors import BackendUnavailable


@pytest.fixture(scope="session")
def questions() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(
        Path(__file__).with_name("questions.json").read_text("utf-8")
    )
    return found


@pytest.fixture(scope="module", params=["mlx", "llama.cpp"])
def demo(request: pytest.FixtureRequest) -> Iterator[LLM]:
    try:
        llm = LLM("demo", backend=request.param)
    except BackendUnavailable as error:
        pytest.skip(str(error))
    with llm:
        yield llm
