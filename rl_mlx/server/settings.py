"""How the server is run, as one frozen dataclass."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rl_mlx.errors import InvalidRequest
from rl_mlx.settings import ModelSettings

HOST = "127.0.0.1"
PORT = 8642
_DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*(ms|s|m|h|)")
_FOREVER = 1e9
_SECONDS = {"ms": 0.001, "s": 1.0, "": 1.0, "m": 60.0, "h": 3600.0}


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """What ``rl-mlx serve`` is told. Sizes are bytes, times are seconds.

    ``models`` are loaded at the start and stay; any other installed model is loaded when it is
    asked for and goes ``keep_alive`` after its last request, None for never. ``aliases`` map names,
    or patterns such as ``gpt-*``, to models. ``memory`` is a budget for all models together.
    ``sampling`` are fields of ``SamplingParams`` for requests that do not say. ``keys`` are
    SHA-256 digests of the API keys; with none, no key is asked for. ``hosts`` are the names that
    the Host header may have besides addresses and localhost; ``origins`` the web pages that may
    call, ``*`` for all. ``queue``: how many requests may be under way or waiting. ``grace``: how
    long running requests may go on once the server is told to stop. ``quiet``: after so long
    without an event, a stream gets a comment.
    """

    host: str = HOST
    port: int = PORT
    socket: str | None = None
    models: tuple[str, ...] = ()
    model: ModelSettings = field(default_factory=ModelSettings)
    aliases: Mapping[str, str] = field(default_factory=dict)
    keep_alive: float | None = 300.0
    memory: int | str | None = None
    sampling: Mapping[str, Any] = field(default_factory=dict)
    keys: frozenset[bytes] = frozenset()
    insecure: bool = False
    hosts: tuple[str, ...] = ()
    origins: tuple[str, ...] = ()
    queue: int = 512
    body_limit: int = 16 << 20
    body_time: float = 60.0
    head_time: float = 20.0
    stall_time: float = 60.0
    quiet: float = 10.0
    grace: float = 30.0
    log_json: bool = False
    log_prompts: bool = False

    def __post_init__(self) -> None:
        lowest = {"queue": 1, "body_limit": 1, "grace": 0, "port": 0}
        for name, least in lowest.items():
            if getattr(self, name) < least:
                raise InvalidRequest(f"{name} must be at least {least}, not {getattr(self, name)}")
        if self.port > 65535:
            raise InvalidRequest(f"port must be at most 65535, not {self.port}")
        if self.socket is None and not (self.keys or self.insecure or is_loopback(self.host)):
            raise InvalidRequest(
                f"{self.host} can be reached from other machines: give --api-key-file, or "
                "--insecure to let anybody in"
            )


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches ``host``."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def seconds(value: object, name: str) -> float | None:
    """A duration as Ollama has them: ``300``, ``"5m"``, ``"1h30m"``; None for never (below 0).

    Raises ``InvalidRequest``.
    """
    if isinstance(value, (int, float)) and not isinstance(value, bool) and value == value:
        return float(value) if 0 <= value < _FOREVER else None
    text = value.strip() if isinstance(value, str) else ""
    parts = _DURATION.findall(text.removeprefix("-"))
    if not parts or _DURATION.sub("", text.removeprefix("-")).strip():
        raise InvalidRequest(f"{name} must be seconds, or a duration such as 5m, not {value!r}")
    if text.startswith("-"):
        return None
    total = sum(float(number) * _SECONDS[unit] for number, unit in parts)
    return total if total < _FOREVER else None
