"""Which backend runs a model, and why."""

from __future__ import annotations

import platform
import sys
from dataclasses import dataclass, replace

from rl_mlx.backends.base import Backend
from rl_mlx.errors import BackendUnavailable, InvalidRequest, UnsupportedModel
from rl_mlx.settings import ModelSettings
from rl_mlx.store import ModelFiles

NAMES = ("auto", "mlx", "llama.cpp")


@dataclass(frozen=True)
class Choice:
    """Backends in the order they are tried, and the reason for the first one in a line."""

    names: tuple[str, ...]
    why: str


def is_url(backend: str) -> bool:
    """Whether ``backend`` names a server rather than a library."""
    return backend.startswith(("http://", "https://"))


def choose(settings: ModelSettings) -> Choice:
    """The order for ``settings`` on this machine. Raises ``InvalidRequest`` for an unknown name."""
    backend = settings.backend
    if is_url(backend):
        return Choice((backend,), f"{backend} was asked for")
    if backend not in NAMES:
        raise InvalidRequest(
            f"unknown backend {backend!r}; known are {', '.join(NAMES)} and the URL of a server"
        )
    if backend != "auto":
        return Choice((backend,), f"{backend} was asked for")
    if settings.backend_options:
        names = ", ".join(settings.backend_options)
        return Choice(("llama.cpp",), f"llama.cpp, because {names} is for it alone")
    if sys.platform == "darwin" and platform.machine() == "arm64":
        return Choice(("mlx", "llama.cpp"), "mlx, because this is Apple Silicon")
    if settings.dtype == "float32":
        why = "mlx, because llama.cpp rounds activations where float32 was asked for"
        return Choice(("mlx", "llama.cpp"), why)
    return Choice(("llama.cpp", "mlx"), "llama.cpp, because this is not Apple Silicon")


def open_chosen(files: ModelFiles, settings: ModelSettings) -> Backend:
    """Open ``files`` on the first backend of the choice that can; what others said goes to the
    notes.
    """
    choice = choose(settings)
    refusals: list[str] = []
    for name in choice.names:
        try:
            backend = _open(name, files, settings)
        except (BackendUnavailable, UnsupportedModel) as error:
            if len(choice.names) == 1:
                raise
            refusals.append(f"{name}: {error}")
            if len(refusals) == len(choice.names):
                raise type(error)("; ".join(refusals)) from error
        else:
            notes = (*backend.info.notes, *(f"not on {refusal}" for refusal in refusals))
            backend.info = replace(backend.info, notes=notes)
            return backend
    raise AssertionError("a choice names at least one backend")


# Each is imported when it is used: a host may have only one of them.
def _open(name: str, files: ModelFiles, settings: ModelSettings) -> Backend:
    if name == "mlx":
        return _open_mlx(files, settings)
    if name == "llama.cpp":
        from rl_mlx.backends.llamacpp import LlamaCppBackend  # noqa: PLC0415

        return LlamaCppBackend.open(files, settings)
    from rl_mlx.backends.remote import RemoteBackend  # noqa: PLC0415

    return RemoteBackend.open(files, settings)


def _open_mlx(files: ModelFiles, settings: ModelSettings) -> Backend:
    if settings.backend_options:
        names = ", ".join(settings.backend_options)
        raise InvalidRequest(f"the mlx backend has no backend_options; leave out {names}")
    try:
        from rl_mlx.backends.mlx import MLXBackend  # noqa: PLC0415
    except ImportError as error:
        raise BackendUnavailable(
            f"MLX cannot be loaded ({error}); install it: pip install mlx mlx-lm"
        ) from error
    return MLXBackend.open(files, settings)
