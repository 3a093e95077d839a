"""Model formats, in and out. Imported as ``rl_mlx.convert``, never as ``convert``.

``convert`` makes an MLX folder of a GGUF file or a folder, ``export`` a GGUF file of a folder, and
``inspect`` says what a model is. They are loaded when first used, so that this package stays cheap
for those who only read files.
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
    from rl_mlx.convert.exported import ExportReport
    from rl_mlx.convert.facts import Facts, inspect
    from rl_mlx.convert.gguf.export import export
    from rl_mlx.convert.pipeline import convert
    from rl_mlx.convert.recipe import Recipe
    from rl_mlx.convert.report import Report

__all__ = ["ExportReport", "Facts", "Recipe", "Report", "convert", "export", "inspect"]
_PLACES = MappingProxyType(
    {
        "ExportReport": "exported",
        "Facts": "facts",
        "Recipe": "recipe",
        "Report": "report",
        "convert": "pipeline",
        "export": "gguf.export",
        "inspect": "facts",
    }
)


def __getattr__(name: str) -> Any:
    if name in _PLACES:
        return getattr(import_module(f"{__name__}.{_PLACES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
