"""Files of a model folder, by name and as JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

MAX_JSON = 64 << 20
"""Bytes; a larger file is none of a model's."""


def is_weights(file: str) -> bool:
    """True for the safetensors that make a model: at the top, and not Mistral's second copy."""
    return "/" not in file and file.endswith(".safetensors") and not file.startswith("consolidated")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty where there is none that can be read."""
    try:
        if path.stat().st_size > MAX_JSON:
            return {}
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
