"""The flags that several commands share, each group once, as a dataclass that a command takes
whole.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, is_dataclass
from functools import wraps
from typing import Annotated, Any, get_type_hints

import typer

from rl_mlx.errors import InvalidRequest
from rl_mlx.settings import ModelSettings, load_settings
from rl_mlx.types import SamplingParams

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A file, a folder, org/repo[:Q4_K_M] of Hugging Face, ollama:NAME, or demo.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]


@dataclass(frozen=True)
class ModelFlags:
    """How the model is loaded: over ``RL_MLX_*``, over the settings file, over the defaults."""

    backend: Annotated[
        str | None, typer.Option(help="auto, mlx, llama.cpp, or a server's URL.", metavar="NAME")
    ] = None
    draft: Annotated[
        str | None, typer.Option(help="A draft model, or lookup.", metavar="MODEL")
    ] = None
    draft_tokens: Annotated[
        int | None, typer.Option(help="Draft so many tokens a step, 1 to 16.", metavar="N")
    ] = None
    context: Annotated[
        int | None, typer.Option(help="Longest conversation in tokens.", metavar="N")
    ] = None
    kv_bits: Annotated[
        str | None,
        typer.Option(help="KV cache bits: 8, 6, 4; 8/4 for keys/values.", metavar="N"),
    ] = None
    memory: Annotated[
        str | None, typer.Option(help="Memory budget: 12GB, or 75%.", metavar="SIZE")
    ] = None
    prefix_cache: Annotated[
        str | None,
        typer.Option(help="So much disk for prefixes that outlive the process.", metavar="SIZE"),
    ] = None
    dtype: Annotated[
        str | None, typer.Option(help="float32, float16 or bfloat16.", metavar="NAME")
    ] = None

    gpu_layers: Annotated[
        str | None,
        typer.Option(help="llama.cpp: layers on the GPU: a number, all, auto.", metavar="N"),
    ] = None
    option: Annotated[
        list[str] | None,
        typer.Option(
            "--option",
            "-O",
            help="One of the backend's own, such as threads=4; may be repeated.",
            metavar="NAME=VALUE",
        ),
    ] = None

    def settings(self) -> ModelSettings:
        """All sources of settings together; raises ``InvalidRequest``."""
        flags = asdict(self)
        texts = flags.pop("option") or []
        layers = flags.pop("gpu_layers")
        if layers is not None:
            texts = [*texts, f"gpu_layers={layers}"]
        return load_settings(flags | {"backend_options": dict(map(_option, texts))})


def _option(text: str) -> tuple[str, Any]:
    """The name and value of ``NAME=VALUE``; a value that is no JSON is a text."""
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise InvalidRequest(f"--option takes NAME=VALUE, not {text!r}")
    try:
        return name.replace("-", "_"), json.loads(value)
    except ValueError:
        return name.replace("-", "_"), value


@dataclass(frozen=True)
class SamplingFlags:
    """How tokens are chosen: the fields of ``SamplingParams`` that are worth a flag."""

    max_tokens: Annotated[
        int | None, typer.Option("--max-tokens", "-n", help="Longest answer.", metavar="N")
    ] = None
    temperature: Annotated[
        float | None,
        typer.Option("--temp", "--temperature", "-t", help="0 is greedy. [0.7]", metavar="T"),
    ] = None
    top_k: Annotated[
        int | None, typer.Option(help="Keep the k likeliest tokens; 0: all.", metavar="K")
    ] = None
    top_p: Annotated[
        float | None, typer.Option(help="Keep this share of probability. [1]", metavar="P")
    ] = None
    min_p: Annotated[
        float | None,
        typer.Option(help="Drop what is below P times the likeliest. [0.05]", metavar="P"),
    ] = None
    repetition_penalty: Annotated[
        float | None, typer.Option(help="Above 1: less repetition. [1]", metavar="X")
    ] = None
    seed: Annotated[int | None, typer.Option(help="Makes the answer repeatable.", metavar="N")] = (
        None
    )
    stop: Annotated[
        list[str] | None, typer.Option(help="End at this text; may be repeated.", metavar="TEXT")
    ] = None

    def given(self) -> dict[str, Any]:
        """The fields that were set, by ``SamplingParams``' names."""
        return {k: v for k, v in asdict(self).items() if v is not None}

    def params(self) -> SamplingParams:
        """Raises ``InvalidRequest`` for a value out of range."""
        return SamplingParams.of(**self.given())


def takes_flags(command: Callable[..., Any]) -> Callable[..., Any]:
    """Spread a command's dataclass parameters into one flag a field, as typer reads them."""
    groups: dict[str, Any] = {}
    spread: dict[str, inspect.Parameter] = {}
    for name, parameter in inspect.signature(command, eval_str=True).parameters.items():
        group = parameter.annotation
        if not is_dataclass(group):
            spread[name] = parameter
            continue
        groups[name] = group
        for field, hint in get_type_hints(group, include_extras=True).items():
            spread[field] = inspect.Parameter(
                field, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=hint
            )

    @wraps(command)
    def run(**values: Any) -> Any:
        for name, group in groups.items():
            values[name] = group(**{f: values.pop(f) for f in group.__dataclass_fields__})
        return command(**values)

    run.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in spread.values()]
    )
    run.__annotations__ = {name: p.annotation for name, p in spread.items()}
    return run
