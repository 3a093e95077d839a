"""Settings as frozen dataclasses: flags over environment over ``config.toml`` over defaults."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from rl_mlx.errors import InvalidRequest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

DTYPES = ("float32", "float16", "bfloat16")
KV_BITS = (4, 6, 8)


@dataclass(frozen=True)
class KVFormat:
    """Bits of the keys and values kept, None for the compute type; the first ``start`` tokens stay
    unquantized.
    """

    keys: int | None = None
    values: int | None = None
    start: int = 0

    @classmethod
    def parse(cls, text: int | str | None) -> KVFormat:
        """``8``, ``"8"``, ``"8/4"`` (keys, values), ``"8/4@512"`` (past the first 512 tokens), or
        None.

        Raises ``InvalidRequest``.
        """
        if text is None:
            return cls()
        match = re.fullmatch(r"(\d+)(?:/(\d+))?(?:@(\d+))?", str(text).strip())
        if match is None or isinstance(text, bool):
            raise InvalidRequest(f"kv_bits must look like 8, 8/4 or 8/4@512, not {text!r}")
        keys = int(match[1])
        values = int(match[2]) if match[2] else keys
        if keys not in KV_BITS or values not in KV_BITS:
            raise InvalidRequest(f"kv_bits must be 4, 6 or 8, not {text!r}")
        return cls(keys, values, int(match[3] or 0))


DENSE_KV = KVFormat()


MAX_PARALLEL = 255  # llama.cpp's 256, less the sequence that logits and embeddings use


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """How a model is loaded; the keyword arguments of ``LLM``.

    ``backend``: ``auto``, ``mlx``, ``llama.cpp`` or the URL of an OpenAI-compatible server.
    ``draft``: a model reference, ``lookup``, ``lookup+REFERENCE`` (both), ``auto`` or None;
    ``draft_tokens`` a step, None for as many as pay. ``context``: tokens, None for the model's own.
    ``kv_bits``: 8, 6, 4, or ``"8/4@512"`` (see ``KVFormat``), None for the compute type.
    ``memory``: a budget in bytes, or a string such as ``"12GB"`` or ``"80%"``. ``prefix_cache``: so
    much of the disk (``"8GB"``) for prefixes that outlive the process, None for none.
    ``parallel``: sequences at once, None for what suits the backend. ``dtype``: ``float32``,
    ``float16``, ``bfloat16``, or None for what suits the device. ``backend_options``: what only one
    backend knows (``LlamaCppOptions``, ``RemoteOptions``), which raises for others.
    """

    backend: str = "auto"
    draft: str | None = None
    draft_tokens: int | None = None
    context: int | None = None
    kv_bits: int | str | None = None
    memory: int | str | None = None
    prefix_cache: int | str | None = None
    parallel: int | None = None
    dtype: str | None = None
    backend_options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("backend", "draft", "dtype"):
            text = getattr(self, name)
            if not isinstance(text, str) and (text is not None or name == "backend"):
                raise InvalidRequest(f"{name} must be a text, not {text!r}")
        if self.dtype is not None and self.dtype not in DTYPES:
            raise InvalidRequest(f"dtype must be one of {', '.join(DTYPES)}, not {self.dtype!r}")
        KVFormat.parse(self.kv_bits)
        tokens = self.draft_tokens
        if tokens is not None and (not isinstance(tokens, int) or not 1 <= tokens <= 16):
            raise InvalidRequest(f"draft_tokens must be between 1 and 16, not {tokens!r}")
        if self.parallel is not None and (
            type(self.parallel) is not int or not 1 <= self.parallel <= MAX_PARALLEL
        ):
            raise InvalidRequest(
                f"parallel must be between 1 and {MAX_PARALLEL}, not {self.parallel!r}"
            )
        if self.context is not None and (type(self.context) is not int or self.context < 1):
            raise InvalidRequest(f"context must be at least 1 token, not {self.context!r}")
        if not isinstance(self.backend_options, Mapping):
            raise InvalidRequest(
                f"backend_options must be a table of names and values, not {self.backend_options!r}"
            )
        if self.memory is not None:
            parse_memory(self.memory, total=1 << 40)
        if self.prefix_cache is not None:
            parse_size("prefix_cache", self.prefix_cache)


_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_BINARY_UNITS = {"ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


def parse_memory(text: int | str, total: int) -> int:
    """Bytes from ``8000000000``, ``"8GB"``, ``"8GiB"``, ``"8g"``, or ``"75%"`` of ``total``."""
    return parse_size("memory", text, total)


def parse_size(name: str, text: int | str, total: int | None = None) -> int:
    """As ``parse_memory``, for the setting ``name``; without a ``total`` no share of it either.

    Raises ``InvalidRequest``.
    """
    if isinstance(text, int) and not isinstance(text, bool):
        size: float = text
    else:
        shares = {} if total is None else {"%": total / 100}
        factors: Mapping[str, float] = {**_UNITS, **_BINARY_UNITS, **shares}
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(%|[kmgt]?i?b?)", str(text).strip().lower())
        unit = match[2].removesuffix("b") if match else ""
        if match is None or unit not in factors:
            forms = "12GB or 12GiB" if total is None else "12GB, 12GiB or 80%"
            raise InvalidRequest(f"{name} must look like {forms}, not {text!r}")
        size = float(match[1]) * factors[unit]
    if not 0 < size <= 1 << 60:
        raise InvalidRequest(f"{name} must be above 0, not {text!r}")
    return int(size)


def config_path(environ: Mapping[str, str] = os.environ) -> Path:
    """``$RL_MLX_CONFIG``, else ``rl-mlx/config.toml`` in ``$XDG_CONFIG_HOME`` or ``~/.config``."""
    if "RL_MLX_CONFIG" in environ:
        return Path(environ["RL_MLX_CONFIG"])
    base = environ.get("XDG_CONFIG_HOME") or str(Path.home() / ".config")
    return Path(base) / "rl-mlx" / "config.toml"


def load_settings(
    flags: Mapping[str, Any], environ: Mapping[str, str] = os.environ
) -> ModelSettings:
    """Settings with ``flags`` (those not None) over ``RL_MLX_*`` over the file over the defaults;
    of ``backend_options`` each one by itself.

    Raises ``InvalidRequest`` for an unknown key in the file or a value of the wrong type anywhere.
    """
    known = {f.name for f in fields(ModelSettings)}
    values = _read_file(config_path(environ), known)
    for name in known - {"backend_options"}:  # a table has no form as an environment variable
        text = environ.get(f"RL_MLX_{name.upper()}")
        if text:
            values[name] = _parse(name, text)
    in_file = values.get("backend_options", {})
    values.update({k: v for k, v in flags.items() if v is not None})
    if isinstance(in_file, dict):
        values["backend_options"] = {**in_file, **(flags.get("backend_options") or {})}
    return ModelSettings(**values)


def _read_file(path: Path, known: set[str]) -> dict[str, Any]:
    try:
        table = tomllib.loads(path.read_text("utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError, RecursionError) as error:
        raise InvalidRequest(f"cannot read the settings in {path}: {error}") from error
    for name in table:
        if name not in known:
            raise InvalidRequest(
                f"unknown setting {name!r} in {path}; known are {', '.join(sorted(known))}"
            )
    return table


def _parse(name: str, text: str) -> Any:
    if name not in {"context", "draft_tokens", "parallel"}:
        return text
    try:
        return int(text)
    except ValueError:
        raise InvalidRequest(
            f"RL_MLX_{name.upper()} must be a whole number, not {text!r}"
        ) from None
