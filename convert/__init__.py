"""Model formats, in and out. Imported as ``rl_mlx.convert``, never as ``convert``.

``convert`` makes an MLX folder of a GGUF file or a folder; ``inspect`` says what a model is. Both
are loaded when first used, so that this package stays cheap for those who only read files.
"""

from __future__ import annotations

from importlib import import_module
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

if __name__ != "rl_mlx.convert":
    raise ImportError(
        "import this package as rl_mlx.convert: a top-level `convert` would be a second copy of it"
    )
if TYPE_CHECKING:
    from rl_mlx.convert.facts import Facts, inspect
    from rl_mlx.convert.pipeline import convert
    from rl_mlx.convert.recipe import Recipe
    from rl_mlx.convert.report import Report

__all__ = ["Facts", "Recipe", "Report", "convert", "inspect"]
_PLACES = MappingProxyType(
    {
        "Facts": "facts",
        "Recipe": "recipe",
        "Report": "report",
        "convert": "pipeline",
        "inspect": "facts",
    }
)


def __getattr__(name: str) -> Any:
    if name in _PLACES:
        return getattr(import_module(f"{__name__}.{_PLACES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
