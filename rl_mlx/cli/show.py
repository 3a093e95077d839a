"""``rl-mlx show``: what a model is, and what it takes to run it."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rl_mlx.cli.options import Json, Model
from rl_mlx.cli.terminal import plain, print_json, size
from rl_mlx.errors import InvalidRequest
from rl_mlx.settings import load_settings

if TYPE_CHECKING:
    from rl_mlx.convert.facts import Facts
    from rl_mlx.store.models import ModelFiles

NAME = "show"


def command(
    model: Model,
    context: Annotated[
        int | None, typer.Option(help="Say what this many tokens of context take.", metavar="N")
    ] = None,
    json: Json = False,
) -> None:
    """Show what a model is and what it takes to run."""
    from rl_mlx.backends.choice import choose
    from rl_mlx.backends.llamacpp.options import in_force
    from rl_mlx.cli.doctor import options_text
    from rl_mlx.convert import inspect

    if context is not None and context < 1:
        raise InvalidRequest(f"--context must be at least 1, not {context}")
    with header_files(model) as (files, path):
        found = inspect(files.path)
    length = context or found.context or 4096
    settings = load_settings({})
    choice = choose(settings)
    options = in_force(settings) if choice.names[0] == "llama.cpp" else {}
    if json:
        more = {
            "name": files.name,
            "path": path,
            "backend": choice.names[0],
            "options": options,
            "bits_per_weight": found.bits_per_weight,
            "memory": {"context": length, "bytes": found.memory(length)},
        }
        print_json(more | asdict(found))
        return
    for label, value in _rows(files.name, path, found, length):
        print(f"{label:<14} {plain(str(value))}")
    print(f"{'backend':<14} {choice.why}")
    if options:
        print(textwrap.indent(options_text(options, 80), " " * 15))


@contextmanager
def header_files(model: str) -> Iterator[tuple[ModelFiles, str]]:
    """A model to be inspected, and where it lies; of one on the hub only headers are fetched."""
    from rl_mlx.store import hub
    from rl_mlx.store.headers import peek, repository
    from rl_mlx.store.resolve import find

    found = find(model)
    if isinstance(found, hub.HubRef):
        with peek(repository(found)) as files:
            yield files, f"https://huggingface.co/{found.repo} (not downloaded)"
    else:
        yield found, str(found.path)


def _rows(name: str, path: str, found: Facts, length: int) -> list[tuple[str, Any]]:
    total = max(found.parameters, 1)
    mix = ", ".join(f"{kind} {100 * n / total:.3g}%" for kind, n in found.types.items() if n)
    needed = found.memory(length)
    rows: list[tuple[str, Any]] = [
        ("model", name),
        ("path", path),
        ("format", found.format),
        ("architecture", found.architecture),
        ("parameters", count(found.parameters)),
        (
            "weights",
            f"{size(found.weight_bytes)}, {found.bits_per_weight:.2f} bits a weight ({mix})",
        ),
        ("context", found.context),
        ("layers", found.layers),
        ("hidden", found.hidden),
        ("heads", found.heads and f"{found.heads}, {found.kv_heads} for keys and values"),
        ("vocabulary", found.vocab and f"{found.vocab} ({found.tokenizer})"),
        ("special ids", ", ".join(f"{k} {v}" for k, v in found.special_ids.items()) or "none"),
        ("chat template", "yes" if found.chat_template else "no: for generate, not for chat"),
        ("memory", None if needed is None else f"{size(needed)} at {length} tokens of context"),
    ]
    return [(label, value) for label, value in rows if value is not None]


def count(parameters: int) -> str:
    """Parameters for people: ``8.03 B``."""
    for unit, factor in (("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if parameters >= factor:
            return f"{parameters / factor:.3g} {unit}"
    return str(parameters)
