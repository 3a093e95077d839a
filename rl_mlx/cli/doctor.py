"""``rl-mlx doctor``: what works on this machine, and the command that mends what does not."""

from __future__ import annotations

import os
import platform
import signal
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import typer

from rl_mlx import __version__
from rl_mlx.cli.options import Json
from rl_mlx.cli.terminal import print_json, size

NAME = "doctor"
_PACKAGES = (
    "mlx", "mlx-lm", "xllamacpp", "numpy", "tokenizers", "safetensors", "huggingface-hub",
    "llguidance", "rich", "prompt-toolkit", "typer",
)  # fmt: skip
# Each is tried in a process of its own: a wheel for another CPU kills the one that imports it.
_PROBES = {
    "mlx": "import mlx.core as mx; mx.eval(mx.ones(2) + 1); print(mx.default_device())",
    "llama.cpp": (
        "from rl_mlx.backends.llamacpp.library import open_library; "
        "print(', '.join(d[1] for d in open_library().devices()))"
    ),
}
_TIMEOUT = 60.0


def command(json: Json = False) -> None:
    """Say what works here, and how to mend what does not."""
    report = examine()
    if json:
        print_json(report)
    else:
        _print(report)
    if not any(backend["works"] for backend in report["backends"]):
        raise typer.Exit(1)


def examine() -> dict[str, Any]:
    """Everything ``doctor`` says, as JSON types."""
    from rl_mlx.backends import machine

    return {
        "rl_mlx": __version__,
        "python": platform.python_version(),
        "executable": sys.executable,
        "system": platform.platform(),
        "cpu": machine.cpu_name(),
        "cores": machine.physical_cores(),
        "memory": machine.memory_total(),
        "memory_available": machine.memory_available(),
        "gpus": [asdict(gpu) for gpu in machine.gpus()],
        "packages": {name: _version(name) for name in _PACKAGES},
        "backends": [_probe(name, code) for name, code in _PROBES.items()],
        "stores": _stores(),
        "folders": _folders(),
    }


def _version(package: str) -> str | None:
    from importlib import metadata  # a tenth of the time of --help

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _probe(name: str, code: str) -> dict[str, Any]:
    """Try a backend; ``detail`` is its device, or what went wrong, and ``fix`` a command."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True, text=True, timeout=_TIMEOUT, check=False,
        )  # fmt: skip
        said, failed, code_ = done.stdout.strip(), done.stderr.strip(), done.returncode
    except subprocess.TimeoutExpired:
        said, failed, code_ = "", f"no answer in {_TIMEOUT:.0f} s", 1
    detail = said if code_ == 0 else (failed.splitlines() or [""])[-1]
    if code_ < 0:
        detail = (
            f"it dies of {signal.Signals(-code_).name}: its wheel is built for another processor"
        )
    fix = None if code_ == 0 else _fix(name)
    return {"name": name, "works": code_ == 0, "detail": detail, "fix": fix}


def _fix(name: str) -> str:
    if name == "llama.cpp":
        return 'pip install "rl-mlx[llamacpp]"'
    return 'pip install "mlx[cpu]"' if sys.platform == "linux" else "pip install mlx"


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
        found = next((p for p in paths if p.is_dir()), paths[0])
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
        {"what": what, "path": str(path), "writable": _writable(path)}
        for what, path in wanted.items()
    ]


def _writable(path: Path) -> bool:
    """True where ``path`` can be written to, or made."""
    place = next(p for p in (path, *path.parents) if p.exists())
    return place.is_dir() and os.access(place, os.W_OK | os.X_OK)


def _print(report: dict[str, Any]) -> None:
    print(f"rl-mlx {report['rl_mlx']}, Python {report['python']} ({report['executable']})")
    print(f"{report['system']}")
    print(f"{report['cpu']}, {report['cores']} cores, {size(report['memory'])} of memory")
    for gpu in report["gpus"]:
        print(f"graphics: {gpu['name']}")
    print("\nbackends")
    for backend in report["backends"]:
        state = "works on" if backend["works"] else "does not work:"
        print(f"  {backend['name']:<12} {state} {backend['detail']}")
        if backend["fix"]:
            print(f"  {'':<12} mend it by: {backend['fix']}")
    print("\npackages")
    for name, version in report["packages"].items():
        print(f"  {name:<16} {version or 'not installed'}")
    print("\nmodels of")
    for store in report["stores"]:
        there = f"{store['models']} models, {size(store['bytes'])}" if store["exists"] else "none"
        print(f"  {store['source']:<12} {there:<20} {store['path']}")
    print("\nfolders")
    for folder in report["folders"]:
        state = "" if folder["writable"] else "  NOT WRITABLE"
        print(f"  {folder['what']:<12} {folder['path']}{state}")
