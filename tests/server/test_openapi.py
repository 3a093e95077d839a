"""The OpenAPI document, and what schemathesis makes of it: the real server under its requests."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest

FUZZ = int(os.environ.get("RL_MLX_FUZZ", "0"))
"""How many bodies are tried; 0: a few. Where it is set, also every boundary of every schema."""


@pytest.fixture(scope="module")
def document(program: Any) -> dict[str, Any]:
    found: dict[str, Any] = httpx.get(program.url + "/openapi.json").json()
    return found


def narrowed(document: dict[str, Any]) -> dict[str, Any]:
    """The same for one model; nothing is downloaded."""
    found: dict[str, Any] = json.loads(json.dumps(document))
    del found["paths"]["/api/pull"]
    for schema in found["components"]["schemas"].values():
        properties = schema.get("properties", {})
        if "model" in properties:
            properties["model"] = {"const": "demo"}
    return found


def test_schemathesis_finds_nothing(program: Any, document: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "openapi.json"
    file.write_text(json.dumps(narrowed(document)))
    command = [sys.executable, "-m", "schemathesis.cli", "run", str(file), "--url", program.url]
    # A body may be as its schema says and still be refused: for a model without tools, say.
    command += ["--exclude-checks", "positive_data_acceptance", "--request-timeout", "60"]
    command += ["--phases", "coverage,fuzzing" if FUZZ else "fuzzing"]
    command += ["--max-examples", str(max(3, FUZZ // 100)), "--seed", "1", "--no-color"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-1000:]
    assert "Tested: 24" in done.stdout, done.stdout[-2000:]
    assert httpx.get(program.url + "/health").status_code == 200
