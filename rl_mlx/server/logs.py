"""Logs: a line a request, as JSON or for people; never a prompt unless asked for."""

from __future__ import annotations

import json
import logging
from typing import Any

LOGGER = "rl_mlx.server"


def configure(*, as_json: bool) -> None:
    """Send the server's log, and uvicorn's warnings, to stderr."""
    handler = logging.StreamHandler()
    handler.setFormatter(_Json() if as_json else _Plain("%(asctime)s %(levelname)s %(message)s"))
    for name, level in ((LOGGER, logging.INFO), ("uvicorn", logging.WARNING)):
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.setLevel(level)
        logger.propagate = False


class _Json(logging.Formatter):
    """One JSON object a line: the record's own fields, and those of ``extra={"fields": ...}``."""

    def format(self, record: logging.LogRecord) -> str:
        entry: dict[str, Any] = {
            "time": self.formatTime(record, "%Y-%m-%dT%H:%M:%S") + f".{int(record.msecs):03d}",
            "level": record.levelname.lower(),
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            entry["traceback"] = self.formatException(record.exc_info)
        return json.dumps(entry)


class _Plain(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        fields = getattr(record, "fields", {})
        text = super().format(record)
        return text + "".join(f" {name}={value!r}" for name, value in fields.items())
