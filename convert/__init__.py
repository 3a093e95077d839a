"""Model formats, in and out. Imported as ``rl_mlx.convert``, never as ``convert``."""

from __future__ import annotations

if __name__ != "rl_mlx.convert":
    raise ImportError(
        "import this package as rl_mlx.convert: a top-level `convert` would be a second copy of it"
    )
