"""What the formats know of one family of models, in one place."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from rl_mlx.convert.gguf.changes import Change
from rl_mlx.convert.gguf.keys import Keys
from rl_mlx.convert.gguf.writer import Fields
from rl_mlx.convert.lazy import Arrays
from rl_mlx.convert.shapes import Config, Shapes, outer

RMS_NORM = "attention.layer_norm_rms_epsilon"
LAYER_NORM = "attention.layer_norm_epsilon"


def _nothing_more(config: Config) -> dict[str, Any]:  # noqa: ARG001
    return {}


def _as_it_is(config: Config, arrays: Arrays) -> Arrays:  # noqa: ARG001
    return arrays


def _unchanged(config: Config, name: str) -> Change | None:  # noqa: ARG001
    return None


@dataclass(frozen=True, kw_only=True)
class Family:
    """A family of models, of which ``model_type`` names one.

    ``block(config, layer)`` gives the canonical names of a layer's tensors, below ``layers.N.``,
    and their shapes, ``outer(config)`` those outside the layers; ``names`` maps the former without
    ``.weight`` to GGUF's. ``read`` makes a config of GGUF metadata and ``write`` metadata of a
    config, both on top of what all families say in the same words. ``epsilon`` is that of the
    norms, in a config's words and in GGUF's; ``period`` says that every so many layers one has no
    window. ``sanitize`` brings the tensors of a Hugging Face folder to their canonical names and
    layouts; ``change(config, name)`` says how a GGUF file's tensor differs from the canonical one
    by more than its name, and ``older`` how it does in files that lack the tensor of its name.
    ``defaults`` are those of transformers' config class that readers must know;
    ``complete(config)`` says in the words of other families what this one has words of its own for.
    ``exported_as`` is the family whose GGUF files are made of this one's, and ``mlx_type`` mlx-lm's
    name of it; modules of a layer that are ``plain`` mlx-lm reads as floats alone.
    """

    architecture: str
    class_name: str
    block: Callable[[Config, int], Shapes]
    names: Mapping[str, str]
    read: Callable[[Keys], dict[str, Any]]
    write: Callable[[Config], Fields] = _nothing_more
    sanitize: Callable[[Config, Arrays], Arrays] = _as_it_is
    outer: Callable[[Config], Shapes] = outer
    layers: str = "model.layers"
    epsilon: tuple[str, str] = ("rms_norm_eps", RMS_NORM)
    period: int | None = None
    change: Callable[[Config, str], Change | None] = _unchanged
    older: Callable[[Config, str], Change | None] = _unchanged
    complete: Callable[[Config], Mapping[str, Any]] = _nothing_more
    defaults: Mapping[str, Any] = field(default_factory=dict)
    exported_as: str | None = None
    mlx_type: str | None = None
    plain: tuple[str, ...] = ()
