"""Run open-weights language models on your own machine: MLX first, every host served.

>>> from rl_mlx import LLM
>>> with LLM("demo") as llm:
...     print(llm.chat([{"role": "user", "content": "What is rl-mlx?"}]).text)

Importing this package starts nothing and loads neither mlx nor numpy; the names below do when
first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rl_mlx import errors
from rl_mlx.types import Message, SamplingParams

if TYPE_CHECKING:
    from rl_mlx.llm import LLM, AsyncLLM

__version__ = "0.1.0"
__all__ = ["LLM", "AsyncLLM", "Message", "SamplingParams", "__version__", "errors"]


def __getattr__(name: str) -> Any:
    if name in {"LLM", "AsyncLLM"}:
        from rl_mlx import llm  # noqa: PLC0415  (keeps `import rl_mlx` free of mlx and numpy)

        return getattr(llm, name)
    raise AttributeError(f"module 'rl_mlx' has no attribute {name!r}")
