"""``rl-mlx doctor``: what works on this machine, and the command that mends what does not."""

from __future__ import annotations

import json as json_
import os
import platform
import signal
import subprocess
import sys
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import typer

from rl_mlx import __version__
from rl_mlx.cli.options import Json
from rl_mlx.cli.terminal import print_json, size
from rl_mlx.settings import load_settings

NAME = "doctor"
_PACKAGES = (
    "mlx", "mlx-lm", "xllamacpp", "llama-cpp-python", "numpy", "tokenizers", "safetensors",
    "huggingface-hub", "llguidance", "rich", "prompt-toolkit", "typer",
)  # fmt: skip
# In a process of its own: a wheel that is built for another CPU kills whoever imports it.
_PROBE = (
    "import dataclasses, json; from rl_mlx.backends.hardware import report; "
    "print(json.dumps(dataclasses.asdict(report())))"
)
_TIMEOUT = 120.0
_KERNELS = "GGUF for MLX by compiled loops"
_NO_KERNELS = (
    "GGUF for MLX by NumPy, in several times the time: install a C compiler, then rl-mlx once more"
)


def command(json: Json = False) -> None:
    """Say what works here, and how to mend what does not."""
    found = examine()
    if json:
        print_json(found)
    else:
        _print(found)
    if not any(backend["available"] for backend in found["backends"]):
        raise typer.Exit(1)


def examine() -> dict[str, Any]:
    """Everything that ``doctor`` says, as JSON types."""
    from rl_mlx.backends.choice import choose
    from rl_mlx.backends.llamacpp.options import in_force
    from rl_mlx.convert.kernels import library

    settings = load_settings({})
    chosen = {"choice": choose(settings).why, "options": in_force(settings)}
    hardware = probe() | chosen
    return {
        "rl_mlx": __version__,
        "python": platform.python_version(),
        "executable": sys.executable,
        "system": platform.platform(),
        "backends": [hardware.pop("mlx"), hardware.pop("llamacpp")],
        "hardware": hardware,
        "kernels": library() is not None,
        "packages": {name: _version(name) for name in _PACKAGES},
        "stores": _stores(),
        "folders": _folders(),
    }


def probe(code: str = _PROBE, timeout: float = _TIMEOUT) -> dict[str, Any]:
    """``hardware.report()`` of a process that loads the backends; what befell it where it died."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True, text=True, timeout=timeout, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return _dead(f"loading it took longer than {timeout:.0f} s")
    if done.returncode < 0:
        name = signal.Signals(-done.returncode).name
        return _dead(f"loading it died of {name}: a wheel is built for another processor")
    if done.returncode > 0:
        return _dead((done.stderr.strip().splitlines() or ["loading it failed"])[-1])
    report: dict[str, Any] = json_.loads(done.stdout)
    return report


def _dead(reason: str) -> dict[str, Any]:
    backends = {
        key: {"name": name, "available": False, "version": "", "devices": [], "reason": reason}
        for key, name in (("mlx", "mlx"), ("llamacpp", "llama.cpp"))
    }
    return {**backends, "advice": ["pip install --force-reinstall rl-mlx"]}


def _version(package: str) -> str | None:
    from importlib import metadata  # a tenth of the time of --help

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _stores() -> list[dict[str, Any]]:
    from rl_mlx.store import installed, places

    roots = {
        "huggingface": [places.hub_cache()],
        "ollama": [places.ollama()],
        "lmstudio": [places.lmstudio()],
        "llama.cpp": places.llamacpp(),
    }
    models = list(installed())
    rows = []
    for source, paths in roots.items():
        mine = [m for m in models if m.source == source]
        found = next((p for p in paths if p.is_dir()), paths[-1])
        rows.append(
            {
                "source": source,
                "path": str(found),
                "exists": found.is_dir(),
                "models": len(mine),
                "bytes": sum(m.bytes for m in mine),
            }
        )
    return rows


def _folders() -> list[dict[str, Any]]:
    from rl_mlx.cli.history import history_path
    from rl_mlx.settings import config_path
    from rl_mlx.store import places

    wanted = {
        "models": places.hub_cache(),
        "history": history_path().parent,
        "settings": config_path().parent,
    }
    return [
        {"what": what, "path": str(path), "writable": writable(path)}
        for what, path in wanted.items()
    ]


def writable(path: Path) -> bool:
    """True where ``path`` can be written to, or made."""
    place = next(p for p in (path, *path.parents) if p.exists())
    return place.is_dir() and os.access(place, os.W_OK | os.X_OK)


def options_text(options: Mapping[str, Any], width: int = 96) -> str:
    """Options as wrapped text, as they would be typed; empty where llama.cpp decides."""
    words = []
    for name, value in options.items():
        parts = value if isinstance(value, (list, tuple)) else [] if value is None else [value]
        words.append(f"{name}={','.join(str(p).lower() for p in parts)}")
    return textwrap.fill(" ".join(words), width, break_long_words=False, break_on_hyphens=False)


def _print(found: dict[str, Any]) -> None:
    print(f"rl-mlx {found['rl_mlx']}, Python {found['python']} ({found['executable']})")
    print(found["system"])
    hardware = found["hardware"]
    if "cpu" in hardware:
        cores = f"{hardware['cores']} cores" if hardware["cores"] > 1 else "1 core"
        print(f"{hardware['cpu']}, {cores}, {size(hardware['memory_total'])} of memory")
    for gpu in hardware.get("gpus", ()):
        print(f"graphics: {gpu['name']}")
    print("\nbackends")
    for backend in found["backends"]:
        on = ", ".join(f"{d['acceleration']} ({d['description']})" for d in backend["devices"])
        state = (
            f"{backend['version']}, works on {on}"
            if backend["available"]
            else f"does not work: {backend['reason']}"
        )
        print(f"  {backend['name']:<12} {state}")
    print(f"  {'taken':<12} {hardware['choice']}")
    print(f"  {'repacking':<12} {_KERNELS if found['kernels'] else _NO_KERNELS}")
    for line in hardware["advice"]:
        print(f"  advice: {line}")
    if hardware["options"]:
        print("\noptions of llama.cpp; change one by -O NAME=VALUE")
        print(textwrap.indent(options_text(hardware["options"]), "  "))
    print("\npackages")
    for name, version in found["packages"].items():
        print(f"  {name:<16} {version or 'not installed'}")
    print("\nmodels of")
    for store in found["stores"]:
        there = f"{store['models']}, {size(store['bytes'])}" if store["exists"] else "none"
        print(f"  {store['source']:<12} {there:<14} {store['path']}")
    print("\nfolders")
    for folder in found["folders"]:
        state = "" if folder["writable"] else "  NOT WRITABLE"
        print(f"  {folder['what']:<12} {folder['path']}{state}")
